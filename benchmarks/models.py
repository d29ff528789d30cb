"""What is measured: a checkpoint, or random weights at the sizes of a preset, which need no checkpoint.

Random weights are drawn on the devices where they live. What they generate is noise, and takes as long as anything else.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cosmos3_jax import Cosmos3Pipeline, Request, make_mesh
from cosmos3_jax.checkpoint import BUILT_IN, Checkpoint
from cosmos3_jax.compilation_cache import use_compilation_cache
from cosmos3_jax.config import EDGE, NANO, SUPER, TINY, TINY_VAE, UNIPC, WAN_VAE, TransformerConfig, VAEConfig
from cosmos3_jax.networks import Residence, abstract_networks
from cosmos3_jax.pipeline import DTYPES
from cosmos3_jax.prompt import load_tokenizer
from cosmos3_jax.weights import Network, random_weights

# Between the built-in checkpoint, whose arithmetic takes no time, and the published ones, which take hours on a CPU.
MID = dataclasses.replace(
    TINY,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    rope_axes_dim=(12, 10, 10),
    sound_gen=False,
    sound_dim=None,
)
MID_VAE = dataclasses.replace(TINY_VAE, base_dim=32, decoder_base_dim=48)
MODELS: dict[str, tuple[TransformerConfig, VAEConfig]] = {
    "tiny": Checkpoint.open(BUILT_IN).configs[:2],
    "mid": (MID, MID_VAE),
    "edge": (EDGE, WAN_VAE),
    "nano": (NANO, WAN_VAE),
    "super": (SUPER, WAN_VAE),
}
REQUESTS: dict[str, dict[str, Any]] = {  # of a model, unless flags say otherwise; None: the pipeline's own default
    "tiny": {"num_frames": 17, "height": 128, "width": 224, "num_inference_steps": 6},
    "mid": {"num_frames": 17, "height": 256, "width": 320, "num_inference_steps": 6},
}
PROMPT = "A red sports car drives along a coastal road at sunset, the camera follows it from the side, waves break below."


def add_flags(parser: argparse.ArgumentParser, *, model: str = "tiny") -> None:
    """The flags of a model, a mesh and a request."""
    add = parser.add_argument
    add("--model", choices=MODELS, default=model, help=f"random weights at these sizes ({model})")
    add("--checkpoint", metavar="DIR", help="a checkpoint instead")
    add("--cfg", type=int, default=1)
    add("--tp", type=int, default=1)
    add("--dtype", choices=DTYPES, help="(bfloat16 on GPUs, else float32)")
    add("--text-tower", default="auto")
    add("--quantize", choices=("fp8",))
    add("--step-cache", type=float)
    add("--prompt", default=PROMPT)
    add("--num-frames", type=int)
    add("--height", type=int)
    add("--width", type=int)
    add("--steps", type=int, dest="num_inference_steps")
    add("--guidance-scale", type=float)
    add("--steps-per-call", type=int)
    add("--runs", type=int, default=3, help="after one to warm up (3)")
    add("--out", type=Path, help="the whole record, as JSON")


def add_frame_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of frames that come with a request."""
    parser.add_argument("--image", metavar="FILE", help="first frame")
    parser.add_argument("--video", metavar="FILE", help="clip to go on from")


def request(arguments: argparse.Namespace, **more: Any) -> Request:
    """What the flags ask for."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    names = {field.name for field in dataclasses.fields(Request)}
    defaults = {} if arguments.checkpoint else REQUESTS.get(arguments.model, {})
    return Request(**{name: value for name, value in (defaults | given | more).items() if name in names})


def pipeline(arguments: argparse.Namespace) -> Cosmos3Pipeline:
    """The pipeline that the flags ask for."""
    mesh = make_mesh(arguments.cfg, arguments.tp)
    how = {name: getattr(arguments, name) for name in ("dtype", "text_tower", "quantize")}
    if arguments.checkpoint:
        return Cosmos3Pipeline.from_pretrained(
            arguments.checkpoint, mesh=mesh, sound=False, safety_checker=False, progress=False, **how
        )
    return random_pipeline(*MODELS[arguments.model], mesh, **how)


def random_pipeline(
    transformer: TransformerConfig,
    vae: VAEConfig,
    mesh: Mesh,
    *,
    dtype: str | None = None,
    text_tower: str = "auto",
    quantize: str | None = None,
) -> Cosmos3Pipeline:
    """A pipeline with random weights and the built-in tokenizer, without sound."""
    transformer.check_tensor_parallel(mesh.shape["tp"])
    dtype = dtype or ("bfloat16" if mesh.devices.flat[0].platform == "gpu" else "float32")
    use_compilation_cache()
    networks = abstract_networks(transformer, vae, mesh, dtype)
    checkpoint = Checkpoint(BUILT_IN, transformer, vae, UNIPC, use_system_prompt=True, negative_prompt="")
    residence = Residence(draw, networks, mesh, text_tower, quantize=quantize)
    if residence.text_tower == "keep":
        for part in networks.by_name():
            residence.bring(part)
    tokenizer = load_tokenizer(BUILT_IN / "text_tokenizer", transformer.vocab_size)
    return Cosmos3Pipeline(checkpoint, tokenizer, mesh, dtype, residence)


def draw(part: str, network: Network, *, progress: bool) -> Network:
    """An abstract network filled with random weights."""
    del part, progress
    return jax.block_until_ready(Network(network.graph, random_weights(network.weights)))

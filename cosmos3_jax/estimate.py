"""What a request would take, without a GPU and without weights: memory, FLOPs and collectives of every program.

The programs are compiled from shapes alone, for virtual CPU devices in the arrangement of the mesh, and read. A GPU's own
kernels need something else beside weights, inputs and results: cuDNN has its workspaces, but no chunk of attention's scores
and no float32 copies in front of a convolution, which are in the scratch counted here.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cosmos3_jax import sampler
from cosmos3_jax.axes import make_mesh, picture_mesh, sharding
from cosmos3_jax.config import SoundConfig, TransformerConfig, VAEConfig
from cosmos3_jax.cost import Operation, collectives, flops
from cosmos3_jax.errors import InputError
from cosmos3_jax.gpus import GPU
from cosmos3_jax.latents import Latents
from cosmos3_jax.models.layers import Rotary
from cosmos3_jax.models.transformer import Prefix
from cosmos3_jax.models.vae import uint8
from cosmos3_jax.networks import Networks, abstract_networks
from cosmos3_jax.pipeline import decode, decode_sound, encode, frames_needed, prefill, velocity
from cosmos3_jax.quantization import quantized
from cosmos3_jax.request import ResolvedRequest
from cosmos3_jax.weights import Network

TEXT_TOKENS = 512  # of each branch, if the prompt cannot be counted: four buckets, a long paragraph
# As large; of bfloat16 weights XLA's CPU backend would keep float32 copies.
STAND_IN = {"bfloat16": "float16", "float32": "float32"}
# Answer -> share of a GPU's memory (what JAX takes by default, or the most it can sensibly be given), and whether all weights
# stay loaded (networks.py)
ANSWERS = {"yes": (0.75, True), "drop": (0.75, False), "tight": (0.95, True), "tight drop": (0.95, False)}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked: a model, a request, the dtype, and the length of the text."""

    transformer: TransformerConfig
    vae: VAEConfig
    request: ResolvedRequest
    dtype: str = "bfloat16"
    text_tokens: int = TEXT_TOKENS
    sound: SoundConfig | None = None
    quantize: str | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program, and what one run of it takes. Bytes are those of one device."""

    name: str
    runs: int  # in the request
    flops: int  # of matrix products and convolutions, all devices together
    weights: int  # of the network that it runs
    inputs: int
    results: int
    scratch: int
    collectives: tuple[Operation, ...]

    @property
    def sent(self) -> int:
        """Bytes that a device sends in all runs, at most: an all-reduce twice its size, the others once."""
        return self.runs * sum(c.nbytes * (2 if c.kind == "all-reduce" else 1) for c in self.collectives)

    def collected(self, kind: str) -> tuple[int, int]:
        """How many collectives of a kind one run performs, and the bytes of their results."""
        alike = [c for c in self.collectives if c.kind == kind]
        return sum(c.count for c in alike), sum(c.nbytes for c in alike)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A job on a mesh."""

    cfg: int
    tp: int
    dtype: str
    weights: int  # bytes on one device of all networks
    stages: tuple[Stage, ...]

    def peak(self, stage: Stage, *, keep: bool = True) -> int:
        """Bytes on one device while a stage runs, beside all weights (`keep`) or with those alone that it needs."""
        return (self.weights if keep else stage.weights) + stage.inputs + stage.results + stage.scratch

    def highest(self, *, keep: bool = True) -> int:
        """The highest of all peaks."""
        return max(self.peak(stage, keep=keep) for stage in self.stages)

    def fits(self, gpu: GPU) -> str:
        """Whether the highest peak fits: "yes", "drop" (only what a stage needs is loaded), "no".

        "tight" and "tight drop" are above JAX's default share of the memory.
        """
        fitting = (answer for answer, (share, keep) in ANSWERS.items() if self.highest(keep=keep) <= share * gpu.memory)
        return next(fitting, "no")

    def seconds(self, stage: Stage, gpu: GPU) -> float:
        """The least time of all runs of a stage: its arithmetic, or one reading of its weights and inputs."""
        arithmetic = stage.flops / (self.cfg * self.tp) / getattr(gpu, self.dtype)
        return stage.runs * max(arithmetic, (stage.weights + stage.inputs) / gpu.bandwidth)

    def total_seconds(self, gpu: GPU) -> float:
        """The least time of the whole request, if its collectives cost nothing."""
        return sum(self.seconds(stage, gpu) for stage in self.stages)

    def link_seconds(self, gpu: GPU) -> float:
        """The time of all collectives at the link's peak, one after the other, as if all GPUs were on one host."""
        return sum(stage.sent for stage in self.stages) / gpu.link


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a network, and abstract arguments for it."""

    name: str
    function: Any
    arguments: tuple
    network: Network  # one of the arguments, or part of one
    mesh: Mesh
    runs: int = 1  # in the request
    everywhere: bool = False  # whether every device does all of its work

    @functools.cached_property
    def traced(self) -> Any:
        """As JAX has it before XLA."""
        with jax.set_mesh(self.mesh):
            return self.function.trace(*self.arguments)

    @property
    def flops(self) -> int:
        """Of one run, all devices together."""
        return flops(self.traced.jaxpr) * (self.mesh.size if self.everywhere else 1)

    def compiled(self) -> Stage:
        """Compiled, and what can be read then."""
        with jax.set_mesh(self.mesh):
            compiled = self.traced.lower().compile()
        needs, weights = compiled.memory_analysis(), _nbytes(self.network)
        return Stage(
            self.name,
            runs=self.runs,
            flops=self.flops,
            weights=weights,
            inputs=_nbytes(self.arguments) - weights,
            results=needs.output_size_in_bytes - needs.alias_size_in_bytes,
            scratch=needs.temp_size_in_bytes,
            collectives=tuple(collectives(compiled.as_text())),
        )


def virtual_devices(count: int) -> None:
    """Gives this process `count` CPU devices and no others, before JAX starts. Raises InputError if it has fewer already."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # JAX has started
        if jax.device_count("cpu") < count:
            raise InputError(f"{count} virtual devices need a process that has not used JAX yet ({error})") from error


def estimate(job: Job, cfg: int, tp: int) -> Estimate:
    """What a job takes on a mesh of cfg x tp devices, of a process that has `virtual_devices`.

    Raises InputError where the mesh or the heads do not allow it.
    """
    networks, programs = _programs(job, cfg, tp)
    return Estimate(cfg, tp, job.dtype, _nbytes(networks), tuple(program.compiled() for program in programs))


def work(job: Job, cfg: int, tp: int) -> dict[str, int]:
    """The FLOPs of each stage, all runs and all devices together: what `estimate` says, without compiling."""
    _, programs = _programs(job, cfg, tp)
    return {program.name: program.runs * program.flops for program in programs}


def _programs(job: Job, cfg: int, tp: int) -> tuple[Networks, list["Program"]]:
    """The networks of a job, with shapes for weights, and all that runs on them."""
    mesh = make_mesh(cfg, tp, jax.devices("cpu"))
    job.transformer.check_tensor_parallel(tp)
    sound = job.sound if job.request.enable_sound else None
    networks = abstract_networks(job.transformer, job.vae, mesh, STAND_IN[job.dtype], sound)
    if job.quantize == "fp8":
        networks = networks._replace(gen=quantized(networks.gen))
    return networks, [*towers(job, networks, mesh), *autoencoders(job, networks, mesh)]


def towers(job: Job, networks: Networks, mesh: Mesh) -> list[Program]:
    """Prefill and one denoising step."""
    config, request, S = job.transformer, job.request, job.text_tokens
    t, h, w = job.vae.latent_shape(request.num_frames, request.height, request.width)
    B = 2 if request.guided or mesh.shape["cfg"] == 2 else 1
    s = request.sound_frames(job.sound)
    G = t * math.ceil(h / config.latent_patch_size) * math.ceil(w / config.latent_patch_size) + s
    array = functools.partial(_array, mesh)
    length_B, half = array(B, dtype=jnp.int32), config.head_dim // 2
    text = Rotary(array(1, S, half), array(1, S, half))
    shape = config.num_hidden_layers, B, S, config.num_key_value_heads, config.head_dim
    keys = array(*shape, dtype=STAND_IN[job.dtype], dims="LBSKH")
    inputs = networks.gen, Rotary(array(B, G, half), array(B, G, half)), Prefix(keys, keys, length_B)
    latents = Latents(array(t, h, w, job.vae.z_dim), array(s, config.sizes["A"]) if s else None)
    state = sampler.State(latents, latents, latents, latents, array(dtype=jnp.int32))
    given = sampler.Given(latents.video, array(t, dtype=bool))
    step = velocity, inputs, state, sampler.unipc_steps(np.array([0.9])), given
    return [
        Program("prefill", prefill, (networks.und, array(B, S, dtype=jnp.int32), length_B, text), networks.und, mesh),
        Program("step", sampler.run_steps, step, networks.gen, mesh, runs=request.num_inference_steps),
    ]


def autoencoders(job: Job, networks: Networks, mesh: Mesh) -> list[Program]:
    """The encoder, if frames came with the request, the decoder, and that of the sound."""
    t, h, w = job.vae.latent_shape(job.request.num_frames, job.request.height, job.request.width)
    vae, sound, programs = networks.vae, networks.sound, []
    if job.request.image is not None or job.request.video is not None:
        count = 1 if job.request.video is None else frames_needed(job.request, job.vae)
        frames = _array(mesh, count, job.request.height, job.request.width, 3)
        programs.append(Program("encode", encode, (vae, frames), vae, mesh, everywhere=True))
    picture = picture_mesh(mesh, h, w)
    programs.append(Program("decode", decode, (vae, _array(mesh, t, h, w, job.vae.z_dim), uint8), vae, picture))
    if sound is not None:
        latents = _array(mesh, job.request.sound_frames(job.sound), job.transformer.sizes["A"])
        programs.append(Program("decode_sound", decode_sound, (sound, latents), sound, mesh, everywhere=True))
    return programs


def _array(mesh: Mesh, *sizes: int, dtype: Any = jnp.float32, dims: str = "") -> Any:
    """An abstract array, divided over `mesh` by its letters."""
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding(mesh, dims))


def _nbytes(tree: Any) -> int:
    """Bytes on one device of the abstract arrays in a tree; host arrays and functions take none."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in arrays)

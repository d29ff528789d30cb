"""Writes a checkpoint in the published layout with random weights: `python -m convert.random_checkpoint OUT`.

The checkpoints of the tests. Numbers come from numpy's RandomState, whose streams never change, so the same arguments write the
same file on any machine; the tests rely on it. Every weight matters: norms are not 1, biases not 0. No torch.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.config import TINY, TINY_SOUND, TINY_VAE, SoundConfig, TransformerConfig, VAEConfig
from cosmos3_jax.folder import write_json
from cosmos3_jax.networks import abstract_networks, abstract_sound_encoder
from cosmos3_jax.published import file_shapes, names_of, unused_tensors
from cosmos3_jax.safetensors_files import write_tensors

Shapes = dict[str, tuple[int, ...]]

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "A red ball rolls to the right over a wooden floor while the camera follows it.",
    "The video is 1.4 seconds long and is of 24 FPS. This video is of 128x224 resolution. This image is of 64x96 resolution.",
    "The video is not 7.9 seconds long and is not of 24 FPS. This video is not of 720x1280 resolution.",
    "You are a helpful assistant who will generate videos from a give prompt, and images too.",
    "A robot arm picks up a cup from the table and puts it on the shelf; waves break on the shore at sunset.",
]
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "use_karras_sigmas": True,
    "sigma_min": 0.147,
    "sigma_max": 200.0,
    "flow_shift": 1.0,
    "solver_order": 2,
    "solver_type": "bh2",
}
DISTILLED_SIGMAS = [1.0, 0.9375, 0.8333333333333334, 0.625]
DISTILLED_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "stochastic_sampling": True,
    "fixed_step_requires_explicit_sigmas": True,
    "fixed_step_sampler_config": {"sample_type": "sde", "t_list": DISTILLED_SIGMAS},
}


def write_checkpoint(
    folder: Path,
    transformer: TransformerConfig = TINY,
    vae: VAEConfig = TINY_VAE,
    sound: SoundConfig | None = None,
    *,
    seed: int = 0,
    dtype: Any = np.float32,
    shards: int = 1,
    distilled: bool = False,
) -> Path:
    """Fills `folder` with configs, a small tokenizer and random weights, the transformer's in `shards` files.

    If the transformer has sound heads, there is a sound tokenizer, a small decoder if none is given; one whose config says so
    has an encoder too. `distilled` makes it a four-step checkpoint.
    """
    random = np.random.RandomState(seed)
    tensors = _random(transformer_shapes(transformer), random, dtype)
    write_tensors(folder / "transformer", [dict(list(tensors.items())[i::shards]) for i in range(shards)])
    write_tensors(folder / "vae", [_random(vae_shapes(vae), random, dtype)])
    if transformer.sound_gen:
        sound = sound or dataclasses.replace(TINY_SOUND, vocoder_input_dim=transformer.sizes["A"])
        write_tensors(folder / "sound_tokenizer", [_random(sound_shapes(sound), random, dtype)])
        write_json(folder / "sound_tokenizer" / "config.json", sound_json(sound))
    write_tokenizer(folder / "text_tokenizer")
    scheduler = DISTILLED_SCHEDULER if distilled else SCHEDULER
    write_json(folder / "model_index.json", model_index(str(scheduler["_class_name"]), sound=transformer.sound_gen))
    write_json(folder / "transformer" / "config.json", transformer_json(transformer))
    write_json(folder / "vae" / "config.json", vae_json(vae))
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if distilled:
        write_json(folder / "modular_model_index.json", modular_model_index())
    return folder


def transformer_shapes(config: TransformerConfig) -> Shapes:
    """Every published tensor of the transformer, also those that generation does not read."""
    networks = abstract_networks(config, TINY_VAE, make_mesh(), "float32")
    layers = config.num_hidden_layers
    shapes = file_shapes(networks.und, names_of("und", networks.und, config))
    shapes |= file_shapes(networks.gen, names_of("gen", networks.gen, config))
    D, V = config.hidden_size, config.vocab_size
    elsewhere = {"lm_head.weight": (V, D), "norm.weight": (D,)}
    if config.action_gen:
        elsewhere |= _action_shapes(D, config.action_dim or 0, config.num_embodiment_domains)
    first = _first_text_layer(config)
    for name in unused_tensors(config):
        twin = name.replace(f"layers.{layers - 1}.", "layers.0.")
        if name in elsewhere or twin in first:
            shapes[name] = elsewhere[name] if name in elsewhere else first[twin]
    return shapes


def _first_text_layer(config: TransformerConfig) -> Shapes:
    """The tensors of a text layer that is not the last."""
    two = dataclasses.replace(config, num_hidden_layers=2)
    und = abstract_networks(two, TINY_VAE, make_mesh(), "float32").und
    return file_shapes(und, names_of("und", und, two))


def _action_shapes(D: int, size: int, domains: int) -> Shapes:
    return {
        "action_proj_in.fc.weight": (domains, size * D),
        "action_proj_in.bias.weight": (domains, D),
        "action_proj_out.fc.weight": (domains, D * size),
        "action_proj_out.bias.weight": (domains, size),
        "action_modality_embed": (D,),
    }


def vae_shapes(config: VAEConfig) -> Shapes:
    """Every published tensor of the VAE."""
    vae = abstract_networks(TINY, config, make_mesh(), "float32").vae
    return file_shapes(vae, names_of("vae", vae, TINY))


def sound_shapes(config: SoundConfig) -> Shapes:
    """Every published tensor of a sound tokenizer: of its decoder, and of the encoder if the config has one."""
    sound = abstract_networks(TINY, TINY_VAE, make_mesh(), "float32", config).by_name()["sound"]
    shapes = file_shapes(sound, names_of("sound", sound, TINY))
    if config.encoder is not None:
        encoder = abstract_sound_encoder(config.encoder, make_mesh())
        shapes |= file_shapes(encoder, names_of("sound_encoder", encoder, TINY))
    return shapes


def _random(shapes: Shapes, random: np.random.RandomState, dtype: Any) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, shape in sorted(shapes.items()):
        noise = random.standard_normal(shape)
        if name.endswith("weight_g"):
            value = _magnitude(name, shapes) * (1 + 0.1 * noise)
        elif len(shape) == 1 or name.endswith(("gamma", "alpha", "beta")):
            value = ("norm" in name and not name.endswith("bias")) + 0.1 * noise
        else:
            value = noise / np.prod(shape[1:]) ** 0.5
        tensors[name] = value.astype(dtype)
    return tensors


def _magnitude(name: str, shapes: Shapes) -> float:
    """The length of a convolution's weights for which the sound is loud, follows its latents, and is seldom clipped.

    In the encoder, that for which what comes out is as large as what comes in.
    """
    if name.startswith("encoder."):
        return 1.0
    if "conv_t1" not in name:
        return 0.3 if name == "decoder.conv2.weight_g" else 0.5
    inputs, outputs, kernel = shapes[name[:-1] + "v"]
    return 0.7 * (outputs * kernel / (2 * inputs)) ** 0.5  # of a transposed one: without the factor, as loud as what comes in


def model_index(scheduler: str = str(SCHEDULER["_class_name"]), *, sound: bool = True) -> dict[str, object]:
    """model_index.json, as the published ones have it."""
    tokenizer = {"sound_tokenizer": ["diffusers", "Cosmos3AVAEAudioTokenizer"]} if sound else {}
    return {"_class_name": "Cosmos3OmniPipeline", "default_use_system_prompt": True} | _components(scheduler) | tokenizer


def modular_model_index() -> dict[str, object]:
    """modular_model_index.json, as the distilled checkpoints have it."""
    about = {
        "_class_name": "Cosmos3DistilledModularPipeline",
        "_blocks_class_name": "Cosmos3DistilledBlocks",
        "is_distilled": True,
        "distilled_sigmas": DISTILLED_SIGMAS,
        "default_use_system_prompt": True,
        "enable_safety_checker": True,
    }
    components = _components(str(DISTILLED_SCHEDULER["_class_name"]))
    where = {"pretrained_model_name_or_path": "random", "variant": None, "revision": None}
    return about | {name: [*kind, {**where, "subfolder": name, "type_hint": kind}] for name, kind in components.items()}


def _components(scheduler: str) -> dict[str, list[str]]:
    """The parts of a pipeline: library and class."""
    return {
        "scheduler": ["diffusers", scheduler],
        "text_tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Cosmos3OmniTransformer"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def transformer_json(config: TransformerConfig) -> dict[str, object]:
    """transformer/config.json."""
    derived = {"_class_name": "Cosmos3OmniTransformer", "patch_latent_dim": config.sizes["C"], "attention_bias": False}
    return derived | dataclasses.asdict(config)


def vae_json(config: VAEConfig) -> dict[str, object]:
    """vae/config.json."""
    return {"_class_name": "AutoencoderKLWan", "is_residual": True, "attn_scales": []} | dataclasses.asdict(config)


def sound_json(config: SoundConfig) -> dict[str, object]:
    """sound_tokenizer/config.json."""
    about = {"_class_name": "Cosmos3AVAEAudioTokenizer", "model_type": "autoencoder_v2"}
    decoder = dataclasses.asdict(config)
    encoder = decoder.pop("encoder")
    derived = {"encoder_enabled": encoder is not None}
    return about | derived | decoder | {"enc_latent_dim": 2 * config.vocoder_input_dim} | (encoder or {})


def write_tokenizer(folder: Path, corpus: Sequence[str] = CORPUS) -> None:
    """A byte-level BPE of 512 tokens at most, trained on a few sentences in no time; any text can be written with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY.vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m convert.random_checkpoint", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(arguments.out, seed=arguments.seed, dtype=jnp.bfloat16)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()

"""What a checkpoint folder is, and everything that is wrong with it, without writing and without reading a weight."""

from pathlib import Path
from typing import Any

import jax

from convert.random_checkpoint import transformer_shapes
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.checkpoint import Checkpoint, Weights
from cosmos3_jax.config import PRESETS, TransformerConfig
from cosmos3_jax.converted import ConvertedWeights
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.published import unused_tensors
from cosmos3_jax.weights import audit, nbytes

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def inspect(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The same in words and as JSON. Raises InputError for a folder that is no checkpoint at all."""
    checkpoint = Checkpoint.open(path, sound=True)
    config, weights = checkpoint.transformer, checkpoint.weights
    mesh = make_mesh(devices=jax.devices("cpu")[:1])
    networks = abstract_networks(config, checkpoint.vae, mesh, "bfloat16", checkpoint.sound).by_name()
    about: dict[str, Any] = {
        "folder": str(checkpoint.folder),
        "layout": "converted" if isinstance(weights, ConvertedWeights) else "published",
        "family": family(config),
        "sizes": {name: getattr(config, name) for name in (*SIZES, "vocab_size")},
        "heads": {"sound": config.sound_gen, "action": config.action_gen},
        "sampler": _sampler(checkpoint),
        "gigabytes_in_bfloat16": {part: round(nbytes(network) / 1e9, 3) for part, network in networks.items()},
        "tensor_parallel": config.tensor_parallel_sizes(),
        "sound_tokenizer": _sound_tokenizer(weights),
        "faults": weights.audit(networks),
        "notes": _notes(config, weights),
    }
    return _in_words(about), about


def family(config: TransformerConfig) -> str:
    """Nano, Super or Edge if the sizes are theirs, else what kind of transformer it is."""
    for name, preset in PRESETS.items():
        if all(getattr(config, size) == getattr(preset, size) for size in (*SIZES, "hidden_act")):
            return name
    return "of Nano's and Super's kind" if config.hidden_act == "silu" else "of Edge's kind"


def _sampler(checkpoint: Checkpoint) -> str:
    sigmas = checkpoint.scheduler.distilled_sigmas
    return f"distilled, {len(sigmas)} steps at {', '.join(f'{sigma:.4g}' for sigma in sigmas)}" if sigmas else "UniPC"


def _sound_tokenizer(weights: Weights) -> str:
    names = weights.beside("sound_tokenizer")
    if not names:
        return "none"
    return f"{'full' if any(name.startswith('encoder.') for name in names) else 'decoder only'}, {len(names)} tensors"


def _notes(config: TransformerConfig, weights: Weights) -> list[str]:
    """Differences to the published lists that do not matter here: tensors that are not needed, of heads for example."""
    if isinstance(weights, ConvertedWeights) and "unused" not in weights.stores:
        return []
    unused = unused_tensors(config)
    expected = {name: shape for name, shape in transformer_shapes(config).items() if name in unused}
    lines = audit(expected, weights.beside("unused"), ())
    return [f"transformer: {line} (not needed: {unused.get(line.split()[1], 'unknown')})" for line in lines]


def _in_words(about: dict[str, Any]) -> str:
    lines = []
    for name, value in about.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items())
        if isinstance(value, list) and name != "tensor_parallel":
            value = "".join(f"\n  {line}" for line in value) or "none"
        lines.append(f"{name:>22}  {value}")
    return "\n".join(lines)

"""Writes a checkpoint with Nano's tensors, by name all 814 of them, in narrower layers: 6.7 GB of bf16 in five files.

    python benchmarks/synthetic_checkpoint.py OUT

It is for measuring how fast weights are loaded; what it generates is noise. Its VAE is a small one.
"""

import argparse
import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.random_checkpoint import transformer_json, transformer_shapes, write_checkpoint
from cosmos3_jax.config import NANO, TINY, TINY_VAE
from cosmos3_jax.folder import write_json
from cosmos3_jax.safetensors_files import in_shards, write_tensors

NARROW = dataclasses.replace(NANO, hidden_size=2048, intermediate_size=4096, num_attention_heads=16)
VAE = dataclasses.replace(TINY_VAE, z_dim=NANO.latent_channel, latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48)
FILE = 1_400_000_000  # bytes at most, for five files


def tensors() -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the transformer, drawn from one block of numbers over and over: fast, and no two zeros."""
    block = (0.02 * np.random.RandomState(0).standard_normal((1 << 22) + 1)).astype(jnp.bfloat16)
    for name, shape in transformer_shapes(NARROW).items():
        yield name, np.resize(block, shape)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    out = parser.parse_args().out
    write_checkpoint(out, dataclasses.replace(TINY, sound_dim=NARROW.sound_dim), VAE, dtype=jnp.bfloat16)
    shutil.rmtree(out / "transformer")
    write_tensors(out / "transformer", in_shards(tensors(), FILE))
    write_json(out / "transformer" / "config.json", transformer_json(NARROW))
    count = sum(map(math.prod, transformer_shapes(NARROW).values()))
    print(f"{out}: {2 * count / 1e9:.2f} GB in {len(list((out / 'transformer').glob('*.safetensors')))} files")


if __name__ == "__main__":
    main()

"""Prints how far every case is from the recorded reference: `python tests/parity_table.py`, the tables of the README."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cases
import numpy as np
from metrics import errors, outputs

from convert.random_checkpoint import write_checkpoint
from cosmos3_jax import Cosmos3Pipeline

GOLDENS = Path(__file__).parent / "data" / "goldens"


SHORT = {"latents": "latents", "video": "frames", "sound_latents": "sound latents", "sound": "sound"}


def ratios(pipe: Cosmos3Pipeline, name: str, goldens) -> list[str]:
    """bf16: the root mean square of our error over that of the reference's own, both against the float32 reference."""
    rough = outputs(pipe, cases.CASES[name])
    return [f"{(errors(x, goldens[f'{name}.{key}']) / goldens[f'{name}.{key}.bf16'])[0]:.2f}" for key, x in rough.items()]


def largest(pipe: Cosmos3Pipeline, name: str, goldens) -> list[str]:
    """float32: our largest error over the standard deviation of the reference."""
    return [f"{errors(x, goldens[f'{name}.{key}'])[1]:.1e}" for key, x in outputs(pipe, cases.CASES[name]).items()]


def main() -> None:
    measures = {"float32": (largest, list(cases.CASES)), "bfloat16": (ratios, cases.BF16_CASES)}
    rows: dict[str, dict[str, list[str]]] = {dtype: {name: [] for name in names} for dtype, (_, names) in measures.items()}
    for family, config in cases.FAMILIES.items():
        goldens = np.load(GOLDENS / f"{family}.npz")
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config, cases.VAE)
            for dtype, (measure, names) in measures.items():
                pipe = Cosmos3Pipeline.from_pretrained(folder, dtype=dtype, progress=False)
                for name in names:
                    rows[dtype][name] += measure(pipe, name, goldens)
    for dtype, (_, names) in measures.items():
        for with_sound in (False, True):
            chosen = [name for name in names if (name in cases.SOUND_CASES) == with_sound]
            kinds = [SHORT[output] for output in cases.outputs_of(chosen[0])]
            titles = [f"{family}: {kind}" for family in cases.FAMILIES for kind in kinds]
            print(f"\n| {dtype} | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
            for name in chosen:
                print(f"| {name.replace('_', ' ')} | {' | '.join(rows[dtype][name])} |")


if __name__ == "__main__":
    main()

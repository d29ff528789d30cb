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


def ratios(pipe: Cosmos3Pipeline, name: str, goldens) -> list[str]:
    """bf16: the root mean square of our error over that of the reference's own, both against the float32 reference."""
    rough = outputs(pipe, cases.CASES[name])
    return [f"{(errors(x, goldens[f'{name}.{key}']) / goldens[f'{name}.{key}.bf16'])[0]:.2f}" for key, x in rough.items()]


def main() -> None:
    exact_rows, rough_rows = ({name: [] for name in names} for names in (cases.CASES, cases.BF16_CASES))
    for family, config in cases.FAMILIES.items():
        goldens = np.load(GOLDENS / f"{family}.npz")
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config, cases.VAE)
            pipes = {dtype: Cosmos3Pipeline.from_pretrained(folder, dtype=dtype) for dtype in ("float32", "bfloat16")}
        for name, case in cases.CASES.items():
            exact = outputs(pipes["float32"], case)
            exact_rows[name] += [f"{errors(x, goldens[f'{name}.{key}'])[1]:.1e}" for key, x in exact.items()]
        for name in cases.BF16_CASES:
            rough_rows[name] += ratios(pipes["bfloat16"], name, goldens)
    titles = [f"{family}: {output}" for family in cases.FAMILIES for output in ("latents", "frames")]
    for what, rows in {"float32": exact_rows, "bf16": rough_rows}.items():
        print(f"\n| {what} | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
        for name, cells in rows.items():
            print(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

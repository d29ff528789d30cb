"""Prints how far every case is from the recorded reference: `python tests/parity_table.py`, the tables of the README."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cases
import numpy as np
from metrics import errors, sample

from convert.random_checkpoint import write_checkpoint
from cosmos3_jax import Cosmos3Pipeline

GOLDENS = Path(__file__).parent / "data" / "goldens"


def outputs(pipe: Cosmos3Pipeline, case: dict) -> dict[str, np.ndarray]:
    """Latents after the last step, and the sample of the frames that is recorded."""
    steps = []
    result = pipe(**case, callback_on_step_end=lambda _step, _timestep, x: steps.append(np.asarray(x)), progress=False)
    return {"latents": steps[-1], "video": sample(result.video)}


def main() -> None:
    print("| case | family | latents | frames | bf16 / reference's: latents | frames |\n|---|---|---|---|---|---|")
    for family, config in cases.FAMILIES.items():
        goldens = np.load(GOLDENS / f"{family}.npz")
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config, cases.VAE)
            pipes = {dtype: Cosmos3Pipeline.from_pretrained(folder, dtype=dtype) for dtype in ("float32", "bfloat16")}
        for name, case in cases.CASES.items():
            exact = {key: errors(x, goldens[f"{name}.{key}"])[1] for key, x in outputs(pipes["float32"], case).items()}
            cells = [f"{error:.1e}" for error in exact.values()] + ["", ""]
            if name in cases.BF16_CASES:
                rough = outputs(pipes["bfloat16"], case)
                cells[2:] = [
                    "rms {:.2f}, max {:.2f}".format(*errors(x, goldens[f"{name}.{key}"]) / goldens[f"{name}.{key}.bf16"])
                    for key, x in rough.items()
                ]
            print(f"| {name.replace('_', ' ')} | {family} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""What the options that are not exact save, and what they change: the step cache and FP8, against neither.

    python -m benchmarks.options --model mid --steps 35 --dtype bfloat16 [--out FILE.json]

Differences are of the last latents: the root mean square of what an option changes, over their deviation. What the other dtype
changes is told too, as a measure. Weights are random: of real ones, and to the eye, it may be more or less.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import models, record
from benchmarks.generate import about
from cosmos3_jax import Cosmos3Pipeline, Request

THRESHOLDS = (0.01, 0.02, 0.05, 0.1)
OTHER = {"float32": "bfloat16", "bfloat16": "float32"}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_flags(parser, model="mid")
    parser.set_defaults(num_inference_steps=35)
    arguments = parser.parse_args()
    rows, what = measure(arguments)
    print(table(rows))
    record.finish({**what, "rows": rows}, arguments.out)


def measure(
    arguments: argparse.Namespace,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    others: Mapping[str, dict[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for neither option, which comes first, and for each; and what was measured.

    `others` are pipelines that differ in these flags: by default FP8, and the other dtype.
    """
    pipe, request = models.pipeline(arguments), models.request(arguments, output_type="latent")
    what = about("options", arguments, pipe, request)
    if others is None:
        others = {"fp8": {"quantize": "fp8"}, OTHER[pipe.dtype]: {"dtype": OTHER[pipe.dtype]}}
    without, plain = run(pipe, request, arguments.runs)
    rows = [{"option": "neither", **plain, "of_the_time": 1.0, "difference": 0.0}]

    def add(option: str, latents: np.ndarray, found: dict[str, Any]) -> None:
        compared = {"of_the_time": found["seconds"] / plain["seconds"], "difference": record.difference(latents, without)}
        rows.append({"option": option, **found, **compared})

    for threshold in thresholds:
        add(f"step_cache={threshold}", *run(pipe, dataclasses.replace(request, step_cache=threshold), arguments.runs))
    del pipe  # a GPU may not have room for two
    for option, how in others.items():
        add(option, *run(models.pipeline(argparse.Namespace(**vars(arguments) | how)), request, arguments.runs))
    return rows, what


def run(pipe: Cosmos3Pipeline, request: Request, runs: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The last latents; the median seconds of denoising, after one to warm up, and the steps that were computed."""
    results = [pipe.run(request, progress=False) for _ in range(1 + runs)]
    seconds = statistics.median(each.seconds["denoise"] for each in results[1:])
    return results[-1].video, {"seconds": seconds, "computed_steps": results[-1].computed_steps}


def table(rows: list[dict[str, Any]]) -> str:
    """The same as Markdown."""
    lines = ["| option | denoise, s | of the time | steps computed | difference |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row['seconds']:.3f} | {row['of_the_time']:.2f} | {row['computed_steps']} | {row['difference']:.4f}"
        lines.append(f"| {row['option']} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Beside the reference: diffusers' Cosmos3OmniPipeline with the same weights and the same request, in turns in one run.

    python -m benchmarks.compare_diffusers --model mid --threads 2 [--runs 5] [--out FILE.json]
    python -m benchmarks.compare_diffusers --model nano --num-frames 189 --height 192 --width 320

Needs the extra `parity`. After one of either to warm up, each run makes one video on either side; the ratio is that of the
medians, below 1 where we are faster. The latents of the two must agree, or nothing was compared.
"""

import argparse
import functools
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import record

if TYPE_CHECKING:
    from cosmos3_jax import Cosmos3Pipeline
    from cosmos3_jax.request import ResolvedRequest

STAGES = ("whole", "step", "decode")
# Of the latents, RMS over their deviation. Guidance of 6 spreads each side's rounding, in bf16 to some 3 % from float32.
DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.3}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="cores of the CPU that either side may use (all)")
    if threads := parser.parse_known_args()[0].threads:  # before JAX and torch start: they count the cores then
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for both
    from benchmarks import models

    models.add_flags(parser, model="mid")
    arguments = parser.parse_args()
    if arguments.num_inference_steps == 1:
        parser.error("--steps 1: the reference's first step cannot be told from what comes before it; take 2 or more")
    measured = measure(arguments)
    print(table(measured))
    if not measured["difference"] < DIFFERENCE[measured["dtype"]]:
        raise SystemExit(f"the latents differ by {measured['difference']:.2g} of their deviation: nothing was compared")
    record.finish(measured, arguments.out)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of either side, and what ours are of theirs."""
    from benchmarks import diffusers_pipeline, models
    from cosmos3_jax.request import resolve

    ours = models.pipeline(arguments)
    request = resolve(models.request(arguments, prompt_style="diffusers", sigmas="linear"), *ours.checkpoint.configs)
    vae = ours.checkpoint.vae
    shape = 1, vae.z_dim, *vae.latent_shape(request.num_frames, request.height, request.width)
    noise = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    theirs = diffusers_pipeline.diffusers_pipeline(ours)
    one = functools.partial(run_ours, ours, request, noise)
    other = functools.partial(diffusers_pipeline.run, theirs, request, noise)
    turns = [(one(), other()) for _ in range(1 + arguments.runs)]
    timed = {side: [turn[i][0] for turn in turns] for i, side in enumerate(("ours", "diffusers"))}
    sides = {
        side: {stage: record.spread([each[stage] for each in runs[1:]]) for stage in STAGES} for side, runs in timed.items()
    }
    latents, expected = (made for _, made in turns[-1])
    return {
        "kind": "compare_diffusers",
        "model": arguments.checkpoint or arguments.model,
        "dtype": ours.dtype,
        "threads": arguments.threads or len(os.sched_getaffinity(0)),
        "request": {name: getattr(request, name) for name in ("num_frames", "height", "width", "num_inference_steps")},
        "first": {side: runs[0]["whole"] for side, runs in timed.items()},
        **sides,
        "ratio": {stage: sides["ours"][stage]["median"] / sides["diffusers"][stage]["median"] for stage in STAGES},
        "difference": record.difference(latents, expected),
    }


def run_ours(pipe: "Cosmos3Pipeline", request: "ResolvedRequest", noise: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Seconds of a request ("whole", "step", "decode"), and its last latents [1, c, t, h, w]."""
    last: dict[str, Any] = {}

    def on_step(_step: int, _timestep: float, latents: Any) -> None:
        last["latents"] = latents

    start = time.perf_counter()
    result = pipe(
        request.prompt,
        request.negative_prompt,
        num_frames=request.num_frames,
        height=request.height,
        width=request.width,
        fps=request.fps,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        flow_shift=request.flow_shift,
        sigmas="linear",
        prompt_style="diffusers",
        latents=noise,
        callback_on_step_end=on_step,
        progress=False,
    )
    whole = time.perf_counter() - start
    step = result.seconds["denoise"] / request.num_inference_steps
    return {"whole": whole, "step": step, "decode": result.seconds["decode"]}, np.asarray(last["latents"])


def table(measured: dict[str, Any]) -> str:
    """The medians as Markdown."""
    lines = ["| | ours, s | diffusers, s | ratio |", "|---|---|---|---|"]
    for stage in STAGES:
        one, other = (measured[side][stage]["median"] for side in ("ours", "diffusers"))
        lines.append(f"| {stage} | {one:.3f} | {other:.3f} | {measured['ratio'][stage]:.2f} |")
    lines += ["", f"The latents differ by {measured['difference']:.1e} of their deviation."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Parts of gpu_suite.py about whole requests: beside published times, with the options that are not exact, beside diffusers."""

import argparse
import functools
import importlib.util
from collections.abc import Iterator

from benchmarks import compare_diffusers, generate, models, options
from benchmarks.gpu.setting import CHECKPOINTS, Row, Setting, Video, measured, pipeline, videos

OVERHEAD = 35  # seconds of a request to compile, decode twice and count FLOPs
SHORT = 2  # steps, of a request that has no time for more


def requests(setting: Setting) -> Iterator[Row]:
    """Whole requests, beside what others published for Nano on one H200; of those cut short, what all steps would take."""
    later = len(videos())
    for name, video in videos().items():
        later -= 1
        run = functools.partial(_request, setting, video, OVERHEAD * later)
        yield from measured(setting, [({"request": f"{name}: {video}"}, run)])


def _request(setting: Setting, video: Video, reserved: float) -> Row:
    """`reserved` seconds are those of the requests that follow."""
    pipe, full = pipeline(setting.model), 35 if video.frames > 1 else 50
    guess = next(iter(video.published.values()), None)
    steps = SHORT
    if guess is not None:  # once to compile, once to measure
        steps = int(max(SHORT, min(full, (setting.left - reserved - OVERHEAD) / 2 / (guess / full))))
    result = generate.measure(pipe, video.request(steps, output_type="pil"), runs=1)
    took = {stage: values["median"] for stage, values in result["stages"].items()}
    step = took["denoise"] / steps
    compared = video.published if setting.model == "nano" else {}
    return {
        "steps": steps,
        "prefill s": took["prefill"],
        "step s": step,
        "decode s": took["decode"],
        "file s": took["write"],
        "whole s": took["whole"] - took["write"] + step * (full - steps),
        "extrapolated": steps < full,
        **{f"{who} s": published for who, published in compared.items()},
        "first s": result["first"]["whole"],
        "share of product": result["share_of_matrix_product"],
        "peak GB": result["peak_memory"]["device"] / 1e9,
    }


def inexact(setting: Setting) -> Iterator[Row]:
    """What the step cache and FP8 save and change, at the smallest size."""
    pipeline.cache_clear()  # a GPU has no room for two
    rows, _ = options.measure(_flags(setting, steps=10), thresholds=(0.02, 0.05), others={"fp8": {"quantize": "fp8"}})
    yield from rows


def diffusers(setting: Setting) -> Iterator[Row]:
    """The reference with the same weights and request, in turns with ours."""
    if missing := [name for name in ("torch", "diffusers", "accelerate") if importlib.util.find_spec(name) is None]:
        yield {"note": f"not installed: {', '.join(missing)}"}
        return
    result = compare_diffusers.measure(_flags(setting, steps=4))
    for stage in compare_diffusers.STAGES:
        ours, theirs = (result[side][stage]["median"] for side in ("ours", "diffusers"))
        yield {"request": str(videos()["256p"]), "stage": stage, "ours s": ours, "diffusers s": theirs, "ratio": ours / theirs}
    alike = result["difference"] < compare_diffusers.DIFFERENCE[result["dtype"]]
    yield {"stage": "latents", "difference": result["difference"], "note": "" if alike else "too far apart to compare"}


def _flags(setting: Setting, steps: int) -> argparse.Namespace:
    """The smallest request, as another benchmark's command line has it, once to warm up and once to measure."""
    parser, video = argparse.ArgumentParser(), videos()["256p"]
    parser.add_argument("--threads", type=int)
    models.add_flags(parser)
    asked: dict[str, object] = {"num-frames": video.frames, "height": video.height, "width": video.width}
    asked |= {"steps": steps, "runs": 1}
    asked |= {"checkpoint": folder} if (folder := CHECKPOINTS.get(setting.model)) else {"model": setting.model}
    return parser.parse_args([f"--{name}={value}" for name, value in asked.items()])

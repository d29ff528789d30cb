"""Where the time of a whole request goes, stage by stage, and what share of the device's arithmetic that is.

    python -m benchmarks.generate --model nano --num-frames 189 --height 480 --width 832 [--cfg 1 --tp 1] [--out FILE.json]

The first request is told apart: it compiles, or loads what an earlier process compiled. Of those after it, median and spread.
FLOPs are counted from the programs (roofline.py), and divided by the measured rate of a large matrix product, and by the
data sheet's where the GPU is known.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import models, record
from cosmos3_jax import Cosmos3Pipeline, Request
from cosmos3_jax.checkpoint import BUILT_IN
from cosmos3_jax.gpus import named
from cosmos3_jax.pipeline import token_ids
from cosmos3_jax.request import resolve


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_flags(parser)
    models.add_frame_flags(parser)
    arguments = parser.parse_args()
    start = time.perf_counter()
    pipe = models.pipeline(arguments)
    load = time.perf_counter() - start
    request = models.request(arguments, output_type="pil")
    measured = {"load": round(load, 3), **measure(pipe, request, arguments.runs)}
    print(table(measured))
    record.finish({**about("generate", arguments, pipe, request), **measured}, arguments.out)


def about(kind: str, arguments: argparse.Namespace, pipe: Cosmos3Pipeline, request: Request) -> dict[str, Any]:
    """What was measured."""
    resolved = resolve(request, *pipe.checkpoint.configs)
    names = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "steps_per_call")
    return {
        "kind": kind,
        "model": arguments.checkpoint or arguments.model,
        "mesh": {"cfg": arguments.cfg, "tp": arguments.tp},
        "dtype": pipe.dtype,
        "text_tower": pipe.residence.text_tower,
        "request": {name: getattr(resolved, name) for name in names},
    }


def measure(pipe: Cosmos3Pipeline, request: Request, runs: int) -> dict[str, Any]:
    """The first request, the stages of those after it, and their share of what the devices can do."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / ("out.png" if request.num_frames == 1 else "out.mp4")
        with record.compiling() as compiled:
            first = once(pipe, request, file)
        with record.compiling() as again:
            later = [once(pipe, request, file) for _ in range(runs)]
    steps = resolve(request, *pipe.checkpoint.configs).num_inference_steps
    for seconds in later:
        seconds["step"] = seconds["denoise"] / steps
    stages = {stage: record.spread([seconds[stage] for seconds in later]) for stage in later[0]}
    work = flops(pipe, request)
    rate = product_rate(pipe.dtype) * pipe.mesh.size
    gpu = named(jax.devices()[0].device_kind)
    sheet = getattr(gpu, pipe.dtype) if gpu else None
    done = sum(work.values())
    whole = stages["whole"]["median"]
    return {
        "first": first,
        "compiled_first": compiled,
        "compiled_later": again,
        "stages": stages,
        "peak_memory": record.peak_memory(),
        "flops": work,
        "flops_per_second": done / whole,
        "matrix_product_rate": rate,
        "share_of_matrix_product": done / whole / rate,
        "share_of_data_sheet": done / whole / (sheet * pipe.mesh.size) if sheet else None,
        "shares": {
            stage: work[part] / stages[stage]["median"] / rate
            for part, stage in {"encode": "encode", "prefill": "prefill", "step": "denoise", "decode": "decode"}.items()
            if part in work and stages.get(stage, {}).get("median")
        },
    }


def once(pipe: Cosmos3Pipeline, request: Request, file: Path) -> dict[str, float]:
    """Seconds of each stage of one request, of writing its file, and of all of it."""
    start = time.perf_counter()
    result = pipe.run(request, progress=False)
    decoded = time.perf_counter()
    result.save(file)
    end = time.perf_counter()
    return {**result.seconds, "write": round(end - decoded, 4), "whole": round(end - start, 4)}


def flops(pipe: Cosmos3Pipeline, request: Request) -> dict[str, int]:
    """The FLOPs of each stage, counted by a process of its own: on a GPU, attention is a kernel that cannot be looked into.

    An image or a clip must be a file.
    """
    resolved = resolve(request, *pipe.checkpoint.configs)
    tokens = token_ids(resolved, pipe.checkpoint, pipe.tokenizer, pipe.mesh.shape["cfg"])[0].shape[1]
    transformer, vae, *_ = pipe.checkpoint.configs
    model = next((name for name, configs in models.MODELS.items() if configs == (transformer, vae)), None)
    if model is None and pipe.checkpoint.folder == BUILT_IN:
        raise ValueError("random weights at sizes that models.MODELS does not have: another process cannot count their FLOPs")
    which = ["--model", model] if model else ["--checkpoint", str(pipe.checkpoint.folder)]
    command = [sys.executable, "-m", "benchmarks.roofline", "--flops", *which, "--text-tokens", str(tokens)]
    for flag, value in {
        "num-frames": resolved.num_frames,
        "height": resolved.height,
        "width": resolved.width,
        "steps": resolved.num_inference_steps,
        "guidance-scale": resolved.guidance_scale,
        "cfg": pipe.mesh.shape["cfg"],
        "tp": pipe.mesh.shape["tp"],
        "image": request.image,
        "video": request.video,
    }.items():
        command += [f"--{flag}", str(value)] if value is not None else []
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # those of a GPU are unknown there
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(answer.splitlines()[-1])["flops"]


@functools.cache
def product_rate(dtype: str) -> float:
    """FLOPs a second of a large square matrix product on one device, the median of five."""
    size = 8192 if jax.default_backend() == "gpu" else 2048
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / statistics.median(record.times(lambda: product(square, square).block_until_ready(), 5))


def table(measured: dict[str, Any]) -> str:
    """The stages as Markdown."""
    lines = ["| stage | s, median | least | greatest | share of a matrix product's rate |", "|---|---|---|---|---|"]
    for stage, seconds in measured["stages"].items():
        share = measured["shares"].get(stage, measured["share_of_matrix_product"] if stage == "whole" else None)
        cells = [stage, *(f"{value:.3f}" for value in seconds.values()), "" if share is None else f"{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    first, later = measured["compiled_first"], measured["compiled_later"]
    lines += [
        "",
        f"First request {measured['first']['whole']:.2f} s, of which {first['seconds']:.2f} s to trace and compile.",
        f"Programs: {first['programs']} ({first['from_cache']} of them from the cache); compiled later: {later['programs']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

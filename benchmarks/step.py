"""One denoising step and one decode, at any size: the quick look.

python -m benchmarks.step --model nano --num-frames 189 --height 720 --width 1280 [--steps 4] [--out FILE.json]
"""

import argparse
from typing import Any

from benchmarks import models, record
from benchmarks.generate import about, flops, product_rate
from cosmos3_jax import Cosmos3Pipeline, Request


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_flags(parser)
    parser.set_defaults(num_inference_steps=4)
    arguments = parser.parse_args()
    pipe = models.pipeline(arguments)
    request = models.request(arguments)
    measured = measure(pipe, request, arguments.runs)
    for stage in ("step", "decode"):
        seconds, share = measured[stage], measured["shares"][stage]
        median, least, greatest = seconds.values()
        print(f"{stage}: {median:.4f} s ({least:.4f} to {greatest:.4f}), {share:.0%} of a matrix product's rate")
    record.finish({**about("step", arguments, pipe, request), **measured}, arguments.out)


def measure(pipe: Cosmos3Pipeline, request: Request, runs: int) -> dict[str, Any]:
    """Seconds of a step (the mean of a request's) and of a decode, and their share of what the devices can do."""
    with record.compiling() as compiled:
        pipe.run(request, progress=False)
    later = [pipe.run(request, progress=False).seconds for _ in range(runs)]
    steps = request.num_inference_steps or 1
    seconds = {
        "step": record.spread([each["denoise"] / steps for each in later]),
        "decode": record.spread([each["decode"] for each in later]),
    }
    work, rate = flops(pipe, request), product_rate(pipe.dtype) * pipe.mesh.size
    each = {"step": work["step"] / steps, "decode": work["decode"]}
    return {
        **seconds,
        "compiled": compiled,
        "peak_memory": record.peak_memory(),
        "flops": each,
        "matrix_product_rate": rate,
        "shares": {stage: each[stage] / seconds[stage]["median"] / rate for stage in each},
    }


if __name__ == "__main__":
    main()

"""The work of a request, counted, and the least time that it can take: no GPU and no weights are needed.

    python -m benchmarks.roofline --model nano [--num-frames 189 --height 720 --width 1280] [--cfg 1 --tp 1] [--gpu H200]

Of every stage: FLOPs of matrix products and convolutions, bytes that have to be read (weights and inputs, once) and sent,
and which of the two bounds it on a GPU at the peaks of cosmos3_jax/gpus.py. A stage is bound by its arithmetic if it has more
FLOPs for each byte than the GPU.
"""

import argparse
from typing import Any

from benchmarks import models, record
from cosmos3_jax.checkpoint import Checkpoint
from cosmos3_jax.config import UNIPC
from cosmos3_jax.estimate import TEXT_TOKENS, Estimate, Job, estimate, virtual_devices, work
from cosmos3_jax.gpus import GPU, GPUS
from cosmos3_jax.request import resolve


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_flags(parser, model="nano")
    models.add_frame_flags(parser)
    parser.add_argument("--gpu", choices=[gpu.name for gpu in GPUS], default="H200")
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS, help=f"of each branch ({TEXT_TOKENS})")
    parser.add_argument("--flops", action="store_true", help="FLOPs alone, which needs no compiling")
    arguments = parser.parse_args()
    virtual_devices(max(1, arguments.cfg * arguments.tp))
    job = job_of(arguments)
    mesh = {"cfg": arguments.cfg, "tp": arguments.tp}
    if arguments.flops:
        record.finish({"kind": "flops", "mesh": mesh, "flops": work(job, **mesh)}, arguments.out)
        return
    counted, gpu = estimate(job, **mesh), next(gpu for gpu in GPUS if gpu.name == arguments.gpu)
    print(table(counted, gpu))
    about = {"kind": "roofline", "model": arguments.checkpoint or arguments.model, "mesh": mesh, "gpu": gpu.name}
    record.finish({**about, "stages": rows(counted, gpu)}, arguments.out)


def job_of(arguments: argparse.Namespace) -> Job:
    """What the flags ask for, as the dry run takes it."""
    if arguments.checkpoint:
        transformer, vae, scheduler, _ = Checkpoint.open(arguments.checkpoint, weights=False).configs
    else:
        transformer, vae, scheduler = *models.MODELS[arguments.model], UNIPC
    request = resolve(models.request(arguments), transformer, vae, scheduler, None)
    return Job(transformer, vae, request, arguments.dtype or "bfloat16", arguments.text_tokens)


def rows(e: Estimate, gpu: GPU) -> list[dict[str, Any]]:
    """Of every stage, all its runs: FLOPs of all devices, bytes of one, and seconds on `gpu`."""
    found = []
    for stage in e.stages:
        flops, nbytes = stage.runs * stage.flops, stage.runs * (stage.weights + stage.inputs)
        of_one = flops / (e.cfg * e.tp)
        arithmetic, memory = of_one / getattr(gpu, e.dtype), nbytes / gpu.bandwidth
        found.append(
            {
                "stage": stage.name,
                "runs": stage.runs,
                "flops": flops,
                "bytes": nbytes,
                "sent": stage.sent,
                "flops_per_byte": of_one / nbytes,
                "bound": "arithmetic" if arithmetic > memory else "memory",
                "seconds": max(arithmetic, memory),
                "link_seconds": stage.sent / gpu.link,
            }
        )
    return found


def table(e: Estimate, gpu: GPU) -> str:
    """The same as Markdown."""
    lines = [
        f"| stage | TFLOP | GB read by a device | GB sent | FLOP a byte | bound by | s on {gpu.name} | s of links |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(e, gpu):
        cells = [
            f"{row['stage']} x {row['runs']}",
            *(f"{row[key] / unit:.4g}" for key, unit in (("flops", 1e12), ("bytes", 1e9), ("sent", 1e9))),
            f"{row['flops_per_byte']:.3g}",
            row["bound"],
            *(f"{row[key]:.3g}" for key in ("seconds", "link_seconds")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""`--dry-run` in words: what a request needs on a mesh and on all meshes of one host, as Markdown tables and as JSON."""

from collections.abc import Sequence
from typing import Any

from cosmos3_jax.cost import KINDS
from cosmos3_jax.estimate import Estimate, Job, Stage, estimate
from cosmos3_jax.gpus import GPU, GPUS

MESHES = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8))  # (cfg, tp) of one host
NAMES = [gpu.name for gpu in GPUS]


def dry_run(job: Job, cfg: int, tp: int) -> tuple[str, dict[str, Any]]:
    """The tables, and what they say as JSON. Raises InputError if the model cannot be divided so."""
    chosen = estimate(job, cfg, tp)
    possible = [mesh for mesh in MESHES if mesh[1] in job.transformer.tensor_parallel_sizes()]
    meshes = [chosen if mesh == (cfg, tp) else estimate(job, *mesh) for mesh in possible]
    tables = _memory(chosen), _collectives(chosen), _time(chosen), _meshes(meshes)
    json = {"chosen": _json(chosen), "meshes": [_json(each) for each in meshes]}
    return "\n\n".join([_title(job, chosen), *tables]), json


def _title(job: Job, e: Estimate) -> str:
    request = job.request
    sound = " with sound" if request.enable_sound else ""
    what = f"{request.num_frames} frame(s) of {request.height}x{request.width}{sound}, {request.num_inference_steps} steps"
    return f"{what}, {job.dtype}, {job.text_tokens} text tokens a branch, on cfg={e.cfg} tp={e.tp}"


def _memory(e: Estimate) -> str:
    def peaks(stage: Stage) -> tuple[int, int]:
        return e.peak(stage), e.peak(stage, keep=False)

    rows = [
        [stage.name, *map(_gigabytes, (stage.weights, stage.inputs, stage.results, stage.scratch, *peaks(stage)))]
        for stage in e.stages
    ]
    note = f"Keep: all weights, {_gigabytes(e.weights)} GB, stay loaded. Drop: those that the stage needs (--text-tower)."
    return _table(["GB on each device", "weights", "inputs", "results", "scratch", "keep", "drop"], rows) + "\n\n" + note


def _collectives(e: Estimate) -> str:
    kinds = [kind for kind in KINDS if any(stage.collected(kind)[0] for stage in e.stages)]
    if not kinds:
        return "No collectives."

    def cell(stage: Stage, kind: str) -> str:
        count, nbytes = stage.collected(kind)
        return f"{count}, {_gigabytes(nbytes)} GB" if count else "-"

    return _table(["collectives of one run", *kinds], [[s.name, *(cell(s, kind) for kind in kinds)] for s in e.stages])


def _time(e: Estimate) -> str:
    rows = [
        [f"{s.name} x {s.runs}", _short(s.runs * s.flops / 1e15), *(_short(e.seconds(s, gpu)) for gpu in GPUS)]
        for s in e.stages
    ]
    flops = sum(s.runs * s.flops for s in e.stages)
    rows.append(["all", _short(flops / 1e15), *(_short(e.total_seconds(gpu)) for gpu in GPUS)])
    rows.append(["links, nothing overlapped", "", *(_short(e.link_seconds(gpu)) for gpu in GPUS)])
    return _table(["seconds at least", "PFLOP", *NAMES], rows)


def _meshes(estimates: Sequence[Estimate]) -> str:
    def cell(e: Estimate, gpu: GPU) -> str:
        mark = {"yes": "", "drop": "+", "tight": "*", "tight drop": "*+"}
        return f"{_short(e.total_seconds(gpu))} s{mark[e.fits(gpu)]}" if e.fits(gpu) in mark else "no"

    rows = [
        [f"--cfg {e.cfg} --tp {e.tp}", *map(_gigabytes, (e.highest(), e.highest(keep=False))), *(cell(e, gpu) for gpu in GPUS)]
        for e in estimates
    ]
    notes = (
        "no: does not fit. +: with --text-tower drop or host. *: above the 75 % of the memory that JAX takes; try "
        "XLA_PYTHON_CLIENT_MEM_FRACTION=.95."
    )
    return _table(["mesh", "keep GB", "drop GB", *NAMES], rows) + "\n\n" + notes


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _gigabytes(nbytes: int) -> str:
    return "0" if nbytes < 1e3 else _short(nbytes / 1e9)


def _short(number: float) -> str:
    """Three digits that count."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _json(e: Estimate) -> dict[str, Any]:
    stages = {
        s.name: {
            "runs": s.runs,
            "flops": s.flops,
            "bytes": {
                "weights": s.weights,
                "inputs": s.inputs,
                "results": s.results,
                "scratch": s.scratch,
                "peak": e.peak(s),
                "peak_dropped": e.peak(s, keep=False),
            },
            "collectives": {
                kind: dict(zip(("count", "bytes"), s.collected(kind), strict=True)) for kind in KINDS if s.collected(kind)[0]
            },
        }
        for s in e.stages
    }
    gpus = {
        gpu.name: {"fits": e.fits(gpu), "seconds": e.total_seconds(gpu), "link_seconds": e.link_seconds(gpu)} for gpu in GPUS
    }
    peaks = {"peak": e.highest(), "peak_dropped": e.highest(keep=False)}
    return {"cfg": e.cfg, "tp": e.tp, "weights": e.weights, **peaks, "stages": stages, "gpus": gpus}

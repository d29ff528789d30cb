"""Everything that is decided by measuring on a GPU, in one command of at most eight minutes.

    python -m benchmarks.gpu_suite [--budget 460] [--out-dir benchmarks/results] [--model nano] [--parts peaks,attention]

The parts (gpu/parts.py) run in the order of what they are worth. Each prints a table and leaves a record,
gpu-<part>-<device>.json; a part that fails is recorded with its error, one for which too little time is left is skipped. The
last line is JSON: of every part its file, or what became of it. Without a GPU the same code runs at small sizes.

Parts run in a process of their own, which hands over row by row what it measures. It outlives a part, so that JAX starts and
weights are drawn once; where a part hangs, crashes or leaves a GPU that no longer computes, it is replaced, and what was
measured until then is kept. A part that shares the GPU with another library gets a process with an environment of its own.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import models, record
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.setting import Part, Row, Setting, first_line
from cosmos3_jax.gpus import named

BUDGET = 460  # seconds; a GPU that is lent for ten minutes also has to be reached
PATIENCE = 5  # seconds that a process has to end by itself
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds in all ({BUDGET})")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    parser.add_argument("--model", choices=models.MODELS, help="(nano on GPUs, else tiny)")
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"some of {','.join(PARTS)} (all)")
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.parts, arguments.model, arguments.budget, arguments.out_dir)))


def _parts(names: str) -> dict[str, Part]:
    unknown = sorted(set(names.split(",")) - PARTS.keys())
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    return {name: PARTS[name] for name in names.split(",")}


def run(parts: Mapping[str, Part], model: str | None, budget: float, out_dir: Path) -> dict[str, Any]:
    """Runs the parts within `budget` seconds: of each its file, or why there is none or only some of it."""
    start = time.time()
    crew, outcome = Crew(model), {}
    with contextlib.closing(crew):
        for name, later in _with_later(parts):
            part, now, end = parts[name], time.time(), start + budget
            if end - now < part.seconds:
                outcome[name] = f"skipped: it takes {part.seconds} s, {max(0, end - now):.0f} s are left"
                print(f"\n## {name}\n\n{outcome[name]}", flush=True)
                continue
            # What earlier parts did not need is there for this one, but not what later ones will.
            deadline = max(now + part.seconds, end - sum(parts[other].seconds for other in later))
            rows, error = crew.measure(part, deadline, min(end, deadline + part.seconds / 2))
            took = round(time.time() - now, 1)
            print(f"\n## {name}: {took} s\n\n{table(rows)}{f'Error: {error}' if error else ''}", flush=True)
            file = out_dir / f"gpu-{name}-{crew.device}.json"
            about = {"kind": f"gpu_suite: {name}", "model": crew.model, "seconds": took, "error": error}
            record.write({**about, "rows": rows, **crew.surroundings}, file)
            outcome[name] = f"error: {error}" if error else str(file)
    return {"device": crew.device, "model": crew.model, "seconds": round(time.time() - start, 1), "parts": outcome}


def _with_later(parts: Mapping[str, Part]) -> Iterator[tuple[str, Sequence[str]]]:
    names = list(parts)
    for i, name in enumerate(names):
        yield name, names[i + 1 :]


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown, with a column for each name in any of them."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


class LostError(Exception):
    """The process that measured is gone, or had to be ended."""


class Crew:
    """The process that measures, replaced whenever it is lost. This one never touches the device."""

    def __init__(self, model: str | None):
        self.model, self.device = model, "unknown"
        self.surroundings: dict[str, Any] = {}
        self.worker: Worker | None = None

    def measure(self, part: Part, deadline: float, end: float) -> tuple[list[Row], str | None]:
        """The rows of a part, and what stopped it before its end, if anything did.

        Past `deadline` a part begins nothing more; at `end` (both in the clock's seconds) it is stopped.
        """
        rows: list[Row] = []
        try:
            worker = self._worker(part, end)
            worker.send((part, Setting(self.model or "tiny", deadline)))
            while True:
                kind, value = worker.receive(end)
                if kind != "row":
                    break
                rows.append(value)
            error, healthy = value
        except LostError as lost:
            error, healthy = str(lost), False
            if self.worker is not None:
                self.worker.process.kill()
        if not healthy:
            self.close()
        return rows, error

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def _worker(self, part: Part, end: float) -> "Worker":
        if self.worker is not None and self.worker.environment != part.environment:
            self.close()
        if self.worker is None:
            self.worker = Worker(part.environment)
            _, self.surroundings = self.worker.receive(end)
            hardware = self.surroundings["hardware"]
            self.device = _short(hardware["devices"])
            self.model = self.model or ("nano" if hardware["platform"] == "gpu" else "tiny")
        return self.worker


def _short(devices: str) -> str:
    """The name of a GPU that is known, else what JAX calls the device, as part of a file name."""
    gpu = named(devices)
    name = gpu.name if gpu else devices.partition(" x ")[2]
    return re.sub(r"\W+", "-", name.lower()).strip("-")


class Worker:
    """A process that measures parts, and the pipe to it."""

    def __init__(self, environment: Mapping[str, str]):
        spawn = multiprocessing.get_context("spawn")  # a fork would share what JAX has of the GPU
        self.environment = environment
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs,), daemon=True)
        with mock.patch.dict(os.environ, environment):
            self.process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        """Raises LostError if the process is gone."""
        try:
            self.pipe.send(message)
        except OSError:
            raise self._lost() from None

    def receive(self, end: float) -> tuple[str, Any]:
        """The next message. Raises LostError if there is none until `end`, or the process is gone."""
        if not self.pipe.poll(max(0.0, end - time.time())):
            raise LostError("stopped: its time was up")
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None

    def _lost(self) -> LostError:
        self.process.join(PATIENCE)
        return LostError(f"its process ended with exit code {self.process.exitcode}")

    def close(self) -> None:
        """Ends the process, by force if it hangs."""
        self.pipe.close()  # what it waits for, if it does
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()


def serve(pipe: Connection) -> None:
    """The process that measures: sends its surroundings, then for each part that comes its rows and (error, healthy)."""
    from cosmos3_jax.compilation_cache import use_compilation_cache

    use_compilation_cache()  # a process that replaces this one loads what this one compiled
    pipe.send(("ready", record.surroundings()))
    with contextlib.suppress(EOFError):
        while True:
            part, setting = pipe.recv()
            error = None
            try:
                for row in part.run(setting):
                    pipe.send(("row", finite(row)))
            except (Exception, SystemExit) as exception:
                error = first_line(exception)
            pipe.send(("done", (error, computes())))


def finite(row: Row) -> Row:
    """A row as JSON allows it: numbers that are not finite as words."""
    return {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}


def computes() -> bool:
    """Whether the device still does: after a kernel that read where it must not, a CUDA process can do nothing more."""
    import jax
    import jax.numpy as jnp

    try:
        return float(jax.jit(jnp.sum)(jnp.ones(8))) == 8
    except jax.errors.JaxRuntimeError:
        return False


if __name__ == "__main__":
    main()

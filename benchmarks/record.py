"""Times, and the record of a measurement: what was measured, on what, when, with which versions."""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("cosmos3_jax", "jax", "jaxlib", "flax", "numpy", "torch", "diffusers", "jax-cuda12-plugin", "jax-cuda13-plugin")
COMPILING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest, to a tenth of a millisecond."""
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "greatest": round(max(values), 4),
    }


def difference(latents: np.ndarray, expected: np.ndarray) -> float:
    """The root mean square difference, over the deviation of what is expected."""
    return float(np.sqrt(np.mean((latents - expected) ** 2)) / expected.std())


def times(run: Callable[[], Any], count: int, *, warm_up: int = 1) -> list[float]:
    """Seconds of each of `count` calls; what a call returns must be ready when it returns."""
    for _ in range(warm_up):
        run()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def compiling() -> Iterator[dict[str, float]]:
    """Counts the programs that JAX compiles (or loads from its cache) meanwhile, and the seconds that this takes."""
    import jax

    total = {"programs": 0, "from_cache": 0, "seconds": 0.0}

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith(COMPILING):
            total["seconds"] += duration_secs
            total["programs"] += event.endswith("backend_compile_duration")

    def on_event(event: str, **_: Any) -> None:
        total["from_cache"] += event.endswith("cache_hits")

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield total
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)
        total["seconds"] = round(total["seconds"], 3)


def peak_memory() -> dict[str, int]:
    """The most bytes that were in use so far: of the fullest device, and of this process in host memory."""
    import resource

    import jax

    on_devices = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return {"device": max(on_devices), "host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def surroundings() -> dict[str, Any]:
    """The machine, the versions and the date."""
    import jax

    devices = jax.devices()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "hardware": {
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "platform": devices[0].platform,
            "host": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        },
        "python": platform.python_version(),
        "versions": versions,
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION") if name in os.environ},
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return models[0] if models else platform.machine()


def finish(record: dict[str, Any], out: Path | None) -> None:
    """Prints the record as one line of JSON, the last, and writes it to `out`."""
    record = {**record, **surroundings()}
    if out is not None:
        write(record, out)
    print(json.dumps(record))


def write(record: dict[str, Any], out: Path) -> None:
    """Writes a record, whose surroundings are in it, as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

"""How long a newcomer waits for a first video: all of `python -m cosmos3_jax.generate`, by the clock of who started it.

    python -m benchmarks.first_video [--runs 3] [--out FILE.json]

The built-in checkpoint on whatever device there is. In turns: without the cache of compiled programs, cold (with an empty
one) and warm (with what the cold one left there). An untimed process goes first, so that Python's own files are in memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record

WAYS = {  # and the flags of each
    "without_cache": ["--no-compilation-cache"],
    "cold": [],
    "warm": [],
}
# JAX's own settings, which would come before the folder that is measured.
CACHE_SETTINGS = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each way (3)")
    parser.add_argument("--out", type=Path, help="the whole record, as JSON")
    arguments = parser.parse_args()
    measured = measure(arguments.runs)
    for way in WAYS:
        median, least, greatest = measured[way].values()
        print(f"{way.replace('_', ' ')}: {median:.2f} s ({least:.2f} to {greatest:.2f})")
    record.finish({"kind": "first_video", "command": command(Path("ball.mp4"))[1:], **measured}, arguments.out)


def command(video: Path) -> list[str]:
    """What a newcomer types."""
    return [sys.executable, "-m", "cosmos3_jax.generate", "--prompt", "a red ball rolls to the right", "--out", str(video)]


def measure(runs: int, command: Callable[[Path], list[str]] = command) -> dict[str, Any]:
    """Seconds of whole processes, each way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for run in range(1 + runs):
        with tempfile.TemporaryDirectory() as scratch:
            for way, flags in WAYS.items() if run else [("cold", [])]:
                video = Path(scratch) / f"{way}.mp4"
                taken = timed([*command(video), *flags], Path(scratch) / "cache")
                if not video.is_file():
                    raise SystemExit(f"{' '.join(command(video))}: no video was written")
                if run:
                    seconds[way].append(taken)
    return {way: record.spread(values) for way, values in seconds.items()}


def timed(arguments: list[str], cache: Path) -> float:
    """Seconds of a process that keeps what it compiles under `cache`."""
    environment = {name: value for name, value in os.environ.items() if name not in CACHE_SETTINGS}
    start = time.perf_counter()
    done = subprocess.run(arguments, env=environment | {"XDG_CACHE_HOME": str(cache)}, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}")
    return seconds


if __name__ == "__main__":
    main()

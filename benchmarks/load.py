"""How fast a checkpoint comes to the devices, and how much host memory it takes on the way, by the system's own account.

    python benchmarks/load.py CHECKPOINT [--cfg 2] [--tp 4] [--runs 3] [--cold] [--out FILE.json]

Each way of loading runs in a process of its own: `safetensors.flax.load_file` and `jax.device_put`, tensor by tensor (what one
would write without this package); `Cosmos3Pipeline.from_pretrained` on the folder; and on what `python -m convert` made of it.
On a machine without GPUs the mesh is of virtual CPU devices, and what they hold is host memory too: "extra" is what the peak
was above what stayed in the end.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = {
    "load_file": "load_file + device_put",
    "streaming": "from_pretrained, published folder",
    "converted": "from_pretrained, converted folder",
}
PACKAGES = ("jax", "flax", "safetensors", "orbax-checkpoint", "numpy")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a published folder, as synthetic_checkpoint.py writes")
    add("--cfg", type=int, default=2)
    add("--tp", type=int, default=4)
    add("--runs", type=int, default=3, help="of each way; the table has the median (3)")
    add("--cold", action="store_true", help="have the files read from the disk, not from the system's cache")
    add("--out", type=Path, help="the record, as JSON")
    add("--way", choices=WAYS, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.way is not None:
        print(json.dumps(measure(arguments.way, arguments.checkpoint, arguments.cfg, arguments.tp)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.checkpoint.absolute().parent) as scratch:
        converted = Path(scratch) / "converted"
        run([sys.executable, "-m", "convert", str(arguments.checkpoint), str(converted)])
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.runs):
            for way, results in runs.items():
                folder = converted if way == "converted" else arguments.checkpoint
                if arguments.cold:
                    forget(folder)
                else:
                    remember(folder)
                command = [sys.executable, __file__, str(folder), "--way", way]
                command += ["--cfg", str(arguments.cfg), "--tp", str(arguments.tp)]
                results.append(json.loads(run(command, devices=arguments.cfg * arguments.tp)))
    print(table(runs))
    record = {
        "checkpoint": str(arguments.checkpoint),
        "mesh": {"cfg": arguments.cfg, "tp": arguments.tp},
        "cold": arguments.cold,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
        "runs": runs,
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


def measure(way: str, folder: Path, cfg: int, tp: int) -> dict[str, float]:
    """Seconds and bytes of one way of loading, in this process."""
    import jax

    from cosmos3_jax import make_mesh

    mesh = make_mesh(cfg, tp)
    for device in mesh.devices.flat:  # what a device takes for itself is not counted
        jax.block_until_ready(jax.device_put(0.0, device))
    before, start = resident("VmRSS"), time.perf_counter()
    held = {"load_file": load_file}.get(way, from_pretrained)(folder, mesh)
    seconds = time.perf_counter() - start
    gc.collect()
    arrays = jax.tree.leaves(held)
    return {
        "seconds": seconds,
        "peak": resident("VmHWM") - before,
        "after": resident("VmRSS") - before,
        "weights": sum(array.nbytes for array in arrays),
        "on_devices": sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards),
    }


def from_pretrained(folder: Path, mesh: Any) -> Any:
    """All networks of a pipeline."""
    from cosmos3_jax import Cosmos3Pipeline

    pipe = Cosmos3Pipeline.from_pretrained(
        folder, mesh=mesh, dtype="bfloat16", text_tower="keep", safety_checker=False, progress=False
    )
    return pipe.residence.on_devices


def load_file(folder: Path, mesh: Any) -> Any:
    """The same tensors, each as its file has it, divided over the mesh in the same way; one file after the other."""
    import jax
    from safetensors.flax import load_file

    from cosmos3_jax.checkpoint import Checkpoint
    from cosmos3_jax.networks import abstract_networks
    from cosmos3_jax.published import FOLDER_OF, names_of
    from cosmos3_jax.weights import by_path, is_stacked

    checkpoint = Checkpoint.open(folder)
    placement: dict[tuple[str, str], tuple[Any, tuple[int, ...]]] = {}
    for part, network in abstract_networks(checkpoint.transformer, checkpoint.vae, mesh, "bfloat16").by_name().items():
        names = names_of(part, network, checkpoint.transformer)
        for path, w in by_path(network.weights).items():
            whole, shape = w.get_value().sharding, w.shape
            if is_stacked(w):
                spec = jax.sharding.PartitionSpec(*whole.spec[1:])
                whole, shape = jax.sharding.NamedSharding(mesh, spec), shape[1:]
            placement |= {(FOLDER_OF[part], name): (whole, shape if w.dims else w.file_shape) for name in names[path]}
    held = []
    for name in ("transformer", "vae"):
        for file in sorted((folder / name).glob("*.safetensors")):
            tensors = load_file(file)
            for tensor in list(tensors):
                array = tensors.pop(tensor)
                if (name, tensor) in placement:
                    where, shape = placement[name, tensor]
                    held.append(jax.block_until_ready(jax.device_put(array.reshape(shape), where)))
                del array
    return held


def resident(line: str) -> int:
    """Bytes of this process's memory, now ("VmRSS") or at most so far ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(each.split()[1] for each in status.splitlines() if each.startswith(line)))


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """The medians, as Markdown."""
    lines = [
        "| way of loading | seconds (median, spread) | GB of weights | GB at most | GB in the end | extra |",
        "|---|---|---|---|---|---|",
    ]
    for way, results in runs.items():
        middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
        seconds = [result["seconds"] for result in results]
        cells = [
            WAYS[way],
            f"{middle['seconds']:.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            *(f"{middle[key] / 1e9:.2f}" for key in ("weights", "peak", "after")),
            f"{statistics.median(result['peak'] - result['after'] for result in results) / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def files(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [file for file in folder.rglob("*") if file.is_file()]


def forget(folder: Path) -> None:
    """Has the system drop what it keeps of these files in memory."""
    for file in files(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Has the system keep these files in memory, as far as there is room."""
    for file in files(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def run(command: list[str], devices: int = 1) -> str:
    """The last line that a command prints."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()

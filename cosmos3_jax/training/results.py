"""What training leaves: a folder in the published layout, or a file of adapters."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from cosmos3_jax.checkpoint import Checkpoint, Weights
from cosmos3_jax.conversion import Source, publish
from cosmos3_jax.lora import Adapter
from cosmos3_jax.lora_files import write_adapters
from cosmos3_jax.processes import is_first
from cosmos3_jax.training.trained import Values
from cosmos3_jax.weights import Network


@dataclasses.dataclass(frozen=True)
class Replaced:
    """The weights of a folder, but those that were trained."""

    weights: Weights
    values: Values

    def audit(self, networks: Mapping[str, Network]) -> list[str]:
        return self.weights.audit(networks)

    def dtypes(self, part: str, network: Network) -> dict[str, np.dtype]:
        return self.weights.dtypes(part, network)

    def beside(self, store: str) -> dict[str, tuple[int, ...]]:
        return self.weights.beside(store)

    def arrays(self, store: str) -> Iterator[tuple[str, np.ndarray]]:
        return self.weights.arrays(store)

    def read(self, part: str, network: Network, on_bytes: Callable[[int], object]) -> Iterator[tuple[str, jax.Array]]:
        trained = self.values.get(part, {})
        for path, array in self.weights.read(part, network, on_bytes):
            yield path, trained[path].astype(array.dtype) if path in trained else array


def whole(x: jax.Array) -> np.ndarray:
    """An array that is divided over devices, of other processes too."""
    if not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def write_lora(
    file: Path, networks: Mapping[str, Network], base: Checkpoint, adapters: Mapping[str, Mapping[str, Adapter]]
) -> None:
    """Writes a file of adapters, for networks that may be abstract, in the place of an earlier one. Every process calls it."""
    adapters = jax.tree.map(whole, adapters)
    if is_first():
        write_adapters(file, adapters, networks, base.transformer)


def write_folder(folder: Path, base: Checkpoint, values: Values) -> None:
    """Writes a folder in the published layout, in the place of an earlier one: `base` with the weights that were trained.

    They are in the dtypes of `base`. Every process calls it, and the first one writes.
    """
    values = {part: {path: whole(x) for path, x in of.items()} for part, of in values.items()}
    if not is_first():
        return
    source = Source.open(base.folder)
    source = dataclasses.replace(source, weights=Replaced(source.weights, values))
    before = folder.with_name(f".{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    publish(source, folder)
    shutil.rmtree(before, ignore_errors=True)

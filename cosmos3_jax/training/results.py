"""What training leaves: a folder in the published layout, or a file of adapters."""

import collections
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cosmos3_jax.checkpoint import Checkpoint, Weights
from cosmos3_jax.conversion import Source, publish
from cosmos3_jax.errors import InputError, RunError
from cosmos3_jax.folder import writing
from cosmos3_jax.lora import Adapter
from cosmos3_jax.lora_files import write_adapters
from cosmos3_jax.processes import is_first, wait
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

    def read(self, part: str, network: Network, on_bytes: Callable[[int], object]) -> Iterator[tuple[str, Any]]:
        trained = self.values.get(part, {})
        for path, array in self.weights.read(part, network, on_bytes):
            yield path, whole(trained[path]).astype(array.dtype) if path in trained else array


def whole(x: jax.Array) -> np.ndarray:
    """An array that is divided over devices, of other processes too: these must then ask for it in the same order."""
    if not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def write_lora(
    file: Path, networks: Mapping[str, Network], base: Checkpoint, adapters: Mapping[str, Mapping[str, Adapter]]
) -> None:
    """Writes a file of adapters, for networks that may be abstract, in the place of an earlier one.

    Every process calls it, and the first one writes. Raises RunError where it cannot.
    """
    adapters = jax.tree.map(whole, adapters)
    if is_first():
        write_adapters(file, adapters, networks, base.transformer)
    wait()


def write_folder(folder: Path, base: Source, values: Values) -> None:
    """Writes a folder in the published layout, in the place of an earlier one: `base` with the weights that were trained.

    They are in the dtypes of `base`. Every process calls it, and the first one writes. Raises RunError where it cannot.
    """
    source = dataclasses.replace(base, weights=Replaced(base.weights, values))
    if is_first():
        new, before = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "before"))
        for left in (new, before):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            publish(source, new)
        except InputError as error:  # which it is where nothing comes before
            raise RunError(str(error)) from error
        with writing(folder):
            if folder.exists():
                folder.rename(before)
            new.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    else:
        for part in source.networks:  # the first has not all of what was trained
            collections.deque(source.read(part), maxlen=0)
    wait()

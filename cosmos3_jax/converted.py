"""Our own layout, as `python -m convert` writes it: the published JSON and tokenizer, and the weights as they are used.

| in the folder            | |
|---|---|
| cosmos3_jax.json         | what this is, which stores there are, the dtype, if one was chosen, and what they were made of |
| weights/und, gen, vae    | a store (array_store.py) for each network: its weights by their path, layers stacked |
| weights/unused           | tensors of the transformer that nothing reads, by published name, so that nothing is lost |
| weights/sound_tokenizer  | all of the sound tokenizer's, likewise: decoder and encoder, and both parts of weight norms |
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from cosmos3_jax import array_store
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.errors import InputError
from cosmos3_jax.folder import check_files, read_json, within
from cosmos3_jax.published import (
    SOUND_PREFIX,
    arrange,
    check_sound_encoder,
    file_shapes,
    names_of,
    scales,
    unused_of_sound,
    unused_tensors,
)
from cosmos3_jax.weights import Index, Network, Weight, audit, by_path, copy, place_weight

MARK = "cosmos3_jax.json"
FORMAT = 3
KINDS = ("float32", "float16", "bfloat16")
STORES = ("und", "gen", "vae", "unused", "sound_tokenizer")
# network -> where its arrays are
STORE_OF = {"und": "und", "gen": "gen", "vae": "vae", "sound": "sound_tokenizer", "sound_encoder": "sound_tokenizer"}


class ConvertedWeights:
    """The weights in a folder of our own. Raises InputError for a mark that this version does not understand."""

    def __init__(self, folder: Path, config: TransformerConfig):
        about = read_json(folder / MARK)
        self.folder, self.config, self.dtype = folder, config, about.get("dtype")
        self.stores: list[str] = about.get("stores", [])
        self._contents: dict[str, array_store.Contents] = {}
        if about.get("format") != FORMAT:
            raise InputError(
                f"{folder / MARK}: format {about.get('format')!r}, but this version reads {FORMAT}; convert it again"
            )
        if not isinstance(self.stores, list) or not self.stores or not all(store in STORES for store in self.stores):
            raise InputError(f"{folder / MARK}: stores={self.stores!r} should be some of {', '.join(STORES)}; convert it again")
        self._fingerprints = about.get("fingerprints", {})  # older folders have none
        if self.dtype not in (None, *KINDS):
            raise InputError(f"{folder / MARK}: dtype={self.dtype!r} should be null or one of {', '.join(KINDS)}")

    def contents(self, store: str) -> array_store.Contents:
        """Shape and dtype of every array of a store; none if the folder does not have it."""
        if store in self.stores and store not in self._contents:
            folder = within(self.folder, self.folder / "weights" / store)
            check_files(self.folder, folder)
            self._contents[store] = array_store.contents(folder)
        return self._contents.get(store, {})

    def fingerprint(self, folder: str) -> str:
        """That of the published folder which the weights were made of, and the dtype that was chosen for them, if any."""
        found = self._fingerprints.get(folder) if isinstance(self._fingerprints, dict) else None
        return f"{found} {self.dtype or ''}".strip()

    def arrays(self, store: str) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays of `beside`, in the order of their names, as they are stored."""
        return self._arrays(store, sorted(self.contents(store)))

    def beside(self, store: str) -> dict[str, tuple[int, ...]]:
        """Shapes of what is in "unused" or "sound_tokenizer", by name; none if it is not there."""
        return {name: shape for name, (shape, _) in self.contents(store).items()}

    def dtypes(self, part: str, network: Network) -> dict[str, np.dtype]:
        """The dtype in which each weight is stored, by its path."""
        return {path: dtype for path, (_, dtype) in self.contents(part).items()}

    def audit(self, networks: Mapping[str, Network]) -> list[str]:
        """What keeps `networks` ("und", "gen", "vae", "sound", "sound_encoder") from being read, a line each.

        Raises InputError where the sound encoder is asked for and there is none.
        """
        absent = [part for part in networks if STORE_OF[part] not in self.stores]
        lines = [f"{part}: not in this folder, which was made with --only; convert all of it" for part in absent]
        wanted: dict[str, dict[str, tuple[int, ...]]] = {}
        for part, network in networks.items():
            if part not in absent:
                wanted.setdefault(STORE_OF[part], {}).update(self._expected(part, network))
        for store in self.stores:  # that all can be read; the sound tokenizer, if it is to be
            if store != STORE_OF["sound"] or store in wanted:
                self.contents(store)
        strange = self.contents("unused").keys() - unused_tensors(self.config).keys()
        lines += [f"unused: unexpected: {name}" for name in sorted(strange)]
        for store, expected in wanted.items():
            found = self.contents(store)
            if store == STORE_OF["sound_encoder"] and "sound_encoder" in networks:
                check_sound_encoder(self.folder, found)
            unused = unused_of_sound(found, networks) if store == STORE_OF["sound"] else ()
            faults = audit(expected, {name: shape for name, (shape, _) in found.items()}, unused)
            odd = [f"odd kind: {name} is {dtype}" for name, (_, dtype) in sorted(found.items()) if dtype.name not in KINDS]
            lines += [f"{store}: {line}" for line in faults + odd]
        return lines

    def _expected(self, part: str, network: Network) -> dict[str, tuple[int, ...]]:
        """Shapes by name of what must be stored for a network."""
        if part in SOUND_PREFIX:
            return file_shapes(network, names_of(part, network, self.config))
        return {path: w.shape for path, w in _stored(network).items()}

    def read(self, part: str, network: Network, on_bytes: Callable[[int], object]) -> Iterator[tuple[str, jax.Array]]:
        """Each weight of an abstract network, cast and placed on its devices, one after the other, by its path.

        Host memory holds one weight at a time. `on_bytes` is told how many more bytes are there.
        """
        weights = by_path(network.weights)
        for path in weights.keys() - _stored(network).keys():
            yield path, place_weight(weights[path], lambda buffer, index: None)
        for path, array in self._sound(part, network) if part in SOUND_PREFIX else self._arrays(part, _stored(network)):

            def fill(buffer: np.ndarray, index: Index, array: np.ndarray = array) -> None:
                copy(buffer, array[index])
                on_bytes(buffer.nbytes)

            yield path, place_weight(weights[path], fill)

    def _arrays(self, store: str, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return array_store.read(self.folder / "weights" / store, self.contents(store), names)

    def _sound(self, part: str, network: Network) -> Iterator[tuple[str, np.ndarray]]:
        """The weights of the sound decoder or encoder by their path, from the published tensors."""
        weights, names = by_path(network.weights), names_of(part, network, self.config)
        path_of = {name: path for path, listed in names.items() for name in listed}
        waiting: dict[str, np.ndarray] = {}
        for name, array in self._arrays(STORE_OF[part], sorted(path_of)):
            waiting[name] = array
            path = path_of[name]
            if all(each in waiting for each in names[path]):
                v, *g = (waiting.pop(each) for each in names[path])
                arranged = arrange(v, weights[path])
                yield path, arranged * scales(v, *g) if g else arranged


def _stored(network: Network) -> dict[str, Weight]:
    """The weights that hold anything: the layers of a text tower that has but its last one do not."""
    return {path: w for path, w in by_path(network.weights).items() if math.prod(w.shape)}

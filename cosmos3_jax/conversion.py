"""From one layout to the other: published safetensors, and our own (cosmos3_jax/converted.py).

Weights pass through host memory one at a time. A folder is written beside its place, under a hidden name, and put there when
it is whole.
"""

import contextlib
import dataclasses
import itertools
import math
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cosmos3_jax import array_store
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.checkpoint import Checkpoint, Weights
from cosmos3_jax.converted import FORMAT, MARK, STORE_OF, ConvertedWeights
from cosmos3_jax.errors import InputError
from cosmos3_jax.folder import read_json, within, write_json, writing
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.published import disarrange, names_of
from cosmos3_jax.safetensors_files import in_shards, write_tensors
from cosmos3_jax.version import VERSION
from cosmos3_jax.weights import Network, by_path, is_stacked, map_weights, nbytes

STORES = {"transformer": ("und", "gen", "unused"), "vae": ("vae",), "sound_tokenizer": ("sound_tokenizer",)}
# What is copied as it is. The vision encoder and everything else of a repository is not used to generate.
PLAIN = ("model_index.json", "modular_model_index.json", "LICENSE*", "NOTICE*", "assets/*.json", "*/config.json")
PLAIN_FOLDERS = ("scheduler", "text_tokenizer")


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder whose tensors were found to be right, ready to be read on the host."""

    checkpoint: Checkpoint
    weights: Weights
    networks: dict[str, Network]  # abstract, each weight in the dtype that it will have
    stores: list[str]  # what there is to read: of "und", "gen", "vae", "unused" and "sound_tokenizer"
    dtype: str | None

    @classmethod
    def open(cls, path: str | Path, *, dtype: str | None = None, only: Collection[str] | None = None) -> "Source":
        """A folder in either layout; `only` these of its parts. Raises InputError for what is wrong with it.

        Tensors are read on the CPU, which JAX must have been left: InputError also where it was not.
        """
        checkpoint = Checkpoint.open(path, sound=True)
        if only is not None and (not only or set(only) - STORES.keys()):
            raise InputError(f"--only {','.join(only)}: parts are {', '.join(STORES)}")
        wanted = [store for part in (STORES if only is None else only) for store in STORES[part]]
        try:
            mesh = make_mesh(devices=jax.local_devices(backend="cpu")[:1])
        except RuntimeError as error:
            raise InputError("JAX_PLATFORMS names no cpu, where a folder is read and written; add it: cuda,cpu") from error
        every = abstract_networks(checkpoint.transformer, checkpoint.vae, mesh, "float32", checkpoint.sound).by_name()
        weights = checkpoint.audited({part: network for part, network in every.items() if STORE_OF[part] in wanted})
        networks = {part: network for part, network in every.items() if part in wanted}  # the sound tokenizer goes as it is
        beside = [store for store in ("unused", "sound_tokenizer") if store in wanted and weights.beside(store)]
        if only is not None and "sound_tokenizer" in wanted and "sound_tokenizer" not in beside:
            raise InputError(f"--only sound_tokenizer: there is none in {checkpoint.folder}")
        typed = {part: _typed(network, weights.dtypes(part, network), dtype) for part, network in networks.items()}
        return cls(checkpoint, weights, typed, [*typed, *beside], dtype)

    def nbytes(self) -> int:
        """The bytes of everything that there is to read, or a few more."""
        beside = [shape for store in self.stores if store not in self.networks for shape in self.weights.beside(store).values()]
        return sum(map(nbytes, self.networks.values())) + 4 * sum(map(math.prod, beside))

    def read(self, store: str) -> Iterator[tuple[str, np.ndarray]]:
        """Every array of a store by its name, one after the other, in the dtype that it will have."""
        if store in self.networks:
            weights = self.weights.read(store, self.networks[store], lambda nbytes: None)
            yield from ((path, np.asarray(w)) for path, w in weights if w.size)
            return
        cast = self.dtype if store == "unused" else None  # the sound decoder is published, and runs, in float32
        for name, array in self.weights.arrays(store):
            if not array.size:
                raise InputError(f"{self.checkpoint.folder}: {store}: {name} has no values")
            yield name, array.astype(cast or array.dtype, copy=False)


def _typed(network: Network, stored: dict[str, np.dtype], dtype: str | None) -> Network:
    """The abstract network with the dtypes that its weights have in the folder, or `dtype` where that is given."""

    def retype(path: str, w: Any) -> jax.ShapeDtypeStruct:
        kept = dtype is None or w.float32  # what must stay float32 is never rounded
        kind = stored.get(path, w.dtype) if kept else jnp.dtype(dtype)
        return jax.ShapeDtypeStruct(w.shape, kind, sharding=w.get_value().sharding)

    return Network(network.graph, map_weights(retype, network.weights))


def convert(
    src: str | Path, dst: str | Path, *, dtype: str | None = None, only: Collection[str] | None = None, progress: bool = False
) -> Source:
    """Writes our own folder.

    Raises InputError for a folder that cannot be read, or a place that is taken, and RunError where writing fails.
    """
    source = Source.open(src, dtype=dtype, only=only)
    with _whole(Path(dst), source) as folder:
        for store in source.stores:
            array_store.write(folder / "weights" / store, _shown(source, store, progress))
        revision = {"revision": source.checkpoint.revision} if source.checkpoint.revision else {}
        parts = [part for part, stores in STORES.items() if set(stores) & set(source.stores)]
        fingerprints = {part: source.checkpoint.weights.fingerprint(part) for part in parts}
        about = {"format": FORMAT, "version": VERSION, "dtype": dtype, "stores": source.stores, "fingerprints": fingerprints}
        write_json(folder / MARK, about | revision)
    return source


def export(src: str | Path, dst: str | Path, *, dtype: str | None = None, progress: bool = False) -> Source:
    """Writes the published layout, from either. Raises what `convert` does."""
    source = Source.open(src, dtype=dtype)
    publish(source, dst, progress=progress)
    return source


def publish(source: Source, dst: str | Path, *, progress: bool = False) -> None:
    """Writes the published layout. Raises InputError for a place that is taken, and RunError where writing fails."""
    with _whole(Path(dst), source) as folder:
        for name, stores in STORES.items():
            tensors = (tensor for store in stores if store in source.stores for tensor in _tensors(source, store, progress))
            if set(stores) & set(source.stores):
                write_tensors(folder / name, in_shards(tensors))
        index = read_json(folder / "model_index.json")
        there = {key: value for key, value in index.items() if not isinstance(value, list) or (folder / key).is_dir()}
        write_json(folder / "model_index.json", there)  # without the vision encoder: readers look for all that it lists


def _tensors(source: Source, store: str, progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a store by their published names."""
    if store not in source.networks:
        yield from _shown(source, store, progress)
        return
    network = source.networks[store]
    weights, names = by_path(network.weights), names_of(store, network, source.checkpoint.transformer)
    for path, array in _shown(source, store, progress):
        for name, layer in zip(names[path], array if is_stacked(weights[path]) else [array], strict=True):
            yield name, disarrange(layer, weights[path])


def verify(
    src: str | Path, dst: str | Path, *, dtype: str | None = None, only: Collection[str] | None = None, progress: bool = False
) -> dict[str, int]:
    """How many arrays of each store of `dst` are, bit for bit, what conversion makes of `src`: all of them.

    `dtype` and `only` are those of the conversion, or left out. Raises InputError if anything differs.
    """
    made = Checkpoint.open(dst, sound=True).weights
    if not isinstance(made, ConvertedWeights):
        raise InputError(f"{dst}: not a folder that `python -m convert` wrote: no {MARK} there")
    parts = [part for part, stores in STORES.items() if set(stores) & set(made.stores)]
    if dtype not in (None, made.dtype) or (only is not None and set(only) != set(parts)):
        raise InputError(f"{dst}: was made of {', '.join(parts)} with dtype={made.dtype}, not with this --only and --dtype")
    source, found = Source.open(src, dtype=made.dtype, only=parts), Source.open(dst, only=parts)
    counts, wrong = dict.fromkeys(source.stores, 0), []
    for store in source.stores:
        pairs = itertools.zip_longest(_shown(source, store, progress), found.read(store), fillvalue=("none", np.zeros(0)))
        for (name, expected), (found_name, array) in pairs:
            same = name == found_name and expected.dtype == array.dtype and expected.shape == array.shape
            if not same or not np.array_equal(_bits(expected), _bits(array)):
                wrong.append(f"{store}: {name if name == found_name else f'{name} against {found_name}'}")
            counts[store] += 1
    if wrong:
        raise InputError(f"{dst}: differs from {src} in {len(wrong)} of {sum(counts.values())} arrays\n  " + "\n  ".join(wrong))
    return counts


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def _shown(source: Source, store: str, progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    """`source.read(store)`, with a bar of the bytes."""
    total = nbytes(source.networks[store]) if store in source.networks else None
    with tqdm(total=total, desc=store, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, array in source.read(store):
            yield name, array
            bar.update(array.nbytes)


@contextlib.contextmanager
def _whole(dst: Path, source: Source) -> Iterator[Path]:
    """A folder to fill, with the plain files of the source in it, which becomes `dst` if all goes well."""
    if dst.exists():
        raise InputError(f"{dst}: is there already; delete it, or give another place")
    if not dst.absolute().parent.is_dir():
        raise InputError(f"{dst}: there is no folder {dst.absolute().parent}")
    size, free = source.nbytes(), shutil.disk_usage(dst.absolute().parent).free
    if size > free:
        raise InputError(f"{dst}: needs {size / 1e9:.1f} GB, but there are {free / 1e9:.1f} GB free")
    incomplete = dst.with_name(f".{dst.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)  # of a run that was killed
    try:
        with writing(dst):
            incomplete.mkdir()
            _copy_plain(source, incomplete)
            yield incomplete
            incomplete.rename(dst)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def _copy_plain(source: Source, dst: Path) -> None:
    src = source.checkpoint.folder
    without = {"vision_encoder", *({"sound_tokenizer"} - set(source.stores))}
    files = [file for pattern in PLAIN for file in src.glob(pattern)]
    files += [file for name in PLAIN_FOLDERS for file in (src / name).rglob("*")]
    for file in files:
        if file.is_file() and file.parent.name not in without:
            target = dst / file.relative_to(src)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(within(src, file), target)

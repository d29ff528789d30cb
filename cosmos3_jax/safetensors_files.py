"""Safetensors: the tensors of a folder or a file, read in place, and both written. No other file knows this format.

Opening a folder reads the headers alone, and says everything that is wrong with them. A tensor is then a view of its file,
mapped into memory: nothing is read before it is copied from. Pickle files are never opened, nor anything outside the folder.
"""

import dataclasses
import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cosmos3_jax.errors import InputError, RunError, first_line
from cosmos3_jax.folder import beside, read_json, readable, unique, within, write_json

STEM = "diffusion_pytorch_model"  # what diffusers calls the weights of every part
INDEX = f"{STEM}.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SAMPLE = 4096  # bytes of each tensor, in a fingerprint
SHARD = 5_000_000_000  # bytes at most in one file, as in the published folders


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file."""

    mapped: mmap.mmap  # the file
    kind: str  # the dtype in the format's words: "BF16"
    shape: tuple[int, ...]
    start: int  # its first byte in the file
    nbytes: int

    def view(self) -> np.ndarray:
        """The tensor as it is stored, read when it is touched."""
        return np.frombuffer(self.mapped, DTYPES[self.kind], math.prod(self.shape), self.start).reshape(self.shape)

    def sample(self) -> bytes:
        """Its first bytes."""
        return self.mapped[self.start : self.start + min(self.nbytes, SAMPLE)]

    def release(self) -> None:
        """Gives the memory back in which the system holds what was read: it counts as this process's until then."""
        first, last = -(-self.start // mmap.PAGESIZE), (self.start + self.nbytes) // mmap.PAGESIZE
        if last > first:
            self.mapped.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


class TensorFolder:
    """The tensors of one folder, in one file or in several with an index.

    Raises InputError for files that cannot be read; what they disagree about is in `problems`, a line each, and files that the
    index does not know in `unlisted`.
    """

    def __init__(self, folder: Path):
        self.tensors: dict[str, Tensor] = {}
        self.problems: list[str] = []
        listed, total_size = _listing(folder)
        self.unlisted = sorted({file.name for file in folder.glob("*.safetensors")} - set(listed.values())) if listed else []
        for file in sorted(set(listed.values())) if listed else [f"{STEM}.safetensors"]:
            found, _ = open_file(within(folder, folder / file))
            self.problems += [f"twice: {name} is also in {file}" for name in sorted(self.tensors.keys() & found.keys())]
            if listed:
                claimed = {name for name, place in listed.items() if place == file}
                self.problems += [f"index: {name} is not in {file}" for name in sorted(claimed - found.keys())]
                self.problems += [f"index: {name} in {file} is not listed" for name in sorted(found.keys() - claimed)]
            self.tensors |= found
        self.problems += [
            f"odd kind: {name} is {tensor.kind}, expected {', '.join(DTYPES)}"
            for name, tensor in sorted(self.tensors.items())
            if tensor.kind not in DTYPES
        ]
        nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        if total_size not in (None, nbytes):
            self.problems.append(f"index: total_size is {total_size}, the tensors have {nbytes} bytes")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def fingerprint(self) -> str:
        """A checksum of names, dtypes, shapes and a sample of every tensor, in whichever files they are."""
        checksum = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            checksum.update(json.dumps([name, tensor.kind, tensor.shape]).encode() + tensor.sample())
        return checksum.hexdigest()[:16]


def _listing(folder: Path) -> tuple[dict[str, str], int | None]:
    """The file of every tensor and the bytes of all, as an index has them; nothing where a single file needs none."""
    if not _is_there(folder / INDEX):
        if not _is_there(folder / f"{STEM}.safetensors"):
            raise InputError(_missing(folder))
        return {}, None
    index = read_json(folder / INDEX)
    listed, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"{folder / INDEX}: a weight_map from tensors to files is expected")
    for file in sorted(set(listed.values())):
        if not file.endswith(".safetensors") or len(file) > 200 or not file.isprintable() or "/" in file or "\\" in file:
            raise InputError(f"{folder / INDEX}: {file[:200]!a} is not the name of a safetensors file of this folder")
    return listed, metadata.get("total_size") if isinstance(metadata, dict) else None


def _is_there(file: Path) -> bool:
    return file.exists() or file.is_symlink()  # a link to nothing is a file that is missing, not one that need not be there


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: missing; is the checkpoint complete?"
    names = sorted(file.name for file in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        return f"{folder / INDEX}: missing, but there are safetensors files; download it too"
    pickles = [name for name in names if name.endswith(PICKLES)]
    instead = f" ({', '.join(pickles)}: pickle files are never opened)" if pickles else ""
    return f"{folder}: no {STEM}.safetensors and no {INDEX} there{instead}; is the checkpoint complete?"


def open_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file, and its metadata.

    The library judges the header: sizes, offsets, dtypes, nothing missing at the end. Raises InputError for what it refuses.
    """
    if not file.is_file():
        raise InputError(f"{file}: missing; is the checkpoint complete?")
    try:
        with safe_open(file, "numpy"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length), object_pairs_hook=unique)
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{file}: not a safetensors file that can be read ({error})") from error
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = Tensor(mapped, entry["dtype"], tuple(entry["shape"]), start, stop - start)
    return tensors, header.get("__metadata__", {})


def in_shards(tensors: Iterable[tuple[str, np.ndarray]], limit: int = SHARD) -> Iterator[dict[str, np.ndarray]]:
    """Tensors in mappings of at most `limit` bytes (or one tensor), in their order."""
    shard: dict[str, np.ndarray] = {}
    nbytes = 0
    for name, tensor in tensors:
        if shard and nbytes + tensor.nbytes > limit:
            yield shard
            shard, nbytes = {}, 0
        shard[name] = tensor
        nbytes += tensor.nbytes
    yield shard


def write_tensors(folder: Path, shards: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Fills a folder with files of tensors, one for each mapping as it comes, and their index, if there are several.

    Raises OSError where that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, list[str]]] = []
    total_size = 0
    for tensors in shards:
        file = folder / f"{STEM}-{len(files) + 1:05d}.safetensors"
        try:
            _save(file, tensors, {})
        except SafetensorError as error:
            raise OSError(first_line(error)) from error
        readable(file)
        files.append((file, list(tensors)))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) == 1:
        files[0][0].rename(folder / f"{STEM}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, (file, names) in enumerate(files):
        file = file.rename(folder / f"{STEM}-{i + 1:05d}-of-{len(files):05d}.safetensors")
        weight_map |= dict.fromkeys(names, file.name)
    write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def write_file(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata of any names as one file, there whole or not at all. Raises RunError where that fails."""
    try:
        with beside(file) as partial:
            _save(partial, tensors, metadata)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that no file can have
        raise RunError(f"{file}: cannot be written ({first_line(error)})") from error


def _save(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt", **metadata})

"""Plain files: the JSON of a checkpoint folder, nothing that lies outside it, and files that are whole or not there."""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmos3_jax.errors import InputError, RunError


def within(folder: Path, path: Path) -> Path:
    """`path`, which lies in `folder`. Raises InputError for a link out of it, or a name that cannot be one."""
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a link to itself, no text
        raise InputError(f"{str(path)!a}: cannot be a file ({error})") from error
    allowed = [root]
    for parent in root.parents:
        if parent.name == "snapshots":  # Hugging Face's cache: its files are links to blobs of the repository, or of all
            allowed += [parent.parent / "blobs", parent.parent.parent / "blobs"]
    if not any(target.is_relative_to(place) for place in allowed):
        raise InputError(f"{path}: leads out of its folder, to {target}; put a copy there instead of a link")
    return path


def check_files(root: Path, folder: Path) -> None:
    """Raises InputError unless all in `folder`, which another library opens, lies in `root` and ends: pipes do not."""
    for path in folder.rglob("*"):
        if within(root, path).exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{path}: a regular file is expected")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if there is none."""
    if not within(path.parent, path).is_file():
        raise InputError(f"{path}: missing; is the checkpoint complete?")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON that can be read ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that comes twice: readers differ in which one they take."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def readable(path: Path) -> None:
    """Gives a file the permissions that a new one has here; those made under a temporary name are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def remove_left(folder: Path, prefix: str = "") -> None:
    """Removes what killed processes left of `beside`: files that nobody holds a lock on."""
    for left in folder.glob(f".cosmos3.{prefix}*"):
        with contextlib.suppress(OSError), left.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name in the same folder, which becomes `path` when all went well and is removed when not.

    A process holds a lock on it for as long as it lives: what a killed one left of the same `path` is removed first.
    """
    prefix = f"{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}."
    remove_left(path.parent, prefix)
    with _held(path, f".cosmos3.{prefix}") as partial:
        try:
            yield partial
            readable(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(path: Path, prefix: str) -> Iterator[Path]:
    """A new file beside `path`, with this process's lock."""
    while True:
        with tempfile.NamedTemporaryFile(prefix=prefix, suffix=path.suffix, dir=path.parent, delete=False) as file:
            with contextlib.suppress(OSError):  # a file system without locks: there nothing that is left is removed
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.lexists(file.name):  # else, before it was locked, another process took it for one that was left
                yield Path(file.name)
                return


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises RunError, on the way of something, where `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

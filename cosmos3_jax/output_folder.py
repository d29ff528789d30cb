"""A folder that many requests are written to: of each a file, and beside it a record of how that went.

    name.mp4, name.png   what was made; it stays until something new is
    name.json            its record: {"status": "done", the file, its checksum and metadata}, or {"status": "failed", the error,
                         and under "made" the file that an earlier request of this name had left}
    .claim.name          a process is at work on it, while that holds its lock

All of them are whole or not there. A lock ends with its process, also when that is killed; on network file systems it holds for
all machines. Nothing in a record depends on when or how fast it was made.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cosmos3_jax.errors import InputError, RunError
from cosmos3_jax.folder import beside, remove_left, write_json

SUFFIXES = (".mp4", ".png")

Stamp = tuple[int, ...] | None
"""What tells one writing of a record from another; None: there is none."""


class OutputFolder:
    """The folder, made if it is not there, without what killed processes left. Raises InputError where it cannot be used."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.claimed(""):
                pass
            for left in folder.glob(".claim.*"):
                with self.claimed(left.name.removeprefix(".claim.")):
                    pass
            remove_left(folder)
        except (OSError, RunError, ValueError) as error:
            raise InputError(f"{str(folder)!a}: no folder that can be written to ({error})") from error

    def stamp(self, name: str) -> Stamp:
        """That of the record there is now. Raises InputError where there can be none."""
        path = self._record(name)
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: no file, so that nothing can be put on record there; move it away")
        return found.st_ino, found.st_mtime_ns, found.st_size

    def status(self, name: str) -> str | None:
        """ "done", "failed", or None where there is no record that can be read."""
        return self._read(name).get("status")

    def has(self, name: str, fits: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Whether its file is there, with the checksum on record, and its metadata fits. Then no failure is on record."""
        record = self._read(name)
        made = _made(record)
        if made is None or made["file"] not in [name + suffix for suffix in SUFFIXES]:
            return False
        try:
            if not fits(made["metadata"]) or checksum(self.folder / made["file"]) != made["sha256"]:
                return False
        except (OSError, InputError):
            return False
        if record["status"] != "done":
            self._write(name, {"name": name, "status": "done", **made})
        return True

    def done(self, name: str, file: str, metadata: Mapping[str, Any]) -> None:
        """Puts on record that a file was written, and removes what there is of the name under another suffix.

        Raises RunError if that cannot be.
        """
        try:
            made = {"file": file, "sha256": checksum(self.folder / file), "metadata": dict(metadata)}
        except OSError as error:
            raise RunError(f"{self.folder / file}: could not be read again ({error})") from error
        self._write(name, {"name": name, "status": "done", **made})
        for other in {name + suffix for suffix in SUFFIXES} - {file}:
            try:
                (self.folder / other).unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"{self.folder / other}: could not be removed ({error})") from error

    def failed(self, name: str, error: Exception) -> None:
        """Puts a failure on record. Raises RunError if it cannot be."""
        record = {"name": name, "status": "failed", "kind": type(error).__name__, "error": str(error)}
        made = _made(self._read(name))
        self._write(name, record if made is None else {**record, "made": made})

    @contextlib.contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Whether a request is this process's own from here on; False if another process has it. Raises RunError."""
        path = self.folder / f".claim.{name}"
        with _locked(path) as mine:
            try:
                yield mine
            finally:
                if mine:
                    with contextlib.suppress(OSError):
                        path.unlink()

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any]:
        try:
            record = json.loads(self._record(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        try:
            with beside(self._record(name)) as partial:
                write_json(partial, record)
        except OSError as error:
            raise RunError(f"{self._record(name)}: could not be written ({error})") from error


def _made(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a record says of a file, or None if it knows of none."""
    found = {"done": record, "failed": record.get("made")}.get(str(record.get("status")))
    if not isinstance(found, Mapping) or not isinstance(found.get("metadata"), dict):
        return None
    return {name: found.get(name) for name in ("file", "sha256", "metadata")}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the lock of a file was free; then it is held. Raises RunError where there can be no such file or lock."""
    with contextlib.ExitStack() as stack:
        try:
            while True:
                file = stack.enter_context(path.open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its last owner removed it meanwhile
                        break
                stack.pop_all().close()
            mine = True
        except BlockingIOError:
            mine = False
        except OSError as error:
            raise RunError(f"{path}: could not be locked ({error})") from error
        yield mine


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

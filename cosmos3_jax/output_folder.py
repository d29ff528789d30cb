"""A folder that many requests are written to: of each a file, and beside it a record of how that went.

    name.mp4, name.png   what was made
    name.json            its record: {"status": "done", the file's checksum and metadata} or {"status": "failed", the error}
    .name.claim          a process is at work on it, while that holds its lock

All of them are whole or not there. A lock ends with its process, also when that is killed; on network file systems it holds for
all machines. Nothing in a record depends on when or how fast it was made.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cosmos3_jax.errors import InputError, RunError
from cosmos3_jax.folder import beside, write_json

Stamp = tuple[int, ...] | None
"""What tells one writing of a record from another; None: there is none."""


class OutputFolder:
    """The folder, made if it is not there. Raises InputError where it cannot be used."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.claimed(".probe"):
                pass
        except OSError as error:
            raise InputError(f"{folder}: no folder that can be written to ({error})") from error

    def stamp(self, name: str) -> Stamp:
        """That of the record there is now."""
        try:
            found = self._record(name).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def status(self, name: str) -> str | None:
        """ "done", "failed", or None where there is no record that can be read."""
        return self._read(name).get("status")

    def has(self, name: str, fits: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Whether its file is there, with the checksum on record, and its metadata fits."""
        record = self._read(name)
        file, metadata = record.get("file"), record.get("metadata")
        if record.get("status") != "done" or not isinstance(metadata, dict) or not isinstance(file, str):
            return False
        try:
            return Path(file).name == file and fits(metadata) and checksum(self.folder / file) == record.get("sha256")
        except (OSError, ValueError):
            return False

    def done(self, name: str, file: str, metadata: Mapping[str, Any]) -> None:
        """Puts on record that a file was written. Raises RunError if it cannot be."""
        sha256 = checksum(self.folder / file)
        self._write(name, {"name": name, "status": "done", "file": file, "sha256": sha256, "metadata": dict(metadata)})

    def failed(self, name: str, error: Exception) -> None:
        """Puts a failure on record. Raises RunError if it cannot be."""
        self._write(name, {"name": name, "status": "failed", "kind": type(error).__name__, "error": str(error)})

    @contextlib.contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Whether a request is this process's own from here on; False if another process has it."""
        path = self.folder / f".{name}.claim"
        with _locked(path) as mine:
            try:
                yield mine
            finally:
                if mine:
                    path.unlink(missing_ok=True)

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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the lock of a file was free; then it is held."""
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its last owner removed it meanwhile
                    yield True
                    return


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

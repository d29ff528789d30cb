"""Latents of clips on disk: each clip is encoded once, for a VAE and a size, whatever is trained on it how often."""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cosmos3_jax.errors import InputError
from cosmos3_jax.folder import beside, remove_left, writing
from cosmos3_jax.latents import Latents


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """A folder of .npz files. `made_by` is all that latents depend on beside the clip, as JSON has it."""

    folder: Path
    made_by: dict[str, Any]

    def open(self) -> None:
        """Makes the folder, and removes what killed processes left. Raises InputError where there can be none."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_left(self.folder)
        except OSError as error:
            raise InputError(f"{self.folder}: latents cannot be kept there ({error}); give another place") from error

    def file(self, path: Path) -> Path:
        """Where the latents of a clip are, whether they are there or not: another one once the clip has changed."""
        stat = path.stat()
        about = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, self.made_by], sort_keys=True)
        return self.folder / f"{path.stem[:64]}-{hashlib.sha256(about.encode()).hexdigest()[:24]}.npz"

    def add(self, path: Path, make: Callable[[], Latents]) -> Path:
        """The file of a clip's latents, which are made if they are not there. Raises RunError where it cannot be written."""
        file = self.file(path)
        if not file.exists():
            latents = make()
            arrays = {name: x for name, x in (("video", latents.video), ("sound", latents.sound)) if x is not None}
            with writing(file), beside(file) as partial, partial.open("wb") as opened:
                np.savez(opened, **arrays)
        return file


def read(file: Path) -> Latents:
    """The latents in a file. Raises InputError if it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Latents(arrays["video"], arrays.get("sound"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: damaged latents ({error}); delete the file, and they are made again") from error

"""Programs that XLA compiled, kept on disk: what one process compiled, the next one of this user loads."""

import contextlib
import importlib
import os
import sys
import zlib
from pathlib import Path

import jax

SHORTEST = 0.1  # seconds of compiling below which a program is not worth a file
ZSTANDARD = b"\x28\xb5\x2f\xfd"  # what it begins with
PAGE = 4096  # bytes; where a file ends of which a kill or a full disk kept the rest from being written


def use_compilation_cache() -> Path | None:
    """The folder where this process keeps compiled programs from now on, `cosmos3_jax/programs` in the user's cache folder.

    JAX's own settings come first: with `JAX_COMPILATION_CACHE_DIR` programs are kept there, with
    `JAX_ENABLE_COMPILATION_CACHE=0` nowhere (None). Nor are they where that folder cannot be written. Programs are code, so
    it must be this user's own; JAX tells versions, devices and flags apart by itself.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    if (chosen := jax.config.jax_compilation_cache_dir) is not None:  # type: ignore[attr-defined]
        remove_cut_off(Path(chosen))
        return Path(chosen)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosmos3_jax" / "programs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_mine = folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None
    if not is_mine:
        return None
    remove_cut_off(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    return folder


def remove_cut_off(folder: Path) -> None:
    """Removes programs that were not written to their end.

    JAX (0.10 to 0.12) writes them in place, and never again: it would warn and compile such a program in every process.
    """
    for file in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            if file.stat().st_size % PAGE == 0 and not _is_whole(file.read_bytes()):
                file.unlink()


def _is_whole(compressed: bytes) -> bool:
    """Whether JAX can unpack it, which uses zstandard where that is installed."""
    try:
        if compressed.startswith(ZSTANDARD):
            importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "zstandard").decompress(compressed)
        else:
            zlib.decompress(compressed)
    except Exception:  # each module has its own
        return False
    return True

"""Programs that XLA compiled, kept on disk: what one process compiled, the next one of this user loads."""

import os
from pathlib import Path

import jax

SHORTEST = 0.1  # seconds of compiling below which a program is not worth a file


def use_compilation_cache() -> Path | None:
    """The folder where this process keeps compiled programs from now on, `cosmos3_jax/programs` in the user's cache folder.

    JAX's own settings come first: with `JAX_COMPILATION_CACHE_DIR` programs are kept there, with
    `JAX_ENABLE_COMPILATION_CACHE=0` nowhere (None). Nor are they where that folder cannot be written. Programs are code, so
    nobody else may write there; JAX tells versions, devices and flags apart by itself.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    if (chosen := jax.config.jax_compilation_cache_dir) is not None:  # type: ignore[attr-defined]
        return Path(chosen)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosmos3_jax" / "programs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None
    if folder.stat().st_uid != os.getuid() or not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    return folder

"""Named arrays in a folder, through Orbax (its API v1). The only file that imports it, beside training/saved.py.

Arrays are stored whole and uncompressed, whatever they will be divided over, so that any mesh reads them.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from cosmos3_jax.errors import Cosmos3Error, InputError, RunError

CHUNK = 1 << 25  # bytes of an array that are read and written as one
Contents = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype of every array by its name
UNWRITABLE = "cannot be written"
UNREADABLE = "not an Orbax checkpoint that can be read; convert it again"
BATCH = 1 << 30  # bytes of small arrays that go together


def write(folder: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes arrays as they come, a large one or a gigabyte of small ones at a time. The folder is there once all are.

    Raises RunError where it cannot be written.
    """
    batch: dict[str, np.ndarray] = {}
    for name, array in arrays:
        batch[name] = array
        if sum(each.nbytes for each in batch.values()) >= BATCH:
            _append(folder, batch)
            batch = {}
    if batch:
        _append(folder, batch)
    with plain_errors(folder, UNWRITABLE, RunError), _context():
        ocp.partial.finalize(folder.absolute())


def _append(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    with plain_errors(folder, UNWRITABLE, RunError), _context():
        ocp.partial.save(folder.absolute(), arrays)


def contents(folder: Path) -> Contents:
    """Shape and dtype of every array. Raises InputError for a folder that cannot be read."""
    with plain_errors(folder, UNREADABLE), _context():
        arrays: Any = ocp.metadata(folder.absolute()).metadata
        if arrays is None:
            raise ValueError("it has no list of its arrays")
        return {name: (tuple(array.shape), np.dtype(array.dtype)) for name, array in arrays.items()}


def read(folder: Path, contents: Contents, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays as they were stored, a large one or a gigabyte of small ones at a time; `contents` are the folder's.

    Raises what `contents` does.
    """
    left = list(names)
    while left:
        batch: dict[str, np.ndarray] = {}
        while left and sum(array.nbytes for array in batch.values()) < BATCH:
            name = left.pop(0)
            batch[name] = np.empty(*contents[name])  # only its shape and dtype are looked at
        with plain_errors(folder, UNREADABLE), _context():
            arrays: Any = ocp.load(folder.absolute(), batch)
        yield from arrays.items()


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights are noise to a compressor
    context.array.saving.storage_options.chunk_byte_size = CHUNK
    context.memory.deepcopy_host_arrays = False
    context.pytree.loading.partial_load = True
    return context


@contextlib.contextmanager
def plain_errors(folder: Path, what: str, kind: type[Cosmos3Error] = InputError) -> Iterator[None]:
    """Orbax has many ways to say that a folder is damaged, logs among them; this makes one of them, an error of a `kind`."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (Cosmos3Error, MemoryError, jax.errors.JaxRuntimeError):  # no fault of the folder's
        raise
    except Exception as error:
        levels = [logging.CRITICAL] * len(loggers)  # its unfinished tasks may still have something to say
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise kind(f"{folder}: {what} ({reason[0][:200]})") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

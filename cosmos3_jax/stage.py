"""Around each stage of a request: how long it took, and what to say when memory ends."""

import contextlib
import logging
import time
from collections.abc import Iterator

import jax

from cosmos3_jax.errors import OutOfMemoryError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds to `seconds` what a stage takes. Raises OutOfMemoryError where the memory of a device or of the host ends."""
    start = time.perf_counter()
    with memory_told(stage):
        yield
    passed = time.perf_counter() - start
    log.debug("%s: %.3f s", stage, passed)
    seconds[stage] = round(seconds.get(stage, 0) + passed, 4)


@contextlib.contextmanager
def memory_told(stage: str) -> Iterator[None]:
    """Raises OutOfMemoryError where the memory of a device or of the host ends."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:200] or "of the host"
        raise OutOfMemoryError(f"{stage}: out of memory ({reason})", stage) from error

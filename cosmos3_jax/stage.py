"""Around each stage of a request: how long it took, and what to say when the device fails or memory ends."""

import contextlib
import logging
import time
from collections.abc import Iterator

import jax

from cosmos3_jax.errors import DeviceError, OutOfMemoryError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds to `seconds` what a stage takes. Raises what `failures_told` does."""
    start = time.perf_counter()
    with failures_told(stage):
        yield
    passed = time.perf_counter() - start
    log.debug("%s: %.3f s", stage, passed)
    seconds[stage] = round(seconds.get(stage, 0) + passed, 4)


@contextlib.contextmanager
def failures_told(stage: str) -> Iterator[None]:
    """Raises OutOfMemoryError where the memory of a device or of the host ends, DeviceError for another failure of XLA."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0][:200] or "of the host"
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemoryError(f"{stage}: out of memory ({reason})", stage) from error
        raise DeviceError(f"{stage}: the device failed ({reason}); --verbose shows where", stage) from error

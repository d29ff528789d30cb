"""What the command line says, through the standard `logging`: information on stdout, warnings and errors on stderr.

The project's modules log under "cosmos3_jax": the time of each stage as DEBUG, what everyone wants to read as INFO.
"""

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator

from cosmos3_jax.errors import Cosmos3Error, DeviceError, StoppedError
from cosmos3_jax.processes import are_several, is_first, leave

LOGGER = logging.getLogger("cosmos3_jax")


class Console(logging.Handler):
    """Prints a line for each record; of several processes the first one does, but each its own errors."""

    def emit(self, record: logging.LogRecord) -> None:
        if not is_first() and record.levelno < logging.ERROR:
            return
        mark = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        print(f"{mark}{record.getMessage()}", file=sys.stdout if record.levelno == logging.INFO else sys.stderr, flush=True)


@contextlib.contextmanager
def speaking(*, verbose: bool = False, quiet: bool = False) -> Iterator[None]:
    """Prints what is logged meanwhile, and Python's warnings: all of it if `verbose`, errors alone if `quiet`."""
    handler, before = Console(), (LOGGER.level, LOGGER.propagate)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO)
    LOGGER.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: LOGGER.warning("%s", message)
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.level, LOGGER.propagate = before


def ending(run: Callable[[], int], *, verbose: bool = False) -> int:
    """The exit code of a command line: what `run` returns, or that of its error, which is told in a sentence.

    Of several processes one that fails ends at once, and with it the others; a defect of ours it tells whole.
    """
    try:
        return run()
    except KeyboardInterrupt:
        return _end(StoppedError("stopped by SIGINT"))
    except Cosmos3Error as error:
        if verbose:
            traceback.print_exc()
        if are_several() and isinstance(error, DeviceError):
            LOGGER.error("this process ends, and with it the others")
        return _end(error)
    except BaseException as error:
        if are_several():
            traceback.print_exc()
            LOGGER.error("this process ends, and with it the others: %r", error)
            leave(1)
        raise


def _end(error: Cosmos3Error) -> int:
    LOGGER.error("%s", error)
    leave(error.exit_code)
    return error.exit_code

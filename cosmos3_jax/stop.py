"""Ctrl-C and SIGTERM as a wish, which is met between two steps."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from cosmos3_jax.errors import StoppedError
from cosmos3_jax.processes import are_several

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """A function that raises StoppedError once one of the signals came. A second signal raises it wherever Python is.

    Of several processes each would stop at another step, and wait for the others for ever: there signals end them at once, as
    they do where Python cannot catch them, beside the main thread.
    """
    asked: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise _stopped(number)
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nending after this step; once more ends at once\n")

    def check() -> None:
        if asked:
            raise _stopped(asked[0])

    if are_several() or threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(number: int) -> StoppedError:
    return StoppedError(f"stopped by {signal.Signals(number).name}", 128 + number)

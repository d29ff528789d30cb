"""Ctrl-C and SIGTERM as a wish, which is met between two steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from cosmos3_jax.errors import StoppedError
from cosmos3_jax.processes import are_several

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 2  # in which Python is to clean up after a second signal


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """A function that raises StoppedError once one of the signals came.

    A second signal raises it wherever Python is, and ends the process if a program that runs or compiles keeps that from
    Python. Of several processes each would stop at another step, and wait for the others for ever: there signals end them at
    once, as they do where Python cannot catch them, beside the main thread.
    """
    asked: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise _stopped(number)

    def check() -> None:
        if asked:
            raise _stopped(asked[0])

    if are_several() or threading.current_thread() is not threading.main_thread():
        yield check
        return
    with _watched():
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup wants it
        before = {number: signal.signal(number, on_signal) for number in heeded}
        try:
            yield check
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """A thread that is told of signals as they come: Python's own handlers wait for the end of what runs in C."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    ended = threading.Event()

    def watch() -> None:
        if not os.read(reader, 1):
            return
        with contextlib.suppress(OSError):
            os.write(2, b"\nending after this step; once more ends at once\n")
        if (second := os.read(reader, 1)) and not ended.wait(GRACE_SECONDS):
            os._exit(128 + second[0])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _stopped(number: int) -> StoppedError:
    return StoppedError(f"stopped by {signal.Signals(number).name}", 128 + number)

"""What goes wrong, as this project says it: one sentence for whoever asked, and an exit code of the command line for each kind.

Everything that a user's files, values or machine can cause is one of these; anything else that is raised is a defect of ours.
"""

from collections.abc import Sequence
from typing import Any


class Cosmos3Error(Exception):
    """Whatever this project raises itself."""

    exit_code = 1


class InputError(Cosmos3Error, ValueError):
    """A value from outside cannot be used; the message names it, what was expected and what to do."""

    exit_code = 2


class BlockedError(Cosmos3Error):
    """The safety checker does not let a prompt or a video pass (safety.py)."""

    exit_code = 3


class RunError(Cosmos3Error, RuntimeError):
    """A request that could be used went wrong on the way: numbers that are none, a disk that is full."""


class DeviceError(RunError):
    """A device, or XLA on it, failed in a stage of the request."""

    def __init__(self, message: str, stage: str):
        super().__init__(message)
        self.stage = stage


class OutOfMemoryError(DeviceError):
    """A device, or the host, has less memory than a stage of the request needs."""


class StoppedError(Cosmos3Error):
    """Somebody asked for the end (Ctrl-C, SIGTERM); what is on disk is as if the request had not been started."""

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code


def shown(value: Any) -> str:
    """A value of any kind, as a sentence can have it."""
    try:
        text = repr(value)
    except Exception:  # a number of too many digits, an object of somebody else's
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def faults(lines: Sequence[str], where: str = "") -> str:
    """All that is wrong, counted, a line each: "2 faults in the tensors", and what they are."""
    listing = "\n  ".join(line if line.isprintable() else ascii(line) for line in lines)
    return f"{len(lines)} fault{'s' if len(lines) > 1 else ''}{where}\n  {listing}"


def first_line(error: Exception) -> str:
    """Of what an exception of somebody else's says; its name, if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

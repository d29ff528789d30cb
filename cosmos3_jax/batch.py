"""Many requests into one folder: what is finished is left alone, and what fails goes on record.

Several processes may share the work (an array job, say): each takes the next request that nobody else has. The processes of one
mesh do all of it together, and the first of them chooses. What a killed process had begun, the next run begins anew.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

from cosmos3_jax import result_files
from cosmos3_jax.errors import Cosmos3Error, DeviceError, InputError, OutOfMemoryError, StoppedError
from cosmos3_jax.output_folder import OutputFolder, Stamp
from cosmos3_jax.processes import agree, are_several, told
from cosmos3_jax.provenance import as_good
from cosmos3_jax.request import ResolvedRequest
from cosmos3_jax.requests_file import Line
from cosmos3_jax.result import Result

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass
class Tally:
    """What became of the requests, by name."""

    finished_before: list[str] = dataclasses.field(default_factory=list)
    done: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    with_others: list[str] = dataclasses.field(default_factory=list)  # another process is at work on it, or just was


class Batch:
    """Requests on their way into a folder.

    `resolve` checks the words of a line, `metadata` is what the result of a request would have: both raise Cosmos3Error where
    they cannot. `fail_fast` raises the first failure. Of the processes of one mesh only the first has the folder.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        folder: OutputFolder | None,
        resolve: Callable[[Line], ResolvedRequest],
        metadata: Callable[[ResolvedRequest], Mapping[str, Any]],
        *,
        fail_fast: bool,
    ):
        self.lines, self.folder, self.resolve, self.metadata, self.fail_fast = lines, folder, resolve, metadata, fail_fast
        self.tally = Tally()
        self.waiting: dict[int, Stamp] = {}  # which lines are to be done, and the records there were of them

    def survey(self) -> bool:
        """Whether there is anything to do: lines that are right and not finished. What failed before comes last."""
        if self.folder is not None:
            before = {index: self.folder.status(line.name) for index, line in enumerate(self.lines)}
            for index in sorted(before, key=lambda index: before[index] == "failed"):
                self._look_at(index, self.folder)
        return bool(told(len(self.waiting)))

    def _look_at(self, index: int, folder: OutputFolder) -> None:
        line = self.lines[index]
        stamp = folder.stamp(line.name)
        try:
            request = self.resolve(line)
        except Cosmos3Error as error:
            self._failed(line, error)
            return
        if folder.has(line.name, lambda there: as_good(there, self.metadata(request))):
            self.tally.finished_before.append(line.name)
        else:
            self.waiting[index] = stamp

    def work(self, run: Callable[[ResolvedRequest], Result], check: Callable[[], None]) -> None:
        """Does what is to be done. `check` is called before each request, and may raise StoppedError."""
        with contextlib.closing(self._turns()) as turns:
            while (index := told(next(turns, -1))) >= 0:
                check()
                start, line = time.perf_counter(), self.lines[index]
                log.info("%s: request %d of %d", line.name, index + 1, len(self.lines))
                try:
                    self._make(line, run)
                except StoppedError:
                    raise
                except Exception as error:
                    check()  # a stop may have made it fail
                    self._failed(line, error)
                else:
                    self.tally.done.append(line.name)
                    log.info("%s: done in %.1f s", line.name, time.perf_counter() - start)

    def _turns(self) -> Generator[int]:
        """The lines that are this process's to do, each claimed until the next is asked for.

        What another process is at work on is asked for again at the end: it may have been killed.
        """
        assert self.folder is not None or not self.waiting
        passed_over: dict[int, Stamp] = {}
        for waiting in (self.waiting, passed_over):
            for index, stamp in waiting.items():
                name = self.lines[index].name
                with self.folder.claimed(name) as mine:  # type: ignore[union-attr]
                    if mine and self.folder.stamp(name) == stamp:  # type: ignore[union-attr]
                        yield index
                    elif mine or waiting is passed_over:
                        self.tally.with_others.append(name)
                    else:
                        passed_over[index] = stamp

    def _make(self, line: Line, run: Callable[[ResolvedRequest], Result]) -> None:
        """Generates one, writes it, and puts it on record."""
        request = _in_step(line, lambda: self._checked(line))
        result = _in_step(line, lambda: run(request))
        if self.folder is not None:
            file = line.name + request.suffix
            result.save(self.folder.folder / file)
            self.folder.done(line.name, file, result.metadata)

    def _checked(self, line: Line) -> ResolvedRequest:
        """The request, whose media can be read and whose file can be written."""
        request = self.resolve(line)
        self.metadata(request)
        if self.folder is not None:
            path = self.folder.folder / (line.name + request.suffix)
            result_files.check_writable(path, request.num_frames, has_sound=bool(request.enable_sound))
        return request

    def _failed(self, line: Line, error: Exception) -> None:
        """Puts a failure on record, and raises it again if nothing may follow it."""
        self.tally.failed.append(line.name)
        if self.folder is not None:
            self.folder.failed(line.name, error)
        if self.fail_fast or not isinstance(error, Cosmos3Error) or _is_final(error):
            raise error
        log.error("%s: %s", line.name, error)


def _in_step(line: Line, do: Callable[[], T]) -> T:
    """What `do` returns, or the Cosmos3Error that it raises, once all processes of a mesh are through with it.

    Else one would begin the next while others wait in this one; where it fails in one of them, it fails in all.
    """
    failure: Cosmos3Error | None = None
    try:
        made = do()
    except Cosmos3Error as error:
        if isinstance(error, StoppedError) or _is_final(error):
            raise
        failure = error
    try:
        agree([line.name, type(failure).__name__])
    except InputError as error:
        raise failure or error from None
    if failure is not None:
        raise failure
    return made


def _is_final(error: Exception) -> bool:
    """Whether none can follow: a device failed, perhaps that of this process alone, while others wait for it in a program.

    Where memory ends for one process alone, another request may need less.
    """
    return isinstance(error, DeviceError) and (are_several() or not isinstance(error, OutOfMemoryError))

"""The loop: batches in, steps of the optimizer, and what is kept of a run in its folder.

| in the folder | |
|---|---|
| states/  | where the run stands (saved.py): the same command goes on from the last one, bit for bit |
| log.csv  | a row a step |
| samples/ | what the prompts give every so many steps |
"""

import contextlib
import csv
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from cosmos3_jax.errors import InputError, RunError, StoppedError
from cosmos3_jax.folder import writing
from cosmos3_jax.processes import is_first
from cosmos3_jax.stage import failures_told
from cosmos3_jax.training.saved import Saved
from cosmos3_jax.training.update import Progress, TrainState

log = logging.getLogger(__name__)
COLUMNS = ("step", "loss", "video", "sound", "gradient_norm", "learning_rate", "seconds")


class Place(Protocol):
    """An iterator over data that knows where it is; grain's is one."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a run goes, and what happens on the way."""

    steps: int
    save_every: int = 500
    sample_every: int = 500


class Run:
    """A run in its folder. `about` is all that it depends on but its length: a folder goes on with the same run alone.

    Raises InputError for the folder of another run.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.folder, self.about = folder, json.loads(json.dumps(about))  # as they are read again: no tuples
        self.saved = Saved(folder / "states")
        if self.saved.latest is None:
            return
        before = self.saved.about()["run"]
        changed = sorted(name for name in self.about.keys() | before.keys() if self.about.get(name) != before.get(name))
        if changed:
            was = ", ".join(f"{name}={before.get(name)!r}" for name in changed)
            raise InputError(f"{folder}: holds a run with {was}; give the same to go on with it, or another --out")

    def resume(self, state: TrainState, data: Place) -> TrainState:
        """The last state there is, instead of `state`, with the data where it was then; or `state`, for a run that begins."""
        if self.saved.latest is None:
            return state
        data.set_state(self.saved.about()["data"])
        log.info("going on after step %d", self.saved.latest)
        return self.saved.load(state)

    def go(
        self,
        state: TrainState,
        data: Place,
        step: Callable[[TrainState, Any], tuple[TrainState, Progress]],
        schedule: Schedule,
        *,
        sample: Callable[[TrainState, Path], None] = lambda state, folder: None,
        check: Callable[[], None] = lambda: None,
        progress: bool = True,
    ) -> TrainState:
        """The state after all steps, each made by `step(state, next(data))`.

        `check` is called before each, and may raise StoppedError: then the run is saved first. `sample(state, folder)` is
        called every so many steps. Raises RunError where the loss is no number.
        """
        done = int(state.step)
        with contextlib.closing(Teller(self.folder / "log.csv", done, schedule.steps, visible=progress)) as teller:
            while done < schedule.steps:
                try:
                    check()
                except StoppedError:
                    teller.wait()
                    self.save(state, data)
                    raise
                start = time.perf_counter()
                with failures_told("train"):
                    state, found = step(state, next(data))
                    done += 1
                    teller.later(done, start, found)
                saves, samples = (done == schedule.steps or done % n == 0 for n in (schedule.save_every, schedule.sample_every))
                if saves or samples:
                    teller.wait()
                if saves:
                    self.save(state, data)
                if samples:
                    sample(state, self.folder / "samples" / f"step-{done:06d}")
        return state

    def save(self, state: TrainState, data: Place) -> None:
        """Writes where the run stands, if that is not there yet."""
        if self.saved.latest != int(state.step):
            self.saved.save(state, {"run": self.about, "data": data.get_state()})


class Teller:
    """Tells how steps went, in log.csv and a progress bar: each when the next one was begun, so that the device has work.

    What a run wrote after the state that it goes on from is written again. Of several processes the first one tells. Raises
    RunError where the file cannot be written.
    """

    def __init__(self, path: Path, done: int, steps: int, *, visible: bool):
        self.bar = tqdm(initial=done, total=steps, desc="train", unit="step", disable=not (visible and is_first()))
        self.waiting: tuple[int, float, Progress] | None = None
        self.ended = 0.0  # when the step before did
        self.path, self.file = path, None
        if is_first():
            with writing(path):
                self.file = path.open("r+" if path.is_file() else "w+", newline="", buffering=1)
                told = csv.DictReader(self.file)
                rows = [row for row in told if (row.get("step") or "").isdigit() and int(row["step"]) <= done]
                self.file.seek(0)
                self.file.truncate()
                self.writer = csv.DictWriter(self.file, COLUMNS, extrasaction="ignore")
                self.writer.writeheader()
                self.writer.writerows(rows)

    def later(self, step: int, start: float, found: Progress) -> None:
        """Tells of the step before, once that has ended, and of this one next time."""
        self.wait()
        self.waiting = step, start, found

    def wait(self) -> None:
        """Waits for the last step, and tells how it went. Raises RunError where its loss is no number."""
        if self.waiting is None:
            return
        (step, start, found), self.waiting = self.waiting, None
        values = {"loss": found.loss.total, "video": found.loss.video, "sound": found.loss.sound}
        values |= {"gradient_norm": found.gradient_norm, "learning_rate": found.learning_rate}
        numbers = {name: float(x) for name, x in values.items()}
        if not math.isfinite(numbers["loss"] + numbers["gradient_norm"]):
            raise RunError(
                f"the loss or its gradient became NaN or infinite in step {step}: a lower learning rate or a longer warmup may "
                "do, in another folder"
            )
        now = time.perf_counter()
        seconds, self.ended = f"{now - max(start, self.ended):.3f}", now
        if self.file is not None:
            with writing(self.path):
                self.writer.writerow({"step": step, "seconds": seconds, **{name: f"{x:.9g}" for name, x in numbers.items()}})
        self.bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
        self.bar.update(1)

    def close(self) -> None:
        """Closes the file and the bar."""
        self.bar.close()
        if self.file is not None:
            self.file.close()

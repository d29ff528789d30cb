"""The loop: batches in, steps of the optimizer, and what is kept of a run in its folder.

| in the folder | |
|---|---|
| states/  | where the run stands (saved.py): the same command goes on from the last one, bit for bit |
| log.csv  | a row a step |
| samples/ | what the prompts give every so many steps |
"""

import csv
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from cosmos3_jax.errors import InputError, RunError, StoppedError
from cosmos3_jax.processes import is_first
from cosmos3_jax.training.objective import Batch
from cosmos3_jax.training.saved import Saved
from cosmos3_jax.training.update import Progress, TrainState, Update
from cosmos3_jax.weights import Network

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
        self.folder, self.about = folder, dict(about)
        self.saved = Saved(folder / "states")
        if self.saved.latest is None:
            return
        before = self.saved.about()["run"]
        changed = sorted(name for name in self.about.keys() | before.keys() if self.about.get(name) != before.get(name))
        if changed:
            was = ", ".join(f"{name}={before.get(name)!r}" for name in changed)
            raise InputError(f"{folder}: holds a run with {was}; give the same to go on with it, or another --out")

    def resume(self, state: TrainState, data: Place) -> TrainState:
        """The last state there is, with the data where it was then; or `state`, for a run that begins."""
        if self.saved.latest is None:
            return state
        data.set_state(self.saved.about()["data"])
        log.info("going on after step %d", self.saved.latest)
        return self.saved.load(state)

    def go(
        self,
        state: TrainState,
        data: Place,
        update: Update,
        frozen: Mapping[str, Network],
        batch_of: Callable[[Any], Batch],
        schedule: Schedule,
        *,
        sample: Callable[[TrainState, Path], None] = lambda state, folder: None,
        check: Callable[[], None] = lambda: None,
        progress: bool = True,
    ) -> TrainState:
        """The state after all steps. `check` is called before each, and may raise StoppedError: then the run is saved first.

        `sample(state, folder)` is called every so many steps. Raises RunError where the loss is no number.
        """
        done = int(state.step)
        table = Table(self.folder / "log.csv", done) if is_first() else None
        with tqdm(initial=done, total=schedule.steps, desc="train", unit="step", disable=not (progress and is_first())) as bar:
            running: tuple[int, float, Progress] | None = None
            while done < schedule.steps:
                try:
                    check()
                except StoppedError:
                    self.save(state, data)
                    raise
                start = time.perf_counter()
                state, found = update(state, frozen, batch_of(next(data)))
                if running is not None:  # the step before, so that the device has work meanwhile
                    _tell(*running, table, bar)
                done, running = done + 1, (done + 1, start, found)
                ends = done == schedule.steps
                if ends or done % schedule.save_every == 0 or done % schedule.sample_every == 0:
                    _tell(*running, table, bar)
                    running = None
                if ends or done % schedule.save_every == 0:
                    self.save(state, data)
                if ends or done % schedule.sample_every == 0:
                    sample(state, self.folder / "samples" / f"step-{done:06d}")
        return state

    def save(self, state: TrainState, data: Place) -> None:
        """Writes where the run stands."""
        self.saved.save(state, {"run": self.about, "data": data.get_state()})


class Table:
    """log.csv: a row for each step. What a run wrote after the state that it goes on from is written again."""

    def __init__(self, path: Path, done: int):
        rows: Sequence[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= done]
        self.file = path.open("w", newline="", buffering=1)
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(rows)

    def add(self, **values: Any) -> None:
        """Writes a row."""
        self.writer.writerow(values)


def _tell(step: int, start: float, found: Progress, table: Table | None, bar: tqdm) -> None:
    """Waits for a step, and tells how it went."""
    losses = {"loss": found.loss.total, "video": found.loss.video, "sound": found.loss.sound}
    values = {name: float(np.asarray(x)) for name, x in losses.items()}
    values |= {"gradient_norm": float(found.gradient_norm), "learning_rate": float(found.learning_rate)}
    if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
        raise RunError(
            f"the loss or its gradient became NaN or infinite in step {step}: a lower learning rate or a longer warmup may do; "
            "the last state that was saved is from before"
        )
    if table is not None:
        table.add(step=step, seconds=f"{time.perf_counter() - start:.3f}", **{name: f"{x:.9g}" for name, x in values.items()})
    bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
    bar.update(1)

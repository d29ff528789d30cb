"""Where a run of training stands, on disk (Orbax): weights, moments and average, and the place in the data.

What is random comes from the seed and the place in the data (batches.py), so there is no state of a generator to keep.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from cosmos3_jax.array_store import plain_errors
from cosmos3_jax.errors import RunError
from cosmos3_jax.training.update import TrainState

KEPT = 2  # states: from the one before the last a run goes on where the last is deleted, for it is damaged


class Saved:
    """A folder of states, one for each step that was saved; the last two are kept."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        policy = ocp.training.preservation_policies.LatestN(KEPT)
        with plain_errors(folder, "cannot be read or written"):
            self._checkpointer = ocp.training.Checkpointer(
                self.folder, preservation_policy=policy, cleanup_tmp_directories=True
            )

    @property
    def latest(self) -> int | None:
        """The number of steps done in the last state; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Writes a state, and what JSON holds beside it; it is there whole or not at all. Raises RunError where it cannot."""
        with plain_errors(self.folder, "cannot be written", RunError):
            self._checkpointer.save(int(state.step), state, custom_metadata=about, overwrite=True)

    def about(self) -> dict[str, Any]:
        """What was saved beside the last state."""
        with plain_errors(self.folder, "no state that can be read"):
            return dict(self._checkpointer.metadata(self.latest).custom_metadata)

    def load(self, like: TrainState) -> TrainState:
        """The last state, placed as `like` was, which is gone: there may be no memory for both."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        jax.tree.map(lambda x: x.delete(), like)
        unreadable = "no state of this training that can be read; if it is damaged, delete it"
        with plain_errors(self.folder / str(self.latest), unreadable):
            return self._checkpointer.load(self.latest, abstract)

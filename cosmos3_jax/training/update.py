"""One step of the optimizer: gradients of a batch, clipped, AdamW, and the average of the weights; compiled as one program."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from cosmos3_jax.axes import sharding
from cosmos3_jax.training.objective import Batch, Loss, draw_noise, loss
from cosmos3_jax.training.trained import Trained, Values
from cosmos3_jax.weights import Network


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How weights are moved."""

    steps: int  # in all: what the learning rate's cosine ends at
    learning_rate: float = 1e-4  # the highest
    warmup: int = 100  # steps in which it rises, at most half of all
    weight_decay: float = 0.01  # of matrices
    clip_norm: float = 1.0  # the largest, of all gradients together
    average: float | None = None  # how much of the moving average of weights each step keeps (EMA); None: there is none

    def schedule(self) -> optax.Schedule:
        """The learning rate of each step: up in a line, down in a cosine to a hundredth."""
        warmup = min(self.warmup, self.steps // 2)
        first = self.learning_rate / (warmup + 1)
        return optax.warmup_cosine_decay_schedule(first, self.learning_rate, warmup, self.steps, self.learning_rate / 100)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) of clipped gradients."""
        adamw = optax.adamw(self.schedule(), b1=0.9, b2=0.99, weight_decay=self.weight_decay, mask=_matrices)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


def _matrices(values: Values) -> Any:
    """Which values decay: scales and biases do not, stacked ones neither."""
    return {
        part: {path: jax.tree.map(lambda x, path=path: x.ndim - path.startswith("layers.") > 1, x) for path, x in of.items()}
        for part, of in values.items()
    }


@struct.dataclass
class TrainState:
    """A run between two steps; float32."""

    step: jax.Array  # how many are done
    values: Values
    optimizer: Any  # optax's
    average: Values | None = None


@struct.dataclass
class Progress:
    """What a step tells."""

    loss: Loss
    gradient_norm: jax.Array  # before it is clipped
    learning_rate: jax.Array


def begin(values: Values, how: Optimization, mesh: Mesh) -> TrainState:
    """The state before the first step: moments and average are placed as their values are, counts are everywhere."""
    average = None if how.average is None else jax.tree.map(jnp.copy, values)
    state = TrainState(jnp.int32(0), values, how.optimizer().init(values), average)
    return jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, sharding(mesh, "")), state)


Update = Callable[[TrainState, Mapping[str, Network], Batch], tuple[TrainState, Progress]]


def update(trained: Trained, how: Optimization, state: TrainState, *, train_und: bool, sound_weight: float = 1.0) -> Update:
    """A compiled step: (state, frozen networks, batches [n, B, …]) -> the next state, and how it went.

    The gradients are the mean over the n batches, one after the other (gradient accumulation). A state is given up, and what
    becomes of it is placed as `state` is.
    """
    optimizer, schedule = how.optimizer(), how.schedule()
    placement = jax.tree.map(lambda x: x.sharding, state)

    def loss_of(values: Values, frozen: Mapping[str, Network], batch: Batch) -> tuple[jax.Array, Loss]:
        networks = trained.networks(values, frozen)
        noise = draw_noise(batch.latents, batch.seed_B)
        found = loss(networks["und"], networks["gen"], batch, noise, train_und=train_und, sound_weight=sound_weight)
        return found.total, found

    def run(state: TrainState, frozen: Mapping[str, Network], batches: Batch) -> tuple[TrainState, Progress]:
        def add(total: Any, batch: Batch) -> tuple[Any, Loss]:
            gradient, found = jax.grad(loss_of, has_aux=True)(state.values, frozen, batch)
            return jax.tree.map(jnp.add, total, gradient), found

        total, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.values), batches)
        count = batches.sigma_B.shape[0]
        gradient, found = jax.tree.map(lambda x: x / count, total), jax.tree.map(jnp.mean, losses)
        progress = Progress(found, optax.global_norm(gradient), schedule(state.step))
        updates, moments = optimizer.update(gradient, state.optimizer, state.values)
        values = optax.apply_updates(state.values, updates)
        average = state.average
        if how.average is not None:  # while there are few steps, over fewer
            keep = jnp.minimum(how.average, (1 + state.step) / (10 + state.step))
            average = optax.incremental_update(values, average, 1 - keep)
        return TrainState(state.step + 1, values, moments, average), progress

    return jax.jit(run, donate_argnums=0, out_shardings=(placement, None))

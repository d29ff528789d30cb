"""From noise to latents: sigma grids, UniPC and the distilled steps as tables, guidance, and the loop over a velocity function.

UniPC (order 2, "bh2", on the prediction of the clean latents; Zhao et al. 2023, arXiv:2302.04867) is linear in the latents and
in past predictions, with scalars known in advance. They are computed once in float64 on the host; a step on the device is three
sums, of video and sound alike. The state is float32 whatever the network's dtype. Nothing here knows a network: `denoise` is
handed a velocity function.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.flatten_util import ravel_pytree

from cosmos3_jax.axes import agreed, constrain
from cosmos3_jax.config import SchedulerConfig
from cosmos3_jax.errors import RunError
from cosmos3_jax.latents import Latents

GRIDS = ("native", "linear", "karras")

Table = Any  # numpy on the host, traced inside jit

Velocity = Callable[[Any, Latents, jax.Array, jax.Array], Latents]
"""(inputs, latents, timestep, is_given_t) -> velocity of each branch, float32."""


def sigma_grid(kind: str, count: int, flow_shift: float, config: SchedulerConfig) -> np.ndarray:
    """The noise levels of `count` steps, float64 in (0, 1], 1 is noise.

    "native" is NVIDIA's own grid, "linear" that of diffusers with `use_karras_sigmas=False`, "karras" that of the published
    scheduler config, in which `flow_shift` has no effect. Source: diffusers 0.42.1, scheduling_unipc_multistep.py.
    """
    if kind == "karras":
        low, high = config.sigma_min ** (1 / 7), config.sigma_max ** (1 / 7)
        ratio = (high + np.linspace(0, 1, count) * (low - high)) ** 7
        return ratio / (1 + ratio)
    end = 1 / config.num_train_timesteps
    u = np.linspace(1 - end, 0, count + 1)[:-1] if kind == "native" else np.linspace(1, end, count + 1)[:-1]
    sigma = flow_shift * u / (1 + (flow_shift - 1) * u)
    if abs(sigma[0] - 1) < 1e-6:  # log(1 - sigma) must stay finite
        sigma[0] -= 1e-6
    return sigma


@struct.dataclass
class Steps:
    """One row for each denoising step: what the network is told, guidance, and UniPC's coefficients. float32."""

    timestep: Table  # [n] sigma x 1000, in UniPC cut off to a whole number
    sigma: Table  # [n] noise level of the step's sample
    guidance_scale: Table  # [n]
    corrector: Table  # [n, 5] of (sample, last corrected sample, prediction, the one before, the one before that)
    predictor: Table  # [n, 3] of (corrected sample, prediction, the one before)
    fresh: Table = None  # Latents with [n] in front: noise to add to the next sample, in a distilled checkpoint's steps
    reuse: Table = None  # [n] how little the sample must have moved for the last velocity to serve again; 0: never

    def __len__(self) -> int:
        return len(self.timestep)

    def __getitem__(self, rows: slice) -> "Steps":
        return jax.tree.map(lambda column: column[rows], self)


def unipc_steps(sigma: np.ndarray, guidance_scale: float = 1.0, num_train_timesteps: int = 1000) -> Steps:
    """UniPC over these noise levels, which end in an implied 0: the last step returns the prediction itself."""
    timestep = np.trunc(sigma * num_train_timesteps).astype(np.float32)
    sigma = np.append(sigma, 0).astype(np.float32).astype(np.float64)  # the reference rounds its sigmas to float32
    count = len(sigma) - 1
    with np.errstate(divide="ignore"):
        alpha, log_snr = 1 - sigma, np.log(1 - sigma) - np.log(sigma)
    order = [min(2, i + 1, count - i) for i in range(count)]
    corrector, predictor = np.zeros((count, 5)), np.zeros((count, 3))
    corrector[0, 0] = 1
    for i in range(count):
        # From sigma[i] to sigma[i + 1]; the corrector of step i redoes the move of the predictor of step i - 1.
        predictor[i] = _predict(sigma[i : i + 2], alpha[i + 1], log_snr[max(i - 1, 0) : i + 2], order[i])
        if i > 0:
            corrector[i, 1:] = _correct(sigma[i - 1 : i + 1], alpha[i], log_snr[max(i - 2, 0) : i + 1], order[i - 1])
    columns = sigma[:-1], np.full(count, guidance_scale), corrector, predictor
    return Steps(timestep, *(column.astype(np.float32) for column in columns))


def with_reuse(steps: Steps, threshold: float) -> Steps:
    """`steps` that may take the velocity of an earlier one: all but the first two and the last, which end what is built on.

    While the sample moved by less than `threshold`, relative to its mean magnitude, since that velocity was computed. As
    TeaCache (Liu et al. 2024, arXiv:2411.19108), on the latents instead of the network's first activations.
    """
    reuse = np.full(len(steps), threshold, np.float32)
    reuse[[*range(min(2, len(steps))), -1]] = 0
    return dataclasses.replace(steps, reuse=reuse)


def distilled_steps(sigma: np.ndarray, noise: Latents, num_train_timesteps: int = 1000) -> Steps:
    """Stochastic steps over these noise levels: each goes to the prediction, and back up to the next level with fresh noise.

    `noise`, with [n - 1] before each shape, is drawn anew for each step but the last, which returns the prediction itself.
    There is no guidance: it is in the weights. Source: diffusers 0.42.1, scheduling_flow_match_euler_discrete.py,
    `stochastic_sampling`.
    """
    sigma = np.append(sigma, 0).astype(np.float32)
    count = len(sigma) - 1
    corrector, predictor = np.zeros((count, 5), np.float32), np.zeros((count, 3), np.float32)
    corrector[:, 0] = 1
    predictor[:, 1] = 1 - sigma[1:]

    def scaled(x: np.ndarray) -> np.ndarray:
        levels = sigma[1:-1].reshape(-1, *[1] * (x.ndim - 1))
        return np.concatenate([levels * x, np.zeros((1, *x.shape[1:]), np.float32)])

    fresh = jax.tree.map(scaled, noise)
    # Unlike UniPC's, these timesteps are not cut off to whole numbers.
    return Steps(
        sigma[:-1] * np.float32(num_train_timesteps), sigma[:-1], np.ones(count, np.float32), corrector, predictor, fresh
    )


def _predict(sigma: np.ndarray, alpha: float, log_snr: np.ndarray, order: int) -> tuple[float, float, float]:
    """Coefficients of (x, m, m_before) for the sample at sigma[1], from that at sigma[0]."""
    step = log_snr[-1] - log_snr[-2]
    gain = -alpha * np.expm1(-step)  # -alpha B(h), B(h) = e^h - 1 with h = -step; 1 at the last step, where sigma is 0
    if order == 1:
        return sigma[1] / sigma[0], gain, 0.0
    slope = 0.5 * gain * step / (log_snr[-3] - log_snr[-2])
    return sigma[1] / sigma[0], gain - slope, slope


def _correct(sigma: np.ndarray, alpha: float, log_snr: np.ndarray, order: int) -> tuple[float, float, float, float]:
    """Coefficients of (x_before, m, m_before, m_before_that) for the sample at sigma[1], now that m is known there."""
    step = log_snr[-1] - log_snr[-2]
    b = np.expm1(-step)
    gain = -alpha * b
    if order == 1:
        return sigma[1] / sigma[0], 0.5 * gain, 0.5 * gain, 0.0
    ratio = (log_snr[-3] - log_snr[-2]) / step
    first = (b / -step - 1) / b
    second = 2 * ((b / -step - 1) / -step - 0.5) / b
    rho_old, rho_new = np.linalg.solve([[1, 1], [ratio, 1]], [first, second])
    return sigma[1] / sigma[0], gain * rho_new, gain * (1 - rho_new - rho_old / ratio), gain * rho_old / ratio


@struct.dataclass
class Given:
    """Frames that came with the request: clean latents, and which latent frames they are (none: all False)."""

    latents_thwc: jax.Array
    is_given_t: jax.Array

    def write(self, x: Latents) -> Latents:
        """`x` with the given frames written into its video."""
        return dataclasses.replace(x, video=jnp.where(self.is_given_t[:, None, None, None], self.latents_thwc, x.video))


@struct.dataclass
class Memory:
    """What a step that computes nothing falls back on."""

    sample: Latents  # that the last velocity was computed of
    velocity: Latents  # with guidance


@struct.dataclass
class State:
    """The sampler between two steps, all float32."""

    sample: Latents  # what the network sees next: the predictor's output
    corrected: Latents  # the last corrected sample
    prediction: Latents  # the last predicted clean latents, and those before
    prediction_before: Latents
    computed: jax.Array  # how many steps computed a velocity so far
    memory: Memory | None = None  # there if steps may reuse one


def meet(velocity: Latents) -> jax.Array:
    """The branches' velocities on every device, video and sound in one row: [B, values]. One all-gather for both."""
    return constrain(jax.vmap(lambda branch: ravel_pytree(branch)[0])(velocity), "")


def guide(velocity_B: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance: the unconditional velocity plus `scale` times the way to the conditional one."""
    if velocity_B.shape[0] == 1:
        return velocity_B[0]
    return velocity_B[1] + scale * (velocity_B[0] - velocity_B[1])


def combine(coefficients: Sequence[Any] | jax.Array, *terms: Latents) -> Latents:
    """The sum of `terms`, each times its coefficient."""
    return jax.tree.map(lambda *xs: sum(c * x for c, x in zip(coefficients, xs, strict=True)), *terms)


def advance(state: State, step: Steps, velocity: Latents, given: Given) -> State:
    """One UniPC step: predict the clean latents, correct this sample with them, predict the next sample.

    All of it is elementwise, so that what it makes of given frames stays there, and is written over.
    """
    prediction = combine((1, -step.sigma), state.sample, velocity)
    corrected = combine(step.corrector, state.sample, state.corrected, prediction, state.prediction, state.prediction_before)
    sample = combine(step.predictor, corrected, prediction, state.prediction)
    if step.fresh is not None:
        sample = combine((1, 1), sample, step.fresh)
    return State(given.write(sample), corrected, prediction, state.prediction, state.computed, state.memory)


def moved(x: Latents, since: Latents) -> jax.Array:
    """How far the values of `x` are from what they were, relative to their magnitude, summed; the same on every device."""

    def size(tree: Latents) -> jax.Array:
        return jnp.sum(jnp.abs(ravel_pytree(tree)[0]))

    return agreed(size(combine((1, -1), x, since)) / size(since))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_steps(velocity: Velocity, inputs: Any, state: State, steps: Steps, given: Given) -> tuple[State, jax.Array]:
    """The state after `steps`, and of each whether it left finite numbers [n] (the state itself is donated onwards)."""

    def guided(state: State, step: Steps) -> Latents:
        velocity_B = meet(velocity(inputs, state.sample, step.timestep, given.is_given_t))
        _, as_latents = ravel_pytree(state.sample)
        return as_latents(guide(velocity_B, step.guidance_scale))

    def body(state: State, step: Steps) -> tuple[State, jax.Array]:
        memory, count = state.memory, state.computed
        if memory is None:
            count, guided_velocity = count + 1, guided(state, step)
        else:
            serves = moved(state.sample, memory.sample) < step.reuse
            memory, count = jax.lax.cond(
                serves, lambda: (memory, count), lambda: (Memory(state.sample, guided(state, step)), count + 1)
            )
            guided_velocity = memory.velocity
        state = advance(dataclasses.replace(state, memory=memory, computed=count), step, guided_velocity, given)
        return state, jnp.isfinite(ravel_pytree(state.sample)[0]).all()

    state, finite_n = jax.lax.scan(body, state, steps)
    # placed as it came, so that no step compiles again
    return jax.tree.map(lambda x: constrain(x, ""), (state, finite_n))


@functools.partial(jax.jit, static_argnames="reuse")
def begin(noise: Latents, given: Given, *, reuse: bool) -> State:
    """The state before the first step, placed as a step leaves it."""
    nothing = jax.tree.map(jnp.zeros_like, noise)
    memory = Memory(noise, nothing) if reuse else None
    return jax.tree.map(lambda x: constrain(x, ""), State(given.write(noise), nothing, nothing, nothing, jnp.int32(0), memory))


OnStep = Callable[[int, jax.Array], jax.Array | bool | None]
"""(index of the last step done, a copy of its video latents) -> new ones, False to stop, or None."""


def denoise(
    velocity: Velocity,
    inputs: Any,
    noise: Latents,
    given: Given,
    steps: Steps,
    *,
    steps_per_call: int = 1,
    on_step: OnStep | None = None,
    on_progress: Callable[[int], object] = lambda done: None,
) -> State:
    """The state after all `steps`; its sample is the result.

    `velocity` must be the same (hashable) function in every call, for its compiled program to be found again; `inputs` is
    whatever it needs. `steps_per_call` steps run in one program; `on_step` is called after each such call, `on_progress` with
    the number of steps done, a call late, so that the device always has work. Raises RunError where latents become NaN or
    infinite.
    """
    state, done, running = begin(noise, given, reuse=steps.reuse is not None), 0, None
    while done < len(steps):
        rows = steps[done : done + steps_per_call]
        state, finite_n = run_steps(velocity, inputs, state, rows, given)
        if running is not None:
            _check_finite(running, steps.timestep[:done])
            on_progress(done)
        done, running = done + len(rows), finite_n
        answer = on_step(done - 1, jnp.copy(state.sample.video)) if on_step is not None else None
        if answer is False:
            break
        if answer is not None and answer is not True:
            sample = dataclasses.replace(state.sample, video=jnp.asarray(answer, jnp.float32))
            state = dataclasses.replace(state, sample=given.write(sample))
    jax.block_until_ready(state)
    if running is not None:
        _check_finite(running, steps.timestep[:done])
    on_progress(done)
    return state


def _check_finite(finite_n: jax.Array, timestep: Table) -> None:
    """Waits for the last n of the steps with these timesteps. Raises RunError with the first that left no finite latents."""
    finite = np.asarray(finite_n)
    if not finite.all():
        step = len(timestep) - len(finite) + int(finite.argmin())
        raise RunError(
            f"the latents became NaN or infinite in step {step + 1} (timestep {timestep[step]:g}): weights that are "
            "damaged, or numbers too large for their dtype; compare the checkpoint's checksums, and try dtype float32"
        )

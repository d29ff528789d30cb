"""The step cache: which steps compute a velocity, which take the last one's, and that all devices decide alike."""

import dataclasses
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from metrics import errors, random

from cosmos3_jax import InputError, make_mesh, sampler
from cosmos3_jax.axes import agreed, place, sharding
from cosmos3_jax.config import UNIPC, SchedulerConfig
from cosmos3_jax.cost import collectives
from cosmos3_jax.latents import Latents
from cosmos3_jax.request import Request, resolve
from cosmos3_jax.sampler import Given, State, Steps, moved, sigma_grid, unipc_steps, with_reuse

NOISE, OTHER = (Latents(random(3, 2, 5, 4, seed=seed), random(7, 6, seed=seed + 2)) for seed in (0, 1))
NOTHING_GIVEN = Given(np.zeros_like(NOISE.video), np.zeros(3, bool))
SMALL = {"num_frames": 5, "height": 32, "width": 32, "progress": False}


def steps_of(count: int, threshold: float | None = None) -> Steps:
    steps = unipc_steps(sigma_grid("native", count, 5.0, SchedulerConfig()), 3.0)
    return steps if threshold is None else with_reuse(steps, threshold)


def curved(inputs, x, timestep, is_given_t):
    """A velocity of two branches that depends on all there is."""
    return jax.tree.map(lambda x: jnp.stack([jnp.tanh(inputs * x) + timestep / 1000, jnp.sin(x)]), x)


def slow(inputs, x, timestep, is_given_t):
    """One branch, in which latents never move by as much as they are large; other at each timestep."""
    return jax.tree.map(lambda x: 0.1 * (jnp.tanh(inputs * x) + timestep / 1000)[None], x)


def run(velocity, steps: Steps, noise: Latents = NOISE, given: Given = NOTHING_GIVEN, **settings) -> State:
    return sampler.denoise(velocity, 0.5, noise, given, steps, **settings)


def assert_same(found: Latents, expected: Latents) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Which steps compute


@pytest.mark.parametrize(
    ("count", "rows"), [(1, [0]), (2, [0, 0]), (3, [0, 0, 0]), (4, [0, 0, 0.5, 0]), (6, [0, 0, 0.5, 0.5, 0.5, 0])]
)
def test_the_first_two_and_the_last_never_reuse(count, rows):
    steps = steps_of(count, 0.5)
    np.testing.assert_array_equal(steps.reuse, np.float32(rows))
    assert_same(dataclasses.replace(steps, reuse=None), steps_of(count))
    for end in range(1, count):
        np.testing.assert_array_equal(steps[:end].reuse, np.float32(rows[:end]))


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 1e-3])
@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_below_any_movement_nothing_is_reused(threshold, steps_per_call):
    plain = run(curved, steps_of(8), steps_per_call=steps_per_call)
    found = run(curved, steps_of(8, threshold), steps_per_call=steps_per_call)
    assert int(found.computed) == 8
    assert plain.memory is None
    assert_same(found.sample, plain.sample)


@pytest.mark.parametrize(("count", "computed"), [(1, 1), (2, 2), (3, 3), (4, 3), (12, 3)])
def test_above_any_movement_three_steps_compute(count, computed):
    assert int(run(slow, steps_of(count, 1.0)).computed) == computed


def test_the_higher_the_threshold_the_fewer_compute():
    computed = [int(run(curved, steps_of(20, threshold)).computed) for threshold in (1e-9, 0.05, 0.1, 0.2, 0.5)]
    assert computed == sorted(computed, reverse=True)
    assert (computed[0], len(set(computed))) == (20, 5)


def followed(noise: np.ndarray, steps: Steps) -> tuple[np.ndarray, list[float], float]:
    """By hand, in float64: the last latents, the timesteps that compute `slow`, and how near to its threshold a step came."""
    x = corrected = since = np.float64(noise)
    predictions, timesteps, margin = [np.zeros(noise.shape)] * 3, [], np.inf
    for i in range(len(steps)):
        movement = np.abs(x - since).sum() / np.abs(since).sum()
        margin = min(margin, abs(movement - steps.reuse[i]) if steps.reuse[i] else np.inf)
        if movement >= steps.reuse[i]:
            since, velocity = x, 0.1 * (np.tanh(0.5 * x) + steps.timestep[i] / 1000)
            timesteps.append(steps.timestep[i])
        predictions = [x - steps.sigma[i] * velocity, *predictions[:2]]
        corrected = np.tensordot(steps.corrector[i].astype(np.float64), [x, corrected, *predictions], 1)
        x = np.tensordot(steps.predictor[i].astype(np.float64), [corrected, *predictions[:2]], 1)
    return x, timesteps, margin


@pytest.mark.parametrize("threshold", [0.004, 0.01, 0.03, 1.0])
@pytest.mark.parametrize("steps_per_call", [1, 3, 16])
def test_the_network_runs_in_the_steps_that_moved_and_in_no_others(threshold, steps_per_call):
    """Which are told by the network itself; the others advance by the velocity that was computed last."""
    steps, ran = steps_of(16, threshold), []

    def told(inputs, x, timestep, is_given_t):
        jax.debug.callback(ran.append, timestep)
        return slow(inputs, x, timestep, is_given_t)

    state = run(told, steps, steps_per_call=steps_per_call)
    jax.effects_barrier()
    both, as_latents = ravel_pytree(NOISE)
    expected, timesteps, margin = followed(np.asarray(both), steps)
    assert margin > 1e-5  # else rounding decides
    assert sorted(map(float, ran), reverse=True) == timesteps
    assert int(state.computed) == len(timesteps) < 16
    np.testing.assert_allclose(ravel_pytree(state.sample)[0], expected, atol=5e-6)  # the state is float32, float64 by hand
    assert_same(jax.tree.map(np.shape, state.sample), jax.tree.map(np.shape, as_latents(both)))


@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_steps_in_one_program_decide_alike(threshold):
    one, *others = (run(curved, steps_of(8, threshold), steps_per_call=count) for count in (1, 3, 8))
    assert 3 < int(one.computed) < 8 or threshold == 0.1
    for other in others:
        assert int(other.computed) == int(one.computed)
        for x, y in zip(jax.tree.leaves(other.sample), jax.tree.leaves(one.sample), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6)  # float32 rounding: XLA may fuse loops otherwise


def test_a_constant_velocity_loses_nothing():
    def constant(inputs, x, timestep, is_given_t):
        return jax.tree.map(lambda x: 0.1 * x[None], OTHER)

    found = run(constant, steps_of(12, 1.0))
    assert int(found.computed) == 3
    assert_same(found.sample, run(constant, steps_of(12)).sample)


def test_given_frames_stay_as_they_are():
    given = Given(OTHER.video, np.array([True, False, True]))
    state = run(slow, steps_of(8, 1.0), given=given)
    assert int(state.computed) == 3
    np.testing.assert_array_equal(state.sample.video[given.is_given_t], OTHER.video[given.is_given_t])


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_the_next_step_computes_where_a_callback_moved_the_latents(steps_per_call):
    def computed(answer) -> int:
        def on_step(step, x_thwc):
            return answer(x_thwc) if step == 3 else None

        return int(run(slow, steps_of(8, 1.0), steps_per_call=steps_per_call, on_step=on_step).computed)

    assert computed(lambda x: x) == 3
    assert computed(lambda x: 1.01 * x) == 3  # by less than the threshold
    assert computed(lambda x: 10 * x) == 4


def test_a_run_that_ends_early_tells_what_it_computed():
    state = run(slow, steps_of(8, 1.0), on_step=lambda step, _: step < 4)
    assert int(state.computed) == 2


# Several devices


def test_movement_is_that_of_the_mean_value():
    doubled = jax.tree.map(lambda x: 2 * x, NOISE)
    assert float(moved(NOISE, NOISE)) == 0
    assert float(moved(doubled, NOISE)) == pytest.approx(1)
    assert float(moved(NOISE, doubled)) == pytest.approx(0.5)
    sizes = [np.abs(x).sum() for x in (NOISE.video, NOISE.sound)]
    assert float(moved(Latents(2 * NOISE.video, NOISE.sound), NOISE)) == pytest.approx(sizes[0] / sum(sizes))


def on_each(mesh, values) -> jax.Array:
    """A scalar that is whole on every device, and on each another."""
    parts = [jax.device_put(np.float32(x), device) for x, device in zip(values, mesh.devices.flat, strict=True)]
    return jax.make_array_from_single_device_arrays((), sharding(mesh, ""), parts)


@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_devices_that_disagree_agree_on_the_largest(cfg, tp):
    mesh, random_order = make_mesh(cfg, tp), np.random.RandomState(cfg * tp).permutation(cfg * tp)
    with jax.set_mesh(mesh):
        found = jax.jit(agreed)(on_each(mesh, random_order))
    assert [float(part.data) for part in found.addressable_shards] == [cfg * tp - 1] * (cfg * tp)


def test_alone_there_is_nobody_to_agree_with():
    assert float(agreed(jnp.float32(3))) == 3


def test_agreeing_takes_one_number():
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        placed = place(mesh, NOISE)
        (found,) = collectives(jax.jit(moved).lower(placed, placed).compile().as_text())
    assert (found.kind, found.count, found.nbytes) == ("all-reduce", 1, 4)


def test_devices_that_disagree_take_the_same_steps():
    """Latents that are the same up to a value of one device, which moves by more than the threshold there alone."""
    mesh, threshold = make_mesh(2, 2), 0.1

    def decide(x: jax.Array, since: jax.Array) -> jax.Array:
        return jax.lax.cond(moved(Latents(x), Latents(since)) < threshold, lambda: 0.0, lambda: 1.0)

    with jax.set_mesh(mesh):
        found = jax.jit(decide)(on_each(mesh, [1, 1, 1, 1.5]), on_each(mesh, [1, 1, 1, 1]))
    assert [float(part.data) for part in found.addressable_shards] == [1] * 4


# Videos


def latents(pipe, threshold: float, **asked):
    return pipe(**cases.CASES["many_steps"] | {"output_type": "latent", "progress": False, "step_cache": threshold} | asked)


@pytest.mark.parametrize("enable_sound", [False, True], ids=["silent", "sound"])
def test_a_pipeline_says_how_many_steps_computed(enable_sound, pipes):
    exact, every, some, few = (latents(pipes("wide"), threshold, enable_sound=enable_sound) for threshold in (0, 1e-9, 0.1, 1))
    assert (exact.computed_steps, every.computed_steps) == (12, 12)
    assert 3 <= few.computed_steps < some.computed_steps < 12
    for output in ("video", "sound") if enable_sound else ("video",):
        np.testing.assert_array_equal(getattr(every, output), getattr(exact, output))
        rms = [errors(getattr(result, output), getattr(exact, output))[0] for result in (some, few)]
        assert 1e-4 < rms[0] < rms[1] < 0.5  # a twentieth of the way from noise to latents is skipped, or most of it


@pytest.mark.parametrize("enable_sound", [False, True], ids=["silent", "sound"])
@pytest.mark.parametrize(("cfg", "tp"), [(2, 2), (2, 4)])
def test_every_mesh_takes_the_same_steps(cfg, tp, enable_sound, pipes):
    # No step comes as near to a threshold as meshes round apart: 1e-6. Else the bounds are those of all steps (test_mesh.py).
    for threshold in (0.1, 0.3):
        alone, together = (
            latents(pipe, threshold, enable_sound=enable_sound) for pipe in (pipes("wide"), pipes("wide", cfg=cfg, tp=tp))
        )
        assert alone.computed_steps == together.computed_steps < 12
        for output in ("video", "sound") if enable_sound else ("video",):
            rms, largest = errors(getattr(together, output), getattr(alone, output))
            assert rms < 5e-6
            assert largest < 5e-5


@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (2, 4)])
def test_another_threshold_compiles_nothing(cfg, tp, pipes, compilations):
    pipe = pipes("small", cfg=cfg, tp=tp)
    pipe("short", num_inference_steps=4, **SMALL)
    pipe("short", num_inference_steps=4, step_cache=0.05, **SMALL)
    compilations.clear()
    pipe("a prompt of another length", num_inference_steps=6, step_cache=0.3, seed=1, **SMALL)
    pipe("without", num_inference_steps=6, **SMALL)
    assert compilations == []


def test_every_step_counts_that_computed(pipes):
    """Without a cache: all, of a whole run; and of one that its callback ends, those until then."""
    pipe = pipes("small")
    assert pipe("short", num_inference_steps=3, **SMALL).computed_steps == 3
    for threshold in (0.0, 0.5):
        ended = pipe(
            "short", num_inference_steps=3, step_cache=threshold, callback_on_step_end=lambda step, *_: step < 1, **SMALL
        )
        assert ended.computed_steps == 2


# What is refused


def asked(value, scheduler: SchedulerConfig = UNIPC):
    return resolve(Request("", num_frames=5, height=32, width=32, step_cache=value), cases.DISTILLED, cases.VAE, scheduler)


@pytest.mark.parametrize("value", [0, 0.0, 1e-9, 0.05, 1, np.float32(0.5)], ids=repr)
def test_values_from_none_to_all(value):
    assert asked(value).step_cache == value


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf, "0.05", None, True, [0.05]], ids=repr)
def test_other_values_are_refused(value):
    with pytest.raises(InputError, match=rf"^step_cache={re.escape(repr(value))}: a number from 0 to 1 is expected$"):
        asked(value)


def test_a_distilled_checkpoint_refuses_it(pipes):
    sentence = "step_cache=0.05: of a distilled checkpoint's few steps each counts; leave it out"
    with pytest.raises(InputError, match=f"^{sentence}$"):
        pipes("distilled")("waves", step_cache=0.05, **SMALL)
    assert asked(0.0, dataclasses.replace(UNIPC, distilled_sigmas=(1.0, 0.5))).step_cache == 0

"""The sampler against the reference's tables, and on velocity fields whose exact flow is known."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from metrics import random

from cosmos3_jax import sampler
from cosmos3_jax.axes import make_mesh, place, sharding
from cosmos3_jax.config import SchedulerConfig
from cosmos3_jax.cost import collectives
from cosmos3_jax.errors import RunError
from cosmos3_jax.latents import Latents
from cosmos3_jax.sampler import (
    GRIDS,
    Given,
    State,
    Steps,
    advance,
    distilled_steps,
    guide,
    meet,
    sigma_grid,
    unipc_steps,
)

DATA = Path(__file__).parent / "data"
TABLES = json.loads((DATA / "scheduler_tables.json").read_text())
COEFFICIENTS = json.loads((DATA / "unipc_coeffs.json").read_text())

NOISE, CLEAN = (Latents(random(3, 2, 5, 4, seed=seed), random(7, 6, seed=seed + 2)) for seed in (0, 1))
NOTHING_GIVEN = Given(np.zeros_like(CLEAN.video), np.zeros(3, bool))


def steps_of(count: int, kind: str = "native", flow_shift: float = 5.0, guidance_scale: float = 1.0) -> Steps:
    return unipc_steps(sigma_grid(kind, count, flow_shift, SchedulerConfig()), guidance_scale)


def each(function: Callable, *latents: Latents) -> Latents:
    """What a function of arrays makes of the videos, and of the sounds."""
    return jax.tree.map(function, *latents)


def assert_close(found: Latents, expected: Latents, atol: float = 0) -> None:
    """The same shapes, and values as close; without `atol` the same to the bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, x in vars(expected).items():
        if x is not None:
            np.testing.assert_allclose(getattr(found, name), x, rtol=0, atol=atol, strict=True, err_msg=name)


def curved(inputs, x, timestep, is_given_t):
    """A velocity of two branches that depends on all there is."""
    return each(lambda x: jnp.stack([jnp.tanh(inputs * x) + timestep / 1000, jnp.sin(x)]), x)


def straight(inputs, x, timestep, is_given_t):
    """The velocity of the straight way from clean latents to noise, one branch."""
    return each(lambda x: x[None], inputs)


def denoise(*arguments, **settings) -> Latents:
    """The latents at the end."""
    return sampler.denoise(*arguments, **settings).sample


def run(count: int, noise: Latents = NOISE, given: Given = NOTHING_GIVEN, **settings) -> Latents:
    return denoise(curved, 0.5, noise, given, steps_of(count, guidance_scale=3.0), **settings)


@pytest.mark.parametrize("name", TABLES)
def test_noise_levels_are_the_references(name):
    table = TABLES[name]
    plain = "native" if table["native_flow_schedule"] else "linear"
    kind = plain if "use_karras_sigmas" in table["kwargs"] else "karras"
    steps = steps_of(table["n"], kind, table["kwargs"].get("flow_shift", 1.0))
    np.testing.assert_array_equal(steps.timestep, table["timesteps"])
    np.testing.assert_allclose(steps.sigma, table["sigmas"][:-1], rtol=2**-23)  # one rounding to float32


def test_flow_shift_has_no_effect_on_karras():
    np.testing.assert_array_equal(steps_of(20, "karras", 10.0).sigma, steps_of(20, "karras", 1.0).sigma)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficients_are_the_references(name):
    table = COEFFICIENTS[name]
    steps = unipc_steps(np.array(table["sigmas"][:-1]))
    rounding = {"rtol": 2**-23, "atol": 1e-9}  # to float32; and cancellation in float64, where a coefficient is near 0
    np.testing.assert_allclose(steps.predictor, table["predictor"], **rounding)
    first = np.arange(len(steps)) == 0  # the noise itself, which nothing corrects: the reference's row is all zeros
    np.testing.assert_allclose(steps.corrector, np.column_stack([first, table["corrector"]]), **rounding)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_latents_follow_the_references_recursion(name):
    table = COEFFICIENTS[name]

    def velocity(x, timestep):
        return x / (1 + x**2) - timestep / 1000

    def followed(noise):
        sample = corrected = np.float64(noise)
        predictions = np.zeros((3, *noise.shape))  # this one, the one before, the one before that
        for i in range(len(table["timesteps"])):
            prediction = sample - table["sigmas"][i] * velocity(sample, table["timesteps"][i])
            predictions = np.stack([prediction, *predictions[:2]])
            if i > 0:
                corrected = np.tensordot(table["corrector"][i], [corrected, *predictions], 1)
            sample = np.tensordot(table["predictor"][i], [corrected, *predictions[:2]], 1)
        return np.float32(sample)

    def both(inputs, x, timestep, is_given_t):
        return each(lambda x: velocity(x, timestep)[None], x)

    result = denoise(both, None, NOISE, NOTHING_GIVEN, unipc_steps(np.array(table["sigmas"][:-1])))
    assert_close(result, each(followed, NOISE), atol=5e-6)  # the state is float32 here, float64 above


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("count", [1, 2, 3, 35])
def test_last_step_returns_the_prediction_itself(kind, count):
    last = jax.tree.map(lambda column: column[-1], steps_of(count, kind))
    state = State(*(each(lambda x, i=i: x + i, NOISE) for i in range(4)), jnp.int32(0))
    state = advance(state, last, CLEAN, NOTHING_GIVEN)
    assert_close(state.sample, state.prediction)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_straight_flow_is_followed_exactly(kind, count):
    # On the line x = (1 - sigma) m + sigma e the velocity is e - m and every prediction is m, so a solver that is exact for
    # constant predictions never leaves the line and ends on m.
    steps = steps_of(count, kind)
    rounding = 2e-6  # float32, summed up over the steps

    def line(sigma):
        return each(lambda clean, noise: (1 - sigma) * clean + sigma * noise, CLEAN, NOISE)

    path, direction = [], each(np.subtract, NOISE, CLEAN)
    end = denoise(straight, direction, line(steps.sigma[0]), NOTHING_GIVEN, steps, on_step=lambda _, x: path.append(x))
    np.testing.assert_allclose(path, [line(sigma).video for sigma in [*steps.sigma[1:], 0]], atol=rounding)
    assert_close(end, CLEAN, atol=rounding)


def test_half_the_step_makes_a_quarter_of_the_error():
    # Clean data from N(0, s^2) has the flow x(sigma) = sqrt((1 - sigma)^2 s^2 + sigma^2) e, which is not straight. UniPC is of
    # order 2 or better, so at least 4 times less error is expected; 3.5 leaves room for its first and last step, of order 1.
    s = 0.5

    def error(count):
        def body(state, step):
            alpha, sigma = 1 - step.sigma, step.sigma
            velocity = each(lambda x: x * (sigma - alpha * s**2) / (alpha**2 * s**2 + sigma**2), state.sample)
            return advance(state, step, velocity, NOTHING_GIVEN), None

        steps = steps_of(count, "linear", 3.0)
        state, _ = jax.lax.scan(body, State(NOISE, *[each(jnp.zeros_like, NOISE)] * 3, jnp.int32(0)), steps)
        return max(jax.tree.leaves(each(lambda x, noise: np.abs(x - s * noise).max(), state.sample, NOISE)))

    assert error(10) > 3.5 * error(20) > 3.5**2 * error(40) > 0


def test_guidance_goes_from_the_unconditional_branch_through_the_conditional():
    conditional, unconditional = both = random(2, 50)
    np.testing.assert_array_equal(guide(both, 0.0), unconditional)
    np.testing.assert_allclose(guide(both, 1.0), conditional, atol=5e-7)  # u + (c - u) rounds
    np.testing.assert_allclose(guide(both, 6.0), 6 * conditional - 5 * unconditional, atol=5e-6)  # the same rounding, times 6
    np.testing.assert_array_equal(guide(np.stack([conditional, conditional]), 6.0), conditional)


def test_both_are_guided():
    # One step from noise to the prediction x - sigma v, where v = u + scale (c - u), of branches that are constant.
    steps = steps_of(1, guidance_scale=6.0)

    def velocity(branches, x, timestep, is_given_t):
        return branches

    branches = each(lambda c, u: np.stack([c, u]), CLEAN, each(np.cos, NOISE))
    found = denoise(velocity, branches, NOISE, NOTHING_GIVEN, steps)
    expected = each(lambda x, v: x - steps.sigma[0] * (6 * v[0] - 5 * v[1]), NOISE, branches)
    assert_close(found, expected, atol=1e-5)  # the rounding of u + (c - u), times 6


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("sound", [True, False], ids=["with_sound", "video_alone"])
def test_branches_that_met_come_apart_again(branches, sound):
    # Of other numbers everywhere, so that none can stand in another's place.
    x = NOISE if sound else dataclasses.replace(NOISE, sound=None)
    count = sum(part.size for part in jax.tree.leaves(x))
    _, as_latents = ravel_pytree(x)
    velocity = jax.vmap(as_latents)(jnp.arange(branches * count, dtype=jnp.float32).reshape(branches, count))
    met_BG = meet(velocity)
    assert met_BG.shape == (branches, count)
    for branch, row in enumerate(met_BG):
        assert_close(as_latents(row), each(lambda v, branch=branch: v[branch], velocity))


@pytest.mark.parametrize("sound", [True, False], ids=["with_sound", "video_alone"])
def test_branches_meet_once(sound):
    """On halves of the devices: one all-gather, of all numbers and no more."""
    mesh = make_mesh(cfg=2, tp=2)
    x = NOISE if sound else dataclasses.replace(NOISE, sound=None)
    velocity = each(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=sharding(mesh, "B")), x)
    with jax.set_mesh(mesh):
        (found,) = collectives(jax.jit(meet).lower(velocity).compile().as_text())
    assert (found.kind, found.count) == ("all-gather", 1)
    assert found.nbytes == 4 * 2 * sum(part.size for part in jax.tree.leaves(x))


@pytest.mark.parametrize("sound", [True, False], ids=["with_sound", "video_alone"])
def test_branches_on_two_devices_change_nothing(sound):
    mesh = make_mesh(cfg=2)
    noise = NOISE if sound else dataclasses.replace(NOISE, sound=None)

    def velocity(inputs, x, timestep, is_given_t):
        return each(lambda v: jax.lax.with_sharding_constraint(v, sharding(mesh, "B")), curved(inputs, x, timestep, is_given_t))

    with jax.set_mesh(mesh):
        start, given = place(mesh, noise), Given(*place(mesh, (NOTHING_GIVEN.latents_thwc, NOTHING_GIVEN.is_given_t)))
        found = denoise(velocity, 0.5, start, given, steps_of(4, guidance_scale=3.0))
    assert_close(found, run(4, noise), atol=2e-6)  # float32 rounding: other programs


DISTILLED = np.array([1.0, 0.9375, 0.8333333333333334, 0.625])
FRESH = each(lambda x: random(3, *x.shape, seed=x.ndim), NOISE)


# Video and sound together


def as_video(sound_sc: np.ndarray) -> Latents:
    """A sound as the latents of a video."""
    return Latents(sound_sc[:, None, None, :])


@pytest.mark.parametrize("kind", [*GRIDS, "distilled"])
def test_video_and_sound_advance_as_each_would_alone(kind):
    def ends(noise, fresh):
        steps = distilled_steps(DISTILLED, fresh) if kind == "distilled" else steps_of(6, kind, guidance_scale=3.0)
        given = Given(np.zeros_like(noise.video), np.zeros(len(noise.video), bool))
        return denoise(curved, 0.5, noise, given, steps)

    together = ends(NOISE, FRESH)
    video = ends(Latents(NOISE.video), Latents(FRESH.video))
    sound = ends(as_video(NOISE.sound), Latents(FRESH.sound[:, :, None, None, :]))
    assert video.sound is None
    expected = Latents(video.video, np.asarray(sound.video)[:, 0, 0])
    assert_close(together, expected, atol=2e-6)  # float32 rounding: XLA may fuse two otherwise than one


@pytest.mark.parametrize("kind", ["native", "distilled"])
@pytest.mark.parametrize("frames", [[True, False, True], [True] * 3], ids=["some", "all"])
def test_given_frames_leave_the_sound_as_it_is(kind, frames):
    steps = distilled_steps(DISTILLED, FRESH) if kind == "distilled" else steps_of(5, guidance_scale=3.0)
    free, found = (denoise(curved, 0.5, NOISE, given, steps) for given in (NOTHING_GIVEN, Given(CLEAN.video, np.array(frames))))
    np.testing.assert_array_equal(found.sound, free.sound)
    np.testing.assert_array_equal(found.video[np.array(frames)], CLEAN.video[np.array(frames)])


def test_latents_of_the_callback_are_the_videos_and_leave_the_sound_as_it_is():
    seen, whole = [], run(4)

    def on_step(step, x_thwc):
        seen.append(x_thwc)
        return CLEAN.video if step == 1 else None

    replaced = run(4, on_step=on_step)
    assert {x_thwc.shape for x_thwc in seen} == {NOISE.video.shape}
    np.testing.assert_array_equal(replaced.video, seen[-1])
    assert np.abs(replaced.video - whole.video).max() > 0.01
    np.testing.assert_array_equal(replaced.sound, whole.sound)


def test_the_sound_stops_with_the_video():
    # After the second of four steps, as a run that is asked for no more than it.
    stopped = run(4, on_step=lambda step, _: step < 1)
    steps = steps_of(4, guidance_scale=3.0)[:2]
    assert_close(stopped, denoise(curved, 0.5, NOISE, NOTHING_GIVEN, steps))
    assert np.abs(stopped.sound - run(4).sound).max() > 0.01


# Distilled steps


@pytest.mark.parametrize("steps_per_call", [1, 3, 4])
def test_a_distilled_step_goes_to_the_prediction_and_back_up_with_fresh_noise(steps_per_call):
    timesteps = []

    def stepped(x, draws):
        for sigma, below, fresh in zip(DISTILLED, [*DISTILLED[1:], 0], [*draws, np.nan], strict=True):
            prediction = x - sigma * (np.tanh(0.5 * x) + sigma)
            x = (1 - below) * prediction + below * fresh if below else prediction
        return np.float32(x)

    def told(inputs, x, timestep, is_given_t):
        jax.debug.callback(timesteps.append, timestep, ordered=True)
        return each(lambda velocity: velocity[:1], curved(inputs, x, timestep, is_given_t))

    found = denoise(told, 0.5, NOISE, NOTHING_GIVEN, distilled_steps(DISTILLED, FRESH), steps_per_call=steps_per_call)
    assert_close(found, each(stepped, NOISE, FRESH), atol=2e-6)  # float32 rounding
    jax.effects_barrier()
    np.testing.assert_allclose(timesteps, [1000, 937.5, 833.33333, 625], rtol=2**-23)  # not whole, as UniPC's


def test_given_frames_stay_as_they_are_in_distilled_steps():
    is_given = np.array([True, False, False])
    given, path = Given(CLEAN.video, is_given), []

    def velocity(inputs, x, timestep, is_given_t):
        v_thwc = jnp.where(is_given_t[:, None, None, None], jnp.nan, jnp.tanh(x.video))
        return Latents(v_thwc[None], x.sound[None])

    steps = distilled_steps(DISTILLED, FRESH)
    denoise(velocity, None, NOISE, given, steps, on_step=lambda _, x: path.append(np.asarray(x)))
    assert len(path) == 4
    for x_thwc in path:
        np.testing.assert_array_equal(x_thwc[is_given], CLEAN.video[is_given])
        assert np.isfinite(x_thwc).all()


# Given frames, calls and callbacks


def test_one_branch_needs_no_guidance():
    alone = random(1, 50)
    np.testing.assert_array_equal(guide(alone, 6.0), alone[0])


def test_given_frames_stay_as_they_are():
    is_given = np.array([True, False, True])
    clean = np.where(is_given[:, None, None, None], CLEAN.video, np.nan)  # NaN: what is not given is not read

    def velocity(clean, x, timestep, is_given_t):
        noisy = ~is_given_t[:, None, None, None]
        intact = jnp.all(noisy | (x.video == clean))
        v_thwc = jnp.where(noisy & intact, jnp.tanh(x.video), jnp.nan)  # NaN: the velocity of a given frame is not read
        return Latents(v_thwc[None], x.sound[None])

    path, given = [], Given(clean, is_given)
    denoise(velocity, CLEAN.video, NOISE, given, steps_of(5), on_step=lambda _, x: path.append(np.asarray(x)))
    assert len(path) == 5
    for x_thwc in path:
        np.testing.assert_array_equal(x_thwc[is_given], CLEAN.video[is_given])
        assert np.isfinite(x_thwc).all()


@pytest.mark.parametrize("steps_per_call", [3, 8, 100])
def test_steps_in_one_program_change_nothing(steps_per_call):
    # float32 rounding: XLA may fuse a loop of one step otherwise than a loop of many
    assert_close(run(8, steps_per_call=steps_per_call), run(8), atol=2e-6)


@pytest.mark.parametrize(("steps_per_call", "told"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 6, 8]), (8, [8]), (100, [8])])
def test_progress_and_callback_are_told_the_steps_done(steps_per_call, told):
    progress, last_steps = [], []
    run(8, steps_per_call=steps_per_call, on_progress=progress.append, on_step=lambda step, _: last_steps.append(step))
    assert progress == told
    assert last_steps == [done - 1 for done in told]


def test_false_ends_the_run_after_this_step():
    seen, progress = [], []

    def on_step(step, x_thwc):
        seen.append(x_thwc)
        return step < 2  # True goes on

    result = run(8, on_step=on_step, on_progress=progress.append)
    assert len(seen) == 3
    assert progress == [1, 2, 3]
    np.testing.assert_array_equal(result.video, seen[-1])
    assert np.abs(result.video - run(8).video).max() > 0.01


def test_the_callback_may_replace_the_latents():
    assert_close(run(4, on_step=lambda _, x: x), run(4))
    replaced = run(4, on_step=lambda step, _: CLEAN.video if step == 3 else None)
    np.testing.assert_array_equal(replaced.video, CLEAN.video)
    # The next step goes on from what was returned: a change reaches the end, in its place alone.
    hole = np.zeros(CLEAN.video.shape, bool)
    hole[1, 0, 2, 3] = True
    holed = run(4, on_step=lambda step, x: jnp.where(hole, 100, x) if step == 1 else None)
    np.testing.assert_array_equal(np.asarray(holed.video) != np.asarray(run(4).video), hole)
    np.testing.assert_array_equal(holed.sound, run(4).sound)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["video", "sound"])
@pytest.mark.parametrize("steps_per_call", [1, 3, 8])
@pytest.mark.parametrize("step", [0, 2, 5, 7])
def test_numbers_that_are_none_are_told_with_their_step(step, steps_per_call, part, value):
    steps, told = steps_of(8), []

    def velocity(scale, x, timestep, is_given_t):
        broken = jnp.where(timestep == steps.timestep[step], value, 0)
        made = curved(scale, x, timestep, is_given_t)
        hole = jnp.zeros(getattr(made, part).shape).at[0, -1].set(1)
        return dataclasses.replace(made, **{part: getattr(made, part) + jnp.where(hole > 0, broken, 0)})

    message = rf"^the latents became NaN or infinite in step {step + 1} \(timestep {steps.timestep[step]:g}\): .*"
    with pytest.raises(RunError, match=message):
        denoise(velocity, 0.5, NOISE, NOTHING_GIVEN, steps, steps_per_call=steps_per_call, on_progress=told.append)
    assert max(told, default=0) <= step  # no bar says that it was done


def test_another_request_finds_the_compiled_program(compilations):
    def velocity(*arguments):  # one that no other test has run
        return curved(*arguments)

    denoise(velocity, 0.5, NOISE, NOTHING_GIVEN, steps_of(4, guidance_scale=3.0))
    assert compilations
    compilations.clear()
    denoise(velocity, 0.7, CLEAN, NOTHING_GIVEN, steps_of(7, "karras", guidance_scale=1.5))
    assert not compilations

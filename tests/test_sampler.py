"""The sampler against the reference's tables, and on velocity fields whose exact flow is known."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos3_jax.config import SchedulerConfig
from cosmos3_jax.sampler import (
    GRIDS,
    Given,
    State,
    Steps,
    advance,
    denoise,
    distilled_steps,
    guide,
    sigma_grid,
    unipc_steps,
)

DATA = Path(__file__).parent / "data"
TABLES = json.loads((DATA / "scheduler_tables.json").read_text())
COEFFICIENTS = json.loads((DATA / "unipc_coeffs.json").read_text())

NOISE, CLEAN = np.random.RandomState(0).standard_normal((2, 3, 2, 5, 4)).astype(np.float32)  # [t, h, w, c] each
NOTHING_GIVEN = Given(np.zeros_like(CLEAN), np.zeros(3, bool))


def steps_of(count: int, kind: str = "native", flow_shift: float = 5.0, guidance_scale: float = 1.0) -> Steps:
    return unipc_steps(sigma_grid(kind, count, flow_shift, SchedulerConfig()), guidance_scale)


def curved(inputs, x_thwc, timestep, is_given_t):
    """A velocity of two branches that depends on all there is."""
    return jnp.stack([jnp.tanh(inputs * x_thwc) + timestep / 1000, jnp.sin(x_thwc)])


def straight(inputs, x_thwc, timestep, is_given_t):
    """The velocity of the straight way from clean latents to noise, one branch."""
    return inputs[None]


def run(count: int, **settings) -> jax.Array:
    return denoise(curved, 0.5, NOISE, NOTHING_GIVEN, steps_of(count, guidance_scale=3.0), **settings)


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

    def velocity(x_thwc, timestep):
        return x_thwc / (1 + x_thwc**2) - timestep / 1000

    sample = corrected = np.float64(NOISE)
    predictions = np.zeros((3, *NOISE.shape))  # this one, the one before, the one before that
    for i in range(len(table["timesteps"])):
        prediction = sample - table["sigmas"][i] * velocity(sample, table["timesteps"][i])
        predictions = np.stack([prediction, *predictions[:2]])
        if i > 0:
            corrected = np.tensordot(table["corrector"][i], [corrected, *predictions], 1)
        sample = np.tensordot(table["predictor"][i], [corrected, *predictions[:2]], 1)

    steps = unipc_steps(np.array(table["sigmas"][:-1]))
    result = denoise(lambda _, x, timestep, is_given_t: velocity(x, timestep)[None], None, NOISE, NOTHING_GIVEN, steps)
    np.testing.assert_allclose(result, sample, atol=5e-6)  # the state is float32 here, float64 above


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("count", [1, 2, 3, 35])
def test_last_step_returns_the_prediction_itself(kind, count):
    last = jax.tree.map(lambda column: column[-1], steps_of(count, kind))
    state = advance(State(NOISE, NOISE + 1, NOISE + 2, NOISE + 3), last, CLEAN, NOTHING_GIVEN)
    np.testing.assert_array_equal(state.sample, state.prediction)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_straight_flow_is_followed_exactly(kind, count):
    # On the line x = (1 - sigma) m + sigma e the velocity is e - m and every prediction is m, so a solver that is exact for
    # constant predictions never leaves the line and ends on m.
    steps = steps_of(count, kind)
    line = [(1 - sigma) * CLEAN + sigma * NOISE for sigma in np.append(steps.sigma, 0)]
    path = []
    denoise(straight, NOISE - CLEAN, line[0], NOTHING_GIVEN, steps, on_step=lambda _, x: path.append(x))
    np.testing.assert_allclose(path, line[1:], atol=2e-6)  # float32 rounding, summed up over the steps


def test_half_the_step_makes_a_quarter_of_the_error():
    # Clean data from N(0, s^2) has the flow x(sigma) = sqrt((1 - sigma)^2 s^2 + sigma^2) e, which is not straight. UniPC is of
    # order 2 or better, so at least 4 times less error is expected; 3.5 leaves room for its first and last step, of order 1.
    s = 0.5

    def error(count):
        def body(state, step):
            alpha, sigma = 1 - step.sigma, step.sigma
            velocity = state.sample * (sigma - alpha * s**2) / (alpha**2 * s**2 + sigma**2)
            return advance(state, step, velocity, NOTHING_GIVEN), None

        steps = steps_of(count, "linear", 3.0)
        state, _ = jax.lax.scan(body, State(NOISE, *[jnp.zeros_like(NOISE)] * 3), steps)
        return np.abs(state.sample - s * NOISE).max()

    assert error(10) > 3.5 * error(20) > 3.5**2 * error(40) > 0


def test_guidance_goes_from_the_unconditional_branch_through_the_conditional():
    both = np.stack([NOISE, CLEAN])
    np.testing.assert_array_equal(guide(both, 0.0), CLEAN)
    np.testing.assert_allclose(guide(both, 1.0), NOISE, atol=5e-7)  # u + (c - u) rounds
    np.testing.assert_allclose(guide(both, 6.0), 6 * NOISE - 5 * CLEAN, atol=5e-6)  # the same rounding, times 6
    np.testing.assert_array_equal(guide(np.stack([NOISE, NOISE]), 6.0), NOISE)


DISTILLED = np.array([1.0, 0.9375, 0.8333333333333334, 0.625])
FRESH = np.random.RandomState(1).standard_normal((3, *NOISE.shape)).astype(np.float32)


@pytest.mark.parametrize("steps_per_call", [1, 3, 4])
def test_a_distilled_step_goes_to_the_prediction_and_back_up_with_fresh_noise(steps_per_call):
    x, timesteps = NOISE, []
    for sigma, below, fresh in zip(DISTILLED, [*DISTILLED[1:], 0], [*FRESH, np.nan], strict=True):
        prediction = x - sigma * curved(0.5, x, 1000 * sigma, None)[0]
        x = (1 - below) * prediction + below * fresh if below else prediction

    def told(inputs, x_thwc, timestep, is_given_t):
        jax.debug.callback(timesteps.append, timestep, ordered=True)
        return curved(inputs, x_thwc, timestep, is_given_t)[:1]

    found = denoise(told, 0.5, NOISE, NOTHING_GIVEN, distilled_steps(DISTILLED, FRESH), steps_per_call=steps_per_call)
    np.testing.assert_allclose(found, x, atol=2e-6)  # float32 rounding
    jax.effects_barrier()
    np.testing.assert_allclose(timesteps, [1000, 937.5, 833.33333, 625], rtol=2**-23)  # not whole, as UniPC's


def test_given_frames_stay_as_they_are_in_distilled_steps():
    is_given = np.array([True, False, False])
    given, path = Given(CLEAN, is_given), []

    def velocity(inputs, x_thwc, timestep, is_given_t):
        return jnp.where(is_given_t[:, None, None, None], jnp.nan, jnp.tanh(x_thwc))[None]

    denoise(velocity, None, NOISE, given, distilled_steps(DISTILLED, FRESH), on_step=lambda _, x: path.append(np.asarray(x)))
    for x_thwc in path:
        np.testing.assert_array_equal(x_thwc[is_given], CLEAN[is_given])
        assert np.isfinite(x_thwc).all()


def test_one_branch_needs_no_guidance():
    np.testing.assert_array_equal(guide(NOISE[None], 6.0), NOISE)


def test_given_frames_stay_as_they_are():
    is_given = np.array([True, False, True])
    given = Given(np.where(is_given[:, None, None, None], CLEAN, np.nan), is_given)  # NaN: what is not given is not read

    def velocity(clean, x_thwc, timestep, is_given_t):
        noisy = ~is_given_t[:, None, None, None]
        intact = jnp.all(noisy | (x_thwc == clean))
        return jnp.where(noisy & intact, jnp.tanh(x_thwc), jnp.nan)[None]  # NaN: the velocity of a given frame is not read

    path = []
    denoise(velocity, CLEAN, NOISE, given, steps_of(5), on_step=lambda _, x: path.append(np.asarray(x)))
    assert len(path) == 5
    for x_thwc in path:
        np.testing.assert_array_equal(x_thwc[is_given], CLEAN[is_given])
        assert np.isfinite(x_thwc).all()


@pytest.mark.parametrize("steps_per_call", [3, 8, 100])
def test_steps_in_one_program_change_nothing(steps_per_call):
    # float32 rounding: XLA may fuse a loop of one step otherwise than a loop of many
    np.testing.assert_allclose(run(8, steps_per_call=steps_per_call), run(8), atol=2e-6)


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
    np.testing.assert_array_equal(result, seen[-1])
    assert np.abs(result - run(8)).max() > 0.01


def test_the_callback_may_replace_the_latents():
    whole = run(4)
    np.testing.assert_array_equal(run(4, on_step=lambda _, x: x), whole)
    np.testing.assert_array_equal(run(4, on_step=lambda step, _: CLEAN if step == 3 else None), CLEAN)
    # The next step goes on from what was returned: a NaN reaches the end, in its place alone.
    hole = np.zeros(CLEAN.shape, bool)
    hole[1, 0, 2, 3] = True
    holed = run(4, on_step=lambda step, x: jnp.where(hole, jnp.nan, x) if step == 1 else None)
    np.testing.assert_array_equal(np.isnan(holed), hole)


def test_another_request_finds_the_compiled_program(compilations):
    def velocity(*arguments):  # one that no other test has run
        return curved(*arguments)

    denoise(velocity, 0.5, NOISE, NOTHING_GIVEN, steps_of(4, guidance_scale=3.0))
    assert compilations
    compilations.clear()
    denoise(velocity, 0.7, CLEAN, NOTHING_GIVEN, steps_of(7, "karras", guidance_scale=1.5))
    assert not compilations

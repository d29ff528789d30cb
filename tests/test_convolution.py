"""The ways to compute a convolution: each is the convolution, none rounds more than another, and which is taken where."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metrics import errors, random

from cosmos3_jax import make_mesh
from cosmos3_jax.axes import picture_mesh
from cosmos3_jax.cost import flops
from cosmos3_jax.models.convolution import SAME, convolve, convolve_doubled, quartered, side_by_side, summed, winograd

NONE = ((0, 0), (0, 0))
WAYS = {"side by side": side_by_side, "summed": summed, "winograd": winograd}


def windows_of(frames: np.ndarray, taps: int = 3) -> list[np.ndarray]:
    return [frames[i : len(frames) - taps + 1 + i] for i in range(taps)]


def exact(frames: np.ndarray, weight: np.ndarray, pad=SAME) -> np.ndarray:
    """A causal convolution in float64, tap by tap."""
    frames = np.pad(frames.astype(np.float64), ((0, 0), *pad, (0, 0)))
    taps, rows, columns = weight.shape[:3]
    t, h, w = (size - kernel + 1 for size, kernel in zip(frames.shape[:3], weight.shape[:3], strict=True))
    seen = ((a, b, c) for a in range(taps) for b in range(rows) for c in range(columns))
    return sum(frames[a : a + t, b : b + h, c : c + w] @ weight[a, b, c].astype(np.float64) for a, b, c in seen)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    ("kernel", "pad", "stride"),
    [((3, 3), SAME, 1), ((3, 3), ((0, 1), (2, 0)), 1), ((3, 3), ((0, 1), (0, 1)), 2), ((1, 1), NONE, 1)],
    ids=str,
)
def test_every_way_is_the_convolution(name, kernel, pad, stride):
    # Which is taken depends on the device and the frames, so no platform sees all of them by itself.
    frames, weight = random(6, 5, 7, 8), random(3, *kernel, 8, 4, seed=1) / np.float32(15)
    expected = exact(frames, weight, pad)[:, ::stride, ::stride]
    np.testing.assert_allclose(WAYS[name](windows_of(frames), weight, pad, stride), expected, atol=3e-6)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("time_stride", [1, 2])
@pytest.mark.parametrize("frames", [5, 6, 7])
def test_every_frame_sees_those_before_it(frames, time_stride, taps):
    x, weight = random(frames, 5, 7, 8), random(taps, 3, 3, 8, 4, seed=1) / np.float32(15)
    y = convolve(x, weight, jnp.zeros(4), SAME, time_stride=time_stride)
    np.testing.assert_allclose(y, exact(x, weight)[::time_stride], atol=3e-6)


def test_winograd_rounds_as_channels_side_by_side_do():
    # At a width of the real decoder. F(4, 3) would fail here, by a factor of three.
    frames, weight = random(6, 16, 16, 256), random(3, 3, 3, 256, 64, seed=1) / np.float32(48)
    expected = exact(frames, weight)
    plain, fast = (errors(np.asarray(way(windows_of(frames), weight, SAME)), expected)[0] for way in (side_by_side, winograd))
    assert fast < 1.4 * plain < 2e-6


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 4), (5, 7)])
def test_quarters_are_the_convolution_of_repeated_pixels(h, w):
    x, weight = random(2, h, w, 8), random(3, 3, 8, 4, seed=1) / np.float32(9)
    repeated = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(quartered(x, weight), exact(repeated, weight[None]), atol=3e-6)


def run(function, frames: int, dtype="float32", taps: int = 3, stride: int = 1, time_stride: int = 1) -> jax.stages.Traced:
    """`convolve` or `convolve_doubled` of so many frames."""
    x, bias = jnp.zeros((frames, 8, 8, 4), dtype), jnp.zeros(6, dtype)
    if function is convolve_doubled:
        return jax.jit(function).trace(x, jnp.zeros((3, 3, 4, 6), dtype), bias)
    static = functools.partial(convolve, pad=SAME, stride=stride, time_stride=time_stride)
    seen = jnp.zeros((taps + time_stride * (frames - 1), 8, 8, 4), dtype)
    return jax.jit(static).trace(seen, jnp.zeros((taps, 3, 3, 4, 6), dtype), bias)


@pytest.mark.parametrize(
    ("how", "frames", "size"),
    [
        ({"frames": 4}, 4 * [2], (8, 8)),
        ({"frames": 2}, 4 * [1], (8, 8)),
        ({"frames": 1}, 3 * [1], (8, 8)),
        ({"frames": 3}, 3 * [3], (8, 8)),
        ({"frames": 4, "taps": 1}, [4], (8, 8)),
        ({"frames": 4, "dtype": "bfloat16"}, [4], (8, 8)),
        ({"frames": 4, "stride": 2}, 4 * [2], (4, 4)),
        ({"frames": 4, "time_stride": 2}, 3 * [4], (8, 8)),
        ({"function": convolve_doubled, "frames": 2}, 4 * [2], (8, 8)),
        ({"function": convolve_doubled, "frames": 2, "dtype": "bfloat16"}, [2], (16, 16)),
    ],
)
def test_which_way_is_taken(how, frames, size):
    """How many convolutions a CPU runs, and of how many frames of what size each."""
    lowered = run(**{"function": convolve} | how).lower().as_text()
    results = re.findall(r"stablehlo.convolution.*-> tensor<(\d+)x(\d+)x(\d+)x", lowered)
    assert [(int(t), (int(h), int(w))) for t, h, w in results] == [(t, size) for t in frames]


@pytest.mark.parametrize(("function", "flops_of_a_frame"), [(convolve, 3), (convolve_doubled, 4)])
def test_flops_are_those_of_the_plain_convolution(function, flops_of_a_frame):
    # On whatever device they are counted: a dry run's are meant for a GPU.
    assert flops(run(function, 4).jaxpr.jaxpr) == flops_of_a_frame * 4 * 2 * 8 * 8 * 9 * 4 * 6


@pytest.mark.parametrize("function", [convolve, convolve_doubled])
def test_a_divided_picture_has_one_convolution(function):
    with jax.set_mesh(picture_mesh(make_mesh(tp=4), 8, 8)):
        assert run(function, 4).lower().as_text().count("stablehlo.convolution") == 1
    with jax.set_mesh(picture_mesh(make_mesh(), 8, 8)):
        assert run(function, 4).lower().as_text().count("stablehlo.convolution") == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_for_each_channel(dtype):
    frames, weight = random(6, 5, 7, 8).astype(dtype), random(3, 3, 3, 8, 4, seed=1).astype(dtype)
    bias = jnp.arange(4)
    for function, arguments in ((convolve, (frames, weight)), (convolve_doubled, (frames, weight[0]))):
        more = {"pad": SAME} if function is convolve else {}
        with_bias, without = (function(*arguments, each.astype(dtype), **more) for each in (bias, 0 * bias))
        assert with_bias.dtype == dtype
        atol = 1e-5 if dtype == "float32" else 2**-7 * 64  # the sum is rounded again; none is above 64
        np.testing.assert_allclose((with_bias - without).astype(np.float32), np.broadcast_to(bias, without.shape), atol=atol)


@pytest.mark.parametrize(
    ("size", "kernel", "pad", "stride"),
    [
        ((6, 8), 3, SAME, 1),
        ((6, 8), 3, ((0, 1), (0, 1)), 2),
        ((7, 9), 3, ((0, 1), (0, 1)), 2),
        ((5, 7), 2, ((0, 1), (1, 0)), 1),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_convolution(size, kernel, pad, stride):
    x, weight, seen = random(3, *size, 4), random(kernel, kernel, 4, 5, seed=1), random(5, seed=2)

    def gradients(way):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(way([x], w[None], pad, stride)) * seen), (0, 1))(x, weight)

    for ours, plain in zip(gradients(summed), gradients(side_by_side), strict=True):  # the one has its own, the other jax's
        np.testing.assert_allclose(ours, plain, atol=2e-5)


def test_gradients_in_a_loop_have_the_axes_that_cpus_are_fast_with():
    weight = jnp.asarray(random(3, 3, 4, 4))

    def total(w, xs):
        return jax.lax.scan(lambda y, x: (summed([y + x], w[None], SAME), None), xs[0], xs)[0].sum()

    hlo = jax.jit(jax.grad(total)).lower(weight, random(3, 2, 6, 6, 4)).compile().as_text()
    assert set(re.findall(r"dim_labels=(\w+->\w+)", hlo)) == {"b01f_01io->b01f"}

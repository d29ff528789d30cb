"""The ways to compute a convolution: each is the convolution, none rounds more than another, and which is taken where."""

import functools

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
@pytest.mark.parametrize(("kernel", "pad"), [((3, 3), SAME), ((3, 3), ((0, 1), (2, 0))), ((1, 1), NONE)], ids=str)
def test_every_way_is_the_convolution(name, kernel, pad):
    # Which is taken depends on the device and the frames, so no platform sees all of them by itself.
    frames, weight = random(6, 5, 7, 8), random(3, *kernel, 8, 4, seed=1) / np.float32(15)
    np.testing.assert_allclose(WAYS[name](windows_of(frames), weight, pad), exact(frames, weight, pad), atol=3e-6)


def test_winograd_rounds_as_channels_side_by_side_do():
    # At a width of the real decoder. F(4, 3) would fail here, by a factor of three.
    frames, weight = random(6, 16, 16, 256), random(3, 3, 3, 256, 64, seed=1) / np.float32(48)
    expected = exact(frames, weight)
    plain, fast = (errors(np.asarray(way(windows_of(frames), weight, SAME)), expected)[0] for way in (side_by_side, winograd))
    assert fast < 1.4 * plain < 1e-6


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 4), (5, 7)])
def test_quarters_are_the_convolution_of_repeated_pixels(h, w):
    x, weight = random(2, h, w, 8), random(3, 3, 8, 4, seed=1) / np.float32(9)
    repeated = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(quartered(x, weight), exact(repeated, weight[None]), atol=3e-6)


def run(function, frames: int, dtype="float32", taps: int = 3, kernel=(3, 3), stride: int = 1) -> jax.stages.Traced:
    """`convolve` or `convolve_doubled` of so many frames."""
    x, bias = jnp.zeros((frames, 8, 8, 4), dtype), jnp.zeros(6, dtype)
    if function is convolve_doubled:
        return jax.jit(function).trace(x, jnp.zeros((3, 3, 4, 6), dtype), bias)
    pad = SAME if kernel == (3, 3) else NONE
    static = functools.partial(convolve, pad=pad, stride=stride)
    return jax.jit(static).trace([x] * taps, jnp.zeros((taps, *kernel, 4, 6), dtype), bias)


FRAME = 2 * 8 * 8 * 9 * 4 * 6  # FLOPs of a 3x3 convolution of one frame


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"frames": 4}, 8 * FRAME),
        ({"frames": 2}, 4 * FRAME),
        ({"frames": 1}, 3 * FRAME),
        ({"frames": 3}, 9 * FRAME),
        ({"frames": 4, "taps": 1}, 4 * FRAME),
        ({"frames": 4, "dtype": "bfloat16"}, 12 * FRAME),
        ({"frames": 4, "kernel": (1, 1)}, 12 * FRAME // 9),
        ({"frames": 4, "stride": 2}, 12 * FRAME // 4),
        ({"function": convolve_doubled, "frames": 2}, 2 * 16 * FRAME // 9),
        ({"function": convolve_doubled, "frames": 2, "dtype": "bfloat16"}, 2 * 4 * FRAME),
    ],
    ids=str,
)
def test_no_more_arithmetic_than_needed(how, expected):
    assert flops(run(**{"function": convolve} | how).jaxpr.jaxpr) == expected


@pytest.mark.parametrize("function", [convolve, convolve_doubled])
def test_a_divided_picture_has_one_convolution(function):
    with jax.set_mesh(picture_mesh(make_mesh(tp=4), 8, 8)):
        assert str(run(function, 4).jaxpr).count("conv_general_dilated[") == 1
    with jax.set_mesh(picture_mesh(make_mesh(), 8, 8)):
        assert str(run(function, 4).jaxpr).count("conv_general_dilated[") == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_for_each_channel(dtype):
    windows, weight, bias = (
        windows_of(random(6, 5, 7, 8).astype(dtype)),
        random(3, 3, 3, 8, 4, seed=1).astype(dtype),
        jnp.arange(4),
    )
    for function, arguments in ((convolve, (windows, weight)), (convolve_doubled, (windows[0], weight[0]))):
        more = {"pad": SAME} if function is convolve else {}
        with_bias, without = (function(*arguments, each.astype(dtype), **more) for each in (bias, 0 * bias))
        assert with_bias.dtype == dtype
        atol = 1e-5 if dtype == "float32" else 2**-7 * 64  # the sum is rounded again; none is above 64
        np.testing.assert_allclose((with_bias - without).astype(np.float32), np.broadcast_to(bias, without.shape), atol=atol)

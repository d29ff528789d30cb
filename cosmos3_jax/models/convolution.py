"""How the VAE's convolutions are computed: causal ones, of two space axes and three time taps, out of 2-D ones.

XLA's own 3-D convolution is three times as slow on CPUs, and changes layouts on GPUs. Instead:

    winograd       alone on a CPU, where frames come in pairs: four convolutions for each two frames, not six
    summed         alone on a CPU else: one for each tap
    side_by_side   on GPUs, and where a picture is divided over devices: one, of all taps' channels

And where pixels were repeated in front of a convolution of space alone, four of nine products are left (`quartered`). All give
the same but for the order in which they add. Arrays are channels last, [t, h, w, c].
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cosmos3_jax.axes import constrain, current_mesh

Pad = Sequence[tuple[int, int]]
"""Zeros (before, after) the rows and the columns."""

SAME = ((1, 1), (1, 1))


def convolve(
    frames: jax.Array, weight: jax.Array, bias: jax.Array, pad: Pad, *, stride: int = 1, time_stride: int = 1
) -> jax.Array:
    """A convolution with weights [tap, height, width, in, out], of all frames that the first tap to the last see."""
    taps = weight.shape[0]
    windows = [frames[i : len(frames) - taps + 1 + i : time_stride] for i in range(taps)]
    in_pairs = taps == 3 and time_stride == 1 and len(windows[0]) % 2 == 0
    on_cpu = winograd if in_pairs else summed
    return _with_bias(_either(on_cpu, side_by_side, windows, weight, pad=pad, stride=stride), bias)


def convolve_doubled(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """A 3x3 convolution of each frame, after each of its pixels was repeated twice in rows and columns; zeros beyond."""
    return _with_bias(_either(quartered, repeated, x, weight), bias)


def _either(on_cpu: Callable, elsewhere: Callable, x: Any, weight: jax.Array, **how: Any) -> jax.Array:
    """One of two ways to compute the same: the first for float32 on a CPU that has the picture alone.

    bfloat16 is for GPUs, and its results depend on the order of every sum.
    """
    on_cpu, elsewhere = (functools.partial(way, **how) for way in (on_cpu, elsewhere))
    mesh = current_mesh()
    divided = mesh is not None and any(mesh.shape.get(axis, 1) > 1 for axis in ("h", "w"))
    if divided or weight.dtype != jnp.float32:
        return elsewhere(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=elsewhere)


def side_by_side(windows: Sequence[jax.Array], weight: jax.Array, pad: Pad, stride: int = 1) -> jax.Array:
    """One convolution, of all taps' channels: rounded once, and borders are fetched once where the picture is divided."""
    x, kernel = jnp.concatenate(windows, axis=-1), jnp.concatenate(weight, axis=-2)
    return constrain(_convolve(x, kernel, pad, stride), "thwc")


def summed(windows: Sequence[jax.Array], weight: jax.Array, pad: Pad, stride: int = 1) -> jax.Array:
    """A convolution for each tap: on CPUs faster by a tenth to a half, for nothing is copied to lie side by side."""
    each = [_on_cpu(x, tap, pad, stride) for x, tap in zip(windows, weight, strict=True)]
    return functools.reduce(jnp.add, each)


def winograd(windows: Sequence[jax.Array], weight: jax.Array, pad: Pad, stride: int = 1) -> jax.Array:
    """Winograd's F(2, 3) over time: of each two frames, four convolutions of sums and differences instead of six.

    In float32 it rounds as `side_by_side` does; F(4, 3), three instead of six, would round three times as much.
    Source: Lavin and Gray 2015, arXiv:1509.09308, section 4.1.
    """
    a, b, c, d = windows[0][::2], windows[1][::2], windows[2][::2], windows[2][1::2]  # the four frames that a pair sees
    first, middle, last = weight
    y0 = _on_cpu(a - c, first, pad, stride)
    y1 = _on_cpu(b + c, (first + middle + last) / 2, pad, stride)
    y2 = _on_cpu(c - b, (first - middle + last) / 2, pad, stride)
    y3 = _on_cpu(b - d, last, pad, stride)
    pairs = jnp.stack([y0 + y1 + y2, y1 - y2 - y3], axis=1)
    return pairs.reshape(-1, *pairs.shape[2:])


def repeated(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A 3x3 convolution of the doubled frames, as it is written."""
    return side_by_side([jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)], weight[None], SAME)


def quartered(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same without the repetition: of 3x3 repeated pixels 2x2 differ, and each quarter of the result sees others.

    A row of the result that comes first of its two sees the row before once and its own twice; the other its own twice and
    the row after once. Columns likewise.
    """
    (above, below), after, before = _sums(weight, axis=0), (0, 1), (1, 0)
    quarters = [
        [_on_cpu(x, kernel, (rows, columns)) for kernel, columns in zip(_sums(taps, axis=1), (before, after), strict=True)]
        for taps, rows in ((above, before), (below, after))
    ]
    y = jnp.stack([jnp.stack(each, axis=3) for each in quarters], axis=2)  # [t, h, 2, w, 2, c]
    t, h, _, w, _, c = y.shape
    return y.reshape(t, 2 * h, 2 * w, c)


def _sums(weight: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Three taps as two, where the last two see the same, and where the first two do."""
    first, middle, last = jnp.split(weight, 3, axis)
    return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)


def _convolve(x: jax.Array, kernel: jax.Array, pad: Pad, stride: int = 1) -> jax.Array:
    if kernel.shape[:2] == (1, 1):
        return x @ kernel[0, 0]
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _on_cpu(x: jax.Array, kernel: jax.Array, pad: Pad, stride: int = 1) -> jax.Array:
    """`_convolve`, whose gradients are convolutions of the same form.

    Else they have their axes in another order, which XLA puts right for the fast kernels of a CPU only outside of loops and
    branches (as of jax 0.12): there the gradients of a VAE would take eight times as long.
    """
    return _convolve(x, kernel, pad, stride)


def _forward(x: jax.Array, kernel: jax.Array, pad: Pad, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, pad, stride), (x, kernel)


def _backward(pad: Pad, stride: int, saved: tuple[jax.Array, jax.Array], y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `x` and `kernel`, from that of the result."""
    x, kernel = saved
    between = [(0, 0, 0), (0, 0, stride - 1), (0, 0, stride - 1), (0, 0, 0)]
    y = jax.lax.pad(y, jnp.zeros((), y.dtype), between)  # zeros where the stride passed over
    around, seen = [], []
    for axis, (low, high) in enumerate(pad):
        size = kernel.shape[axis]
        unseen = x.shape[axis + 1] + low + high - size + 1 - y.shape[axis + 1]  # rows at the end that no window came to
        around.append((size - 1 - low, size - 1 - high + unseen))
        seen.append((low, high - unseen))
    x_gradient = _convolve(y, kernel[::-1, ::-1].swapaxes(2, 3), around)
    kernel_gradient = _convolve(x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3), seen)
    return x_gradient, kernel_gradient.transpose(1, 2, 0, 3)


_on_cpu.defvjp(_forward, _backward)


def _with_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    return (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)

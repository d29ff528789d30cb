"""The sound decoder: latents, 25 a second, to a waveform (the decoder of Cosmos3's AVAE: Oobleck with SnakeBeta).

Upsampled in a few steps, each followed by three dilated residual units. Nothing is causal, but what a sample depends on ends
some ten latents to either side: long sounds are decoded in windows that overlap by so much, one after the other, and what the
overlaps give is dropped. Memory holds one window, and the result is that of one pass. Beyond both ends of the sound every
convolution must see zeros, so each clears what its window has there.

Arrays are [samples, channels], float32. Module names are those of the published tensors, whose weight norms are folded as they
are loaded. Reference: diffusers 0.42.1, models/autoencoders/autoencoder_cosmos3_audio.py.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from flax import nnx, struct

from cosmos3_jax.axes import constrain
from cosmos3_jax.config import SoundConfig
from cosmos3_jax.weights import plain

WINDOW = 100  # latents decoded at a time at most, four seconds; with the overlaps Nano's activations are then 0.3 GB each


@struct.dataclass
class Window:
    """Which part of a sound an array is."""

    start: jax.Array | int  # its first latent; below 0 before the sound
    size: int = struct.field(pytree_node=False)  # latents
    length: int = struct.field(pytree_node=False)  # of the whole sound

    def clear(self, x_nc: jax.Array) -> jax.Array:
        """Zeros before and after the sound, at whatever rate `x` has."""
        rate = x_nc.shape[0] // self.size
        sample = self.start * rate + jnp.arange(x_nc.shape[0])
        return jnp.where(((sample >= 0) & (sample < self.length * rate))[:, None], x_nc, 0)


class Snake(nnx.Module):
    """x + sin(a x)^2 / b for each channel, a and b given by their logarithms (SnakeBeta)."""

    def __init__(self, channels: int):
        self.alpha = plain((channels,), file_shape=(1, channels, 1), float32=True)
        self.beta = plain((channels,), file_shape=(1, channels, 1), float32=True)

    def __call__(self, x_nc: jax.Array) -> jax.Array:
        wave = jnp.square(jnp.sin(jnp.exp(self.alpha[...]) * x_nc))
        return x_nc + wave / (jnp.exp(self.beta[...]) + 1e-9)


class Conv(nnx.Module):
    """A convolution that keeps the length."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, dilation: int = 1, bias: bool = True):
        self.dilation, self.pad = dilation, (kernel - 1) * dilation // 2
        std, file_shape = (inputs * kernel) ** -0.5, (outputs, inputs, kernel)
        self.weight = plain((kernel, inputs, outputs), file_shape=file_shape, std=std, float32=True)
        self.bias = plain((outputs,), file_shape=(outputs,), float32=True) if bias else None

    def __call__(self, x_nc: jax.Array, window: Window) -> jax.Array:
        y_nc = jax.lax.conv_general_dilated(
            window.clear(x_nc)[None],
            self.weight[...],
            window_strides=(1,),
            padding=[(self.pad, self.pad)],
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )[0]
        return y_nc if self.bias is None else y_nc + self.bias[...]


class TransposedConv(nnx.Module):
    """`stride` times as many samples: each becomes 2 x stride of them, and neighbours overlap by half of that."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        self.stride = stride
        std, file_shape = (2 * inputs) ** -0.5, (inputs, outputs, 2 * stride)
        self.weight = plain((2 * stride, outputs, inputs), file_shape=file_shape, std=std, float32=True)
        self.bias = plain((outputs,), file_shape=(outputs,), float32=True)

    def __call__(self, x_nc: jax.Array, window: Window) -> jax.Array:
        n, stride = x_nc.shape[0], self.stride
        y_nkc = jnp.einsum("ni,koi->nko", window.clear(x_nc), self.weight[...])
        first, second = y_nkc[:, :stride], y_nkc[:, stride:]
        y_nkc = jnp.pad(first, ((0, 1), (0, 0), (0, 0))) + jnp.pad(second, ((1, 0), (0, 0), (0, 0)))
        cut = math.ceil(stride / 2)
        return y_nkc.reshape((n + 1) * stride, -1)[cut : cut + n * stride] + self.bias[...]


class ResidualUnit(nnx.Module):
    """Snake, seven samples `dilation` apart, snake, one sample; plus the input."""

    def __init__(self, channels: int, dilation: int):
        self.snake1, self.conv1 = Snake(channels), Conv(channels, channels, 7, dilation=dilation)
        self.snake2, self.conv2 = Snake(channels), Conv(channels, channels, 1)

    def __call__(self, x_nc: jax.Array, window: Window) -> jax.Array:
        y_nc = self.conv1(self.snake1(x_nc), window)
        return x_nc + self.conv2(self.snake2(y_nc), window)


class UpBlock(nnx.Module):
    """Snake, upsampling, three residual units of growing reach."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        self.snake1, self.conv_t1 = Snake(inputs), TransposedConv(inputs, outputs, stride)
        self.res_unit1, self.res_unit2, self.res_unit3 = (ResidualUnit(outputs, dilation) for dilation in (1, 3, 9))

    def __call__(self, x_nc: jax.Array, window: Window) -> jax.Array:
        x_nc = self.conv_t1(self.snake1(x_nc), window)
        for unit in (self.res_unit1, self.res_unit2, self.res_unit3):
            x_nc = unit(x_nc, window)
        return x_nc


class SoundDecoder(nnx.Module):
    """Sound latents to a waveform."""

    def __init__(self, config: SoundConfig):
        widths = [config.dec_dim * factor for factor in (1, *config.dec_c_mults)][::-1]
        self.strides = config.dec_strides[::-1]
        self.conv1 = Conv(config.vocoder_input_dim, widths[0], 7)
        self.block = nnx.List([UpBlock(*sizes) for sizes in zip(widths[:-1], widths[1:], self.strides, strict=True)])
        self.snake1, self.conv2 = Snake(widths[-1]), Conv(widths[-1], config.dec_out_channels, 7, bias=False)

    def decode(self, latents_sc: jax.Array) -> jax.Array:
        """Samples in [-1, 1], [n, channels]."""
        length = latents_sc.shape[0]
        if length <= WINDOW + 2 * self.reach:
            return constrain(self._window(latents_sc, Window(0, length, length)), "")
        count = -(-length // WINDOW)
        each, reach, rate = -(-length // count), self.reach, math.prod(self.strides)
        padded = jnp.pad(latents_sc, ((reach, count * each - length + reach), (0, 0)))

        def decode(start: jax.Array) -> jax.Array:
            size = each + 2 * reach
            part = jax.lax.dynamic_slice_in_dim(padded, start, size)
            return self._window(part, Window(start - reach, size, length))[reach * rate : -reach * rate]

        parts = jax.lax.map(decode, each * jnp.arange(count))
        return constrain(parts.reshape(-1, parts.shape[-1])[: length * rate], "")

    def _window(self, x_nc: jax.Array, window: Window) -> jax.Array:
        x_nc = self.conv1(x_nc, window)
        for block in self.block:
            x_nc = block(x_nc, window)
        return jnp.clip(self.conv2(self.snake1(x_nc), window), -1, 1)

    @property
    def reach(self) -> int:
        """How many latents before and after it a sample depends on."""
        rate, reach = 1, Fraction(3)
        for stride in self.strides:
            reach += Fraction(1, rate)  # the neighbour that overlaps
            rate *= stride
            reach += Fraction(3 * (1 + 3 + 9), rate)
        return math.ceil(reach + Fraction(3, rate))

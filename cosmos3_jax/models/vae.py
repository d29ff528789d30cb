"""The Wan 2.2 video VAE: 16x16 pixels and 4 frames a latent, the first frame a latent of its own.

Everything is causal in time, so a clip streams through: the first frame alone, then four frames (one latent) at a time under
`lax.scan`, each causal convolution carrying the frames it must remember. A block is called as `block(x, past)` and returns
`(output, past)`; past is None at the start of a clip. Memory holds one latent frame's activations, however long the clip.

Decoding is shared by all devices: rows and columns are divided over a mesh ("h", "w"), and XLA fetches the neighbours' border
rows that a convolution sees. Where they do not divide evenly the picture gets a margin (margin.py); the result is still that
of one device. Encoding, of one or a few frames, runs whole on every device.

Arrays are channels last, [t, h, w, c]. How convolutions are computed is convolution.py's. Module names are those of the
published tensors. Reference: diffusers 0.42.1, models/autoencoders/autoencoder_kl_wan.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cosmos3_jax.axes import constrain
from cosmos3_jax.config import VAEConfig
from cosmos3_jax.models.convolution import convolve, convolve_doubled
from cosmos3_jax.models.margin import NO_MARGIN, margin_of
from cosmos3_jax.weights import plain

Past = Any  # a tree of the frames that a block remembers, None at the start of a clip


class Bordered(nnx.Module):
    """Base of the modules that see beyond one pixel, and so must know where the picture ends. `VAE.decode` tells them."""

    margin = NO_MARGIN


class Conv(Bordered):
    """A causal convolution: `kernel` is (time, height, width), the frames before the clip are zeros."""

    def __init__(self, inputs: int, outputs: int, kernel: Sequence[int] = (3, 3, 3), *, time_stride: int = 1):
        time, *space = kernel
        self.taps, self.time_stride, self.pad = time, time_stride, tuple((size // 2, size // 2) for size in space)
        std = (inputs * math.prod(kernel)) ** -0.5
        self.weight = plain((*kernel, inputs, outputs), file_shape=(outputs, inputs, *kernel), std=std)
        self.bias = plain((outputs,), file_shape=(outputs,))

    def __call__(self, x: jax.Array, past: Past = None) -> tuple[jax.Array, Past]:
        remembered, weight, bias = self.taps - self.time_stride, self.weight[...], self.bias[...]
        if self.pad != ((0, 0), (0, 0)):
            x = self.margin.clear(x)
        x = x.astype(weight.dtype)  # norms hand over float32
        if remembered == 0:
            return convolve(x, weight, bias, self.pad), None
        frames = jnp.concatenate([jnp.zeros((remembered, *x.shape[1:]), x.dtype) if past is None else past, x])
        if past is None:  # zeros before the first frame: only the last tap sees anything
            y = convolve(x, weight[-1:], bias, self.pad)
        else:
            y = convolve(frames, weight, bias, self.pad, time_stride=self.time_stride)
        return y, frames[-remembered:]


class SpatialConv(Bordered):
    """A 3x3 convolution of each frame: of half its rows and columns, or of twice as many."""

    def __init__(self, channels: int):
        file_shape = (channels, channels, 3, 3)
        self.weight = plain((3, 3, channels, channels), file_shape=file_shape, std=(9 * channels) ** -0.5)
        self.bias = plain((channels,), file_shape=(channels,))

    def down(self, x: jax.Array) -> jax.Array:
        """Every second row and column of the result, a row and a column of zeros after the last."""
        return convolve(self.margin.clear(x), self.weight[...][None], self.bias[...], ((0, 1), (0, 1)), stride=2)

    def up(self, x: jax.Array) -> jax.Array:
        """Of each pixel repeated twice in rows and columns."""
        return convolve_doubled(self.margin.clear(x), self.weight[...], self.bias[...])


class Norm(nnx.Module):
    """x / |x| * sqrt(channels) * gamma, over channels; float32 in any case, for the activation to be rounded once."""

    def __init__(self, channels: int, *, file_axes: int = 3):
        self.gamma = plain((channels,), file_shape=(channels, *(1,) * file_axes), mean=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True))
        return x32 / jnp.maximum(length, 1e-12) * x.shape[-1] ** 0.5 * self.gamma[...].astype(jnp.float32)


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU, 3x3x3; plus the input, through 1x1x1 where the channels change."""

    def __init__(self, inputs: int, outputs: int):
        self.norm1, self.conv1 = Norm(inputs), Conv(inputs, outputs)
        self.norm2, self.conv2 = Norm(outputs), Conv(outputs, outputs)
        self.conv_shortcut = Conv(inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        past1, past2 = past or (None, None)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)[0]
        x, past1 = self.conv1(jax.nn.silu(self.norm1(x)), past1)
        x, past2 = self.conv2(jax.nn.silu(self.norm2(x)), past2)
        return x + shortcut, (past1, past2)


class Attention(Bordered):
    """One head of self-attention over the pixels of each frame: every device's queries see all keys."""

    def __init__(self, channels: int):
        self.norm = Norm(channels, file_axes=2)
        self.to_qkv, self.proj = PixelLinear(channels, 3 * channels), PixelLinear(channels, channels)

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        q, k, v = jnp.split(self.to_qkv(self.norm(x).astype(x.dtype)), 3, axis=-1)
        k, v = (self.margin.crop(constrain(part, "t..c")) for part in (k, v))
        score = jnp.einsum("thwc,tijc->thwij", q, k, preferred_element_type=jnp.float32) * x.shape[-1] ** -0.5
        weight = jax.nn.softmax(score, axis=(-2, -1)).astype(v.dtype)
        mixed = constrain(jnp.einsum("thwij,tijc->thwc", weight, v), "thwc")
        return x + self.proj(mixed), past


class PixelLinear(nnx.Module):
    """A linear map of every pixel (a 1x1 convolution in the file)."""

    def __init__(self, inputs: int, outputs: int):
        self.weight = plain((inputs, outputs), file_shape=(outputs, inputs, 1, 1), std=inputs**-0.5)
        self.bias = plain((outputs,), file_shape=(outputs,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...] + self.bias[...]


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int):
        self.resnets = nnx.List([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])
        self.attentions = nnx.List([Attention(channels)])

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        return chain([self.resnets[0], self.attentions[0], self.resnets[1]], x, past)


class Downsample(nnx.Module):
    """Half the rows and columns; with `in_time` also half the frames, except that a clip's first frame stays."""

    def __init__(self, channels: int, in_time: bool):
        self.conv = SpatialConv(channels)
        self.time_conv = Conv(channels, channels, (3, 1, 1), time_stride=2) if in_time else None

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        x = self.conv.down(x)
        if self.time_conv is None:
            return x, None
        return (x, x) if past is None else self.time_conv(x, past)


class Upsample(nnx.Module):
    """Twice the rows and columns; with `in_time` also twice the frames, except that a clip's first frame stays."""

    def __init__(self, channels: int, in_time: bool):
        self.conv = SpatialConv(channels)
        self.time_conv = Conv(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        if self.time_conv is not None:
            if past is None:  # the first frame skips time_conv, and the second sees zeros before it
                past = jnp.zeros((2, *x.shape[1:]), x.dtype)
            else:
                y, past = self.time_conv(x, past)
                t, h, w, c = x.shape
                x = y.reshape(t, h, w, 2, c).transpose(0, 3, 1, 2, 4).reshape(2 * t, h, w, c)
        return self.conv.up(x), past


class DownBlock(nnx.Module):
    """Residual blocks and a Downsample, beside a shortcut that averages."""

    def __init__(self, inputs: int, outputs: int, count: int, *, in_space: bool, in_time: bool):
        self.outputs, self.time, self.space = outputs, 2 if in_time else 1, 2 if in_space else 1
        self.resnets = nnx.List([ResidualBlock(outputs if i else inputs, outputs) for i in range(count)])
        self.downsampler = Downsample(outputs, in_time) if in_space else None

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        shortcut = average_down(x, self.outputs, self.time, self.space)
        x, past = chain([*self.resnets, *([self.downsampler] if self.downsampler else [])], x, past)
        return x + shortcut, past


class UpBlock(nnx.Module):
    """Residual blocks and an Upsample, beside a shortcut that repeats."""

    def __init__(self, inputs: int, outputs: int, count: int, *, in_space: bool, in_time: bool):
        self.outputs, self.time = outputs, 2 if in_time else 1
        self.resnets = nnx.List([ResidualBlock(outputs if i else inputs, outputs) for i in range(count)])
        self.upsampler = Upsample(outputs, in_time) if in_space else None

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        if self.upsampler is None:
            return chain(self.resnets, x, past)
        shortcut = repeat_up(x, self.outputs, self.time, 2)
        if past is None:
            shortcut = shortcut[self.time - 1 :]
        x, past = chain([*self.resnets, self.upsampler], x, past)
        return x + shortcut, past


class Encoder(nnx.Module):
    """Pixels, folded into channels, to the moments of their latents."""

    def __init__(self, config: VAEConfig):
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        last = len(config.dim_mult) - 1
        self.conv_in = Conv(config.in_channels, widths[0])
        in_time = [*config.temperal_downsample, False]
        self.down_blocks = nnx.List(
            [
                DownBlock(widths[i], widths[i + 1], config.num_res_blocks, in_space=i < last, in_time=in_time[i])
                for i in range(last + 1)
            ]
        )
        self.mid_block = MidBlock(widths[-1])
        self.norm_out, self.conv_out = Norm(widths[-1]), Conv(widths[-1], 2 * config.z_dim)

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        return _through(self, [self.conv_in, *self.down_blocks, self.mid_block], x, past)


class Decoder(nnx.Module):
    """Latents to pixels folded into channels."""

    def __init__(self, config: VAEConfig):
        widths = [config.decoder_base_dim * factor for factor in (config.dim_mult[-1], *reversed(config.dim_mult))]
        last = len(config.dim_mult) - 1
        in_time = [*reversed(config.temperal_downsample), False]
        self.conv_in = Conv(config.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nnx.List(
            [
                UpBlock(widths[i], widths[i + 1], config.num_res_blocks + 1, in_space=i < last, in_time=in_time[i])
                for i in range(last + 1)
            ]
        )
        self.norm_out, self.conv_out = Norm(widths[-1]), Conv(widths[-1], config.out_channels)

    def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        return _through(self, [self.conv_in, self.mid_block, *self.up_blocks], x, past)


def _through(network: Encoder | Decoder, blocks: Sequence[nnx.Module], x: jax.Array, past: Past):
    def head(x: jax.Array, past: Past):
        return network.conv_out(jax.nn.silu(network.norm_out(x)), past)

    return chain([*blocks, head], x, past)


def chain(blocks: Sequence[Callable], x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    """`x` through the blocks in turn, each with its own past."""
    pasts = []
    for block, remembered in zip(blocks, past or [None] * len(blocks), strict=True):
        x, remembered = block(x, remembered)
        pasts.append(remembered)
    return x, pasts


class VAE(nnx.Module):
    """Encoder and decoder with the normalization of the latents."""

    def __init__(self, config: VAEConfig):
        self.config = config
        self.encoder, self.quant_conv = Encoder(config), Conv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant_conv, self.decoder = Conv(config.z_dim, config.z_dim, (1, 1, 1)), Decoder(config)

    def encode(self, frames_thwc: jax.Array) -> jax.Array:
        """Normalized latents [t, h/16, w/16, z] of 1 + 4k frames in [-1, 1]: the mode of the posterior."""
        dtype = self.post_quant_conv.bias.dtype
        pixels = fold(frames_thwc.astype(dtype), self.config.patch_size)
        moments = stream(self.encoder, pixels, self.config.scale_factor_temporal)
        mode = self.quant_conv(moments)[0][..., : self.config.z_dim]
        mean, inverse_std = self._statistics(dtype)
        return constrain(((mode - mean) * inverse_std).astype(jnp.float32), "")

    def decode(self, latents_thwc: jax.Array, finish: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The 1 + 4(t - 1) frames of normalized latents, each passed through `finish` (from [-1, 1]) as it is made."""
        dtype = self.post_quant_conv.bias.dtype
        mean, inverse_std = self._statistics(dtype)
        margin = margin_of(*latents_thwc.shape[1:3])
        self.decoder.set_attributes(Bordered, margin=margin)  # of this trace's own copy of the module
        z = margin.add(self.post_quant_conv(latents_thwc.astype(dtype) / inverse_std + mean)[0])

        def decoder(z, past):
            pixels, past = self.decoder(z, past)
            return finish(jnp.clip(unfold(pixels, self.config.patch_size), -1, 1)), past

        return margin.crop(constrain(stream(decoder, constrain(z, "thwc"), 1), ""))

    def _statistics(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """(mean, 1 / std) of the latents, both rounded to `dtype` as the reference rounds them."""
        return jnp.asarray(self.config.latents_mean, dtype), 1 / jnp.asarray(self.config.latents_std, dtype)


def unit(frames: jax.Array) -> jax.Array:
    """[-1, 1] to float32 in [0, 1]."""
    return jnp.clip(frames.astype(jnp.float32) * 0.5 + 0.5, 0, 1)


def uint8(frames: jax.Array) -> jax.Array:
    """[-1, 1] to rounded uint8, for files: a quarter of the bytes leave the device."""
    return jnp.round(unit(frames) * 255).astype(jnp.uint8)


def stream(network: Callable, x: jax.Array, chunk: int) -> jax.Array:
    """`network(x, past)` over the first frame of x, then over `chunk` frames at a time; the outputs in a row."""
    first, past = network(x[:1], None)
    if x.shape[0] == 1:
        return first
    chunks = x[1:].reshape(-1, chunk, *x.shape[1:])

    def step(past, frames):
        y, past = network(frames, past)
        return past, y

    _, rest = jax.lax.scan(step, past, chunks)
    return jnp.concatenate([first, rest.reshape(-1, *first.shape[1:])])


def fold(x: jax.Array, size: int) -> jax.Array:
    """size x size pixels into channels, in the order (channel, column, row)."""
    t, h, w, c = x.shape
    x = x.reshape(t, h // size, size, w // size, size, c).transpose(0, 1, 3, 5, 4, 2)
    return x.reshape(t, h // size, w // size, c * size * size)


def unfold(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `fold`."""
    t, h, w, c = x.shape
    x = x.reshape(t, h, w, c // size**2, size, size).transpose(0, 1, 5, 2, 4, 3)
    return x.reshape(t, h * size, w * size, c // size**2)


def average_down(x: jax.Array, outputs: int, time: int, space: int) -> jax.Array:
    """Blocks of time x space x space pixels into channels, then the mean of neighbouring channels: `outputs` of them.

    A lone first frame gets zeros before it.
    """
    x = jnp.pad(x, ((-x.shape[0] % time, 0), (0, 0), (0, 0), (0, 0)))
    t, h, w, c = x.shape
    blocks = x.reshape(t // time, time, h // space, space, w // space, space, c).transpose(0, 2, 4, 6, 1, 3, 5)
    return jnp.mean(blocks.reshape(t // time, h // space, w // space, outputs, -1), axis=-1)


def repeat_up(x: jax.Array, outputs: int, time: int, space: int) -> jax.Array:
    """The opposite of `average_down`: channels repeated until they fill blocks of time x space x space pixels."""
    t, h, w, c = x.shape
    x = jnp.repeat(x, outputs * time * space * space // c, axis=-1)
    x = x.reshape(t, h, w, outputs, time, space, space).transpose(0, 4, 1, 5, 2, 6, 3)
    return x.reshape(t * time, h * space, w * space, outputs)

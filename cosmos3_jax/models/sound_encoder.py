"""The sound encoder: a waveform to latents, 25 a second (the encoder of Cosmos3's AVAE: ConvNeXt blocks over short spectra).

Only training needs it. Spectra of 64 samples, one every 16, go through blocks that keep their number and strided convolutions
that make it less. It is one pass: a second of sound is 3,000 spectra, and at most 9 MB of activations in a layer of Nano's.

Arrays are [samples, channels], float32. Module names are those of the published tensors (but for "dwconv.1", which is "dwconv"
here), whose weight norms are folded as they are loaded. Reference: diffusers 0.42.1,
models/autoencoders/autoencoder_cosmos3_audio.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosmos3_jax.axes import constrain
from cosmos3_jax.config import SoundEncoderConfig
from cosmos3_jax.models.sound import Snake
from cosmos3_jax.weights import plain


class Linear(nnx.Module):
    """A linear map of every sample (a convolution of one sample in the file)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True):
        self.weight = plain((inputs, outputs), file_shape=(outputs, inputs, 1), std=inputs**-0.5, float32=True)
        self.bias = plain((outputs,), file_shape=(outputs,), float32=True) if bias else None

    def __call__(self, x_nc: jax.Array) -> jax.Array:
        y_nc = x_nc @ self.weight[...]
        return y_nc if self.bias is None else y_nc + self.bias[...]


class ChannelConv(nnx.Module):
    """A convolution of each channel by itself that keeps the length."""

    def __init__(self, channels: int, kernel: int):
        self.pad = kernel // 2
        self.weight = plain((kernel, 1, channels), file_shape=(channels, 1, kernel), std=kernel**-0.5, float32=True)
        self.bias = plain((channels,), file_shape=(channels,), float32=True)

    def __call__(self, x_nc: jax.Array) -> jax.Array:
        n, padded = x_nc.shape[0], jnp.pad(x_nc, ((self.pad, self.pad), (0, 0)))
        return sum(padded[i : i + n] * tap for i, tap in enumerate(self.weight[...])) + self.bias[...]


class StridedConv(nnx.Module):
    """One of `stride` samples, each made of 2 x stride of them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        self.stride, self.pad, kernel = stride, math.ceil(stride / 2), 2 * stride
        std, file_shape = (inputs * kernel) ** -0.5, (outputs, inputs, kernel)
        self.weight = plain((kernel, inputs, outputs), file_shape=file_shape, std=std, float32=True)
        self.bias = plain((outputs,), file_shape=(outputs,), float32=True)

    def __call__(self, x_nc: jax.Array) -> jax.Array:
        y_nc = jax.lax.conv_general_dilated(
            x_nc[None],
            self.weight[...],
            window_strides=(self.stride,),
            padding=[(self.pad, self.pad)],
            dimension_numbers=("NWC", "WIO", "NWC"),
        )[0]
        return y_nc + self.bias[...]


class LayerNorm(nnx.Module):
    """Over channels, with a scale and no bias."""

    def __init__(self, channels: int):
        self.weight = plain((channels,), file_shape=(channels,), mean=1.0, float32=True)

    def __call__(self, x_nc: jax.Array) -> jax.Array:
        x_nc = x_nc - x_nc.mean(-1, keepdims=True)
        return x_nc * jax.lax.rsqrt(jnp.square(x_nc).mean(-1, keepdims=True) + 1e-5) * self.weight[...]


class Block(nnx.Module):
    """Seven samples of each channel, norm, four times as many channels through a snake and back; plus the input (ConvNeXt)."""

    def __init__(self, channels: int):
        self.dwconv, self.norm = ChannelConv(channels, 7), LayerNorm(channels)
        self.pwconv1, self.act, self.pwconv2 = (
            Linear(channels, 4 * channels),
            Snake(4 * channels),
            Linear(4 * channels, channels),
        )

    def __call__(self, x_nc: jax.Array) -> jax.Array:
        return x_nc + self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x_nc)))))


class SoundEncoder(nnx.Module):
    """A waveform to sound latents."""

    def __init__(self, config: SoundEncoderConfig):
        self.config = config
        widths = [config.enc_dim * factor for factor in (*config.enc_c_mults, config.enc_c_mults[-1])]
        layers: list[nnx.Module] = [Linear((config.enc_n_fft + 2) * config.channels, widths[0], bias=False)]
        for inputs, outputs, stride in zip(widths[:-1], widths[1:], config.enc_strides, strict=True):
            layers += [Block(inputs) for _ in range(config.enc_num_blocks)]
            layers += [StridedConv(inputs, outputs, stride)]
        self.layers = nnx.List([*layers, Linear(widths[-1], config.enc_latent_dim, bias=False)])

    def encode(self, wave_nc: jax.Array) -> jax.Array:
        """Latents [s, c] of samples in [-1, 1], [n, channels]: the mode of the posterior. Silence makes the last one whole."""
        if self.config.normalize_volume:
            wave_nc = wave_nc / (jnp.abs(wave_nc).max() + 1e-5) * 0.95
        wave_nc = jnp.pad(wave_nc, ((0, -wave_nc.shape[0] % self.config.samples_per_latent), (0, 0)))
        x_nc = self.spectra(wave_nc)
        for layer in self.layers:
            x_nc = layer(x_nc)
        return constrain(x_nc[:, : self.config.enc_latent_dim // 2], "")

    def spectra(self, wave_nc: jax.Array) -> jax.Array:
        """One for every hop: of each channel the real parts of all frequencies, then the imaginary parts."""
        size, hop = self.config.enc_n_fft, self.config.enc_hop_length
        count, before = wave_nc.shape[0] // hop, (size - hop) // 2
        padded = jnp.pad(wave_nc, ((before, size - hop - before), (0, 0)))
        parts_sck = padded[hop * np.arange(count)[:, None] + np.arange(size)].swapaxes(1, 2)
        hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)
        found = jnp.fft.rfft(parts_sck * hann)
        return jnp.concatenate([found.real, found.imag], axis=-1).reshape(count, -1)

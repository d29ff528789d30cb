"""The small world's VAE and sound tokenizer, from random weights: what they make of a clip is to be like it.

Their networks are those of generation (cosmos3_jax/models), which run one clip; here it is a batch of them.
"""

import pickle
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.small_world.film import CLIP, frames, sound
from benchmarks.small_world.scene import draw_scene
from cosmos3_jax.config import SoundConfig
from cosmos3_jax.models.vae import VAE, fold, stream, unfold
from cosmos3_jax.weights import Network

T = TypeVar("T")
CROP = 48  # pixels on a side of what the VAE is trained on
SHORT, LONG = 5, CLIP.num_frames  # frames: first it is to learn shapes and colours, then not to drift
THING = 8.0  # how much a pixel of a thing counts
BRIGHT = -0.2  # what is brighter than this in a channel is of a thing; backgrounds are below -0.34
NEAR = 1e-4  # how much a latent's size counts beside the picture
EVERY = 250  # steps from one file to the next
NOISE = 0.1  # added to latents, so that what is near one decodes alike
PEAK = 0.48  # of a sound's samples, as film.py has them
AVERAGE = 0.998  # of the weights: what each step keeps of their moving average


def fit(
    networks: T,
    loss: Callable[[T, Any, jax.Array], jax.Array],
    batch_of: Callable[[int], Any],
    steps: int,
    rate: float,
    *,
    kept: Path,
) -> T:
    """The networks, one or a dict of them, with weights for which `loss(networks, batch, key)` is small; averaged at the end.

    `rate` is the highest learning rate, `batch_of(i)` what step i learns from. `kept` is a file from which a run that was
    stopped goes on.
    """
    schedule = optax.warmup_cosine_decay_schedule(0, rate, min(100, steps // 4), steps, rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    @jax.jit
    def step(networks: T, average: T, moments: Any, batch: Any, key: jax.Array) -> tuple[tuple[T, T, Any], jax.Array]:
        value, gradient = jax.value_and_grad(loss)(networks, batch, key)
        updates, moments = optimizer.update(gradient, moments, networks)
        networks = optax.apply_updates(networks, updates)
        return (networks, optax.incremental_update(networks, average, 1 - AVERAGE), moments), value

    state, keys, values, start = (networks, networks, optimizer.init(networks)), jax.random.key(0), [], time.perf_counter()
    leaves, tree = jax.tree.flatten(state)
    done = 0
    if kept.exists():
        done, leaves = pickle.loads(kept.read_bytes())
        state = jax.tree.unflatten(tree, leaves)
    for i in range(done, steps):
        state, value = step(*state, batch_of(i), jax.random.fold_in(keys, i))
        values.append(float(value))
        if (i + 1) % EVERY == 0 or i + 1 == steps:
            partial = kept.with_suffix(".partial")
            partial.write_bytes(pickle.dumps((i + 1, jax.tree.map(np.asarray, jax.tree.leaves(state)))))
            partial.rename(kept)
            seconds = time.perf_counter() - start
            print(f"{kept.stem}: step {i + 1} of {steps}, loss {np.mean(values[-EVERY:]):.5f}, {seconds:.0f} s", flush=True)
    return state[1]


def crops(size: int, num_frames: int, seed: int, step: int) -> np.ndarray:
    """Parts of films, float32 [size, t, h, w, 3] in [-1, 1], most with a thing in them, half of them in other colours."""
    random = np.random.default_rng([seed, step])
    return np.stack([_crop(num_frames, random) for _ in range(size)])


def _crop(num_frames: int, random: np.random.Generator) -> np.ndarray:
    film_thwc = frames(draw_scene(random), random, CLIP)
    start = int(random.integers(CLIP.num_frames - num_frames + 1))
    part = film_thwc[start : start + num_frames]
    bright = np.argwhere(part[num_frames // 2].max(axis=-1) > (BRIGHT + 1) * 127.5)  # (y, x)
    where = bright[random.integers(len(bright))] if len(bright) and random.random() < 0.8 else (0, 0)
    top, left = (
        int(np.clip(at - random.integers(CROP), 0, side - CROP))
        for at, side in zip(where, (CLIP.height, CLIP.width), strict=True)
    )
    part = part[:, top : top + CROP, left : left + CROP].astype(np.float32)
    if random.random() < 0.5:
        part = part[..., random.permutation(3)] * random.uniform(0.5, 1, 3).astype(np.float32)
    return part / 127.5 - 1


def vae_loss(network: Network, pixels_bthwc: jax.Array, key: jax.Array) -> jax.Array:
    """How far clips are from what becomes of them, above all in things and edges, and a little how far latents are from 0."""

    def one(pixels_thwc: jax.Array, key: jax.Array) -> jax.Array:
        vae: VAE = network.merge()
        config = vae.config
        moments = vae.quant_conv(stream(vae.encoder, fold(pixels_thwc, config.patch_size), config.scale_factor_temporal))[0]
        mean = moments[..., : config.z_dim]

        def decoder(z: jax.Array, past: Any) -> tuple[jax.Array, Any]:
            y, past = vae.decoder(z, past)
            return unfold(y, config.patch_size), past

        z = mean + NOISE * jax.random.normal(key, mean.shape)  # of a deviation that is learned, nothing is for long
        off = stream(decoder, vae.post_quant_conv(z)[0], 1) - pixels_thwc
        counts = jnp.where(jnp.max(pixels_thwc, axis=-1, keepdims=True) > BRIGHT, THING, 1)
        edges = jnp.abs(jnp.diff(off, axis=1))[:, :, 1:] + jnp.abs(jnp.diff(off, axis=2))[:, 1:]  # [t, h-1, w-1, 3]
        far = jnp.mean(counts * (jnp.abs(off) + 2 * jnp.square(off))) + jnp.mean(counts[:, 1:, 1:] * edges)
        return far + NEAR * jnp.mean(jnp.square(mean))

    return jnp.mean(jax.vmap(one)(pixels_bthwc, jax.random.split(key, len(pixels_bthwc))))


def psnr(network: Network, clips: Iterable[np.ndarray]) -> list[float]:
    """Of the worst frame of each clip [t, h, w, 3] in [-1, 1], beside what becomes of it, in decibels."""
    through = jax.jit(lambda network, pixels: network.merge().decode(network.merge().encode(pixels), lambda frames: frames))
    found = []
    for pixels in clips:
        off = np.square(np.asarray(through(network, pixels)) - pixels).mean(axis=(1, 2, 3)) / 4
        found.append(-10 * float(np.log10(off.max())))
    return found


def tones(size: int, samples: int, config: SoundConfig, seed: int, step: int) -> np.ndarray:
    """The sounds of scenes, float32 [size, n, channels]: at any volume, for the encoder takes that away."""
    random = np.random.default_rng([seed, step])
    waves = [sound(draw_scene(random), samples, config.sampling_rate, config.dec_out_channels).T for _ in range(size)]
    return np.stack([wave * np.float32(random.uniform(0.5, 1.9)) for wave in waves])


def sound_loss(networks: dict[str, Network], wave_bnc: jax.Array, key: jax.Array) -> jax.Array:
    """How far sounds are from what becomes of them, sample by sample and in their spectra."""

    def one(wave_nc: jax.Array, key: jax.Array) -> jax.Array:
        encoder, decoder = networks["encoder"].merge(), networks["decoder"].merge()
        z = encoder.encode(wave_nc)
        z += NOISE * jax.random.normal(key, z.shape)
        wave_nc = wave_nc / jnp.abs(wave_nc).max() * PEAK  # at the volume of the world's sounds, whatever the encoder was given
        heard_nc = decoder.decode(z)
        off = jnp.mean(jnp.abs(heard_nc - wave_nc)) + jnp.mean(jnp.abs(_spectra(heard_nc) - _spectra(wave_nc)))
        return off + 1e-2 * jnp.mean(jnp.square(z))

    return jnp.mean(jax.vmap(one)(wave_bnc, jax.random.split(key, len(wave_bnc))))


def _spectra(wave_nc: jax.Array) -> jax.Array:
    """How loud each frequency is, in windows of 1,024 samples."""
    count = len(wave_nc) // 1024
    windows = wave_nc[: count * 1024].reshape(count, 1024, -1) * np.hanning(1024)[:, None].astype(np.float32)
    return jnp.abs(jnp.fft.rfft(windows, axis=1)) / 16

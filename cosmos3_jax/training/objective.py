"""What is minimized: how far the velocity is from the right one, at a random noise level (rectified flow).

Latents x0 and noise e make the sample (1 - sigma) x0 + sigma e, which moves with the velocity e - x0; that is what the sampler
(sampler.py) follows from sigma = 1 to 0. Given frames stay clean, as they do there, and are no part of the loss.

Source: Liu et al. 2022, arXiv:2209.03003; of the noise levels Esser et al. 2024, arXiv:2403.03206, section 3.1; the conventions
are those of diffusers 0.42.1, pipelines/cosmos/pipeline_cosmos3_omni.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cosmos3_jax.axes import constrain
from cosmos3_jax.latents import Latents
from cosmos3_jax.models.layers import Rotary
from cosmos3_jax.weights import Network


@struct.dataclass
class Batch:
    """Clips with their captions, and what was drawn for each. Numpy on the host."""

    latents: Latents  # clean and normalized: video [B, t, h, w, c], sound [B, s, c]
    ids_BS: Any  # captions, padded
    length_B: Any
    text_rotary: Rotary  # [1, S, H/2]
    rotary: Rotary  # [B, G, H/2]
    sigma_B: Any  # noise levels in (0, 1)
    is_given_Bt: Any  # latent frames that are an image's or a clip's, and stay clean
    seed_B: Any  # of the noise


@struct.dataclass
class Loss:
    """Mean squared errors of the velocity, over what is not given."""

    total: jax.Array  # what is minimized
    video: jax.Array
    sound: jax.Array  # 0 without sound


def draw_sigma(random: np.random.Generator, flow_shift: float) -> np.float32:
    """A noise level: logit-normal (mean 0, deviation 1), then shifted towards noise as the sampler's are."""
    u = 1 / (1 + np.exp(-random.standard_normal()))
    return np.float32(flow_shift * u / (1 + (flow_shift - 1) * u))


def draw_noise(latents: Latents, seed_B: jax.Array) -> Latents:
    """Standard normal, each row from its own seed: the same on every mesh and in any batch."""

    def row(x: Latents, seed: jax.Array) -> Latents:
        keys = jax.random.split(jax.random.key(seed))
        draws = [jax.random.normal(key, each.shape) for key, each in zip(keys, jax.tree.leaves(x), strict=False)]
        return jax.tree.unflatten(jax.tree.structure(x), draws)

    return jax.vmap(row)(latents, seed_B)


def loss(und: Network, gen: Network, batch: Batch, noise: Latents, *, train_und: bool, sound_weight: float = 1.0) -> Loss:
    """The loss of a batch. Without `train_und` nothing is kept of the text tower's run, which then has no gradients.

    A row's error is the mean over its own values, so that every clip counts alike, however many of its frames are given.
    """
    prefix = und.merge().prefill(batch.ids_BS, batch.length_B, batch.text_rotary, remat=train_und)
    if not train_und:
        prefix = jax.lax.stop_gradient(prefix)
    noisy = jax.tree.map(lambda x, e: mix(x, e, batch.sigma_B), batch.latents, noise)
    is_given = batch.is_given_Bt[:, :, None, None, None]
    noisy = Latents(jnp.where(is_given, batch.latents.video, noisy.video), noisy.sound)
    target = jax.tree.map(lambda x, e: e - x, batch.latents, noise)
    velocity = gen.merge().velocities(noisy, 1000 * batch.sigma_B, batch.is_given_Bt, batch.rotary, prefix, remat=True)
    video = jnp.mean(_mean(jnp.square(velocity.video - target.video), ~is_given))
    sound = jnp.float32(0)
    if target.sound is not None:
        sound = jnp.mean(jnp.square(velocity.sound - target.sound))
    return Loss(constrain(video + sound_weight * sound, ""), video, sound)


def mix(clean: jax.Array, noise: jax.Array, sigma_B: jax.Array) -> jax.Array:
    """(1 - sigma) clean + sigma noise, row by row."""
    sigma = sigma_B.reshape(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise


def _mean(x: jax.Array, counts: jax.Array) -> jax.Array:
    """[B]: of each row the mean of what counts."""
    counts = jnp.broadcast_to(counts, x.shape)
    axes = tuple(range(1, x.ndim))
    return jnp.sum(x * counts, axes) / jnp.sum(counts, axes)

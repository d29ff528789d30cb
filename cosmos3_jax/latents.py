"""What is denoised, as one value; the noise it begins as; and the two orders of its axes."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Latents:
    """Latents of a video, and of its sound if there is one; or their velocities, [B] in front."""

    video: Any  # [t, h, w, c], numpy on the host
    sound: Any = None  # [s, c]


def noise(seed: int, shape: tuple[int, ...], given: Any = None) -> np.ndarray:
    """Standard normal, float32, of a shape [n, c, ...], channels moved last; `given` takes the place of the first of n.

    The same on every mesh. Unlike diffusers: numpy's, as in NVIDIA's own framework; video and sound each from the beginning
    of its stream.
    """
    drawn = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    if given is not None:
        drawn[:1] = given
    return np.moveaxis(drawn, 1, -1)


def public(latents_thwc: Any) -> Any:
    """Video latents as the interface has them, [1, c, t, h, w]."""
    return jnp.moveaxis(latents_thwc, -1, 0)[None]


def private(latents: Any) -> np.ndarray:
    """Latents [1, c, t, h, w] as they are denoised: float32 [t, h, w, c]."""
    return np.moveaxis(np.asarray(latents, np.float32)[0], 0, -1)

"""What is denoised, as one value."""

from typing import Any

from flax import struct


@struct.dataclass
class Latents:
    """Latents of a video, and of its sound if there is one; or their velocities, [B] in front."""

    video: Any  # [t, h, w, c], numpy on the host
    sound: Any = None  # [s, c]

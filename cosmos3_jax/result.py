"""What the pipeline gives back."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cosmos3_jax import result_files
from cosmos3_jax.errors import InputError, shown
from cosmos3_jax.processes import is_first
from cosmos3_jax.stage import failures_told


@dataclasses.dataclass
class Result:
    """What a request made."""

    video: Any  # float32 [t, h, w, 3] in [0, 1], a list of PIL images, or normalized latents float32 [1, c, t, h, w]
    fps: float
    seconds: dict[str, float]  # by stage
    sound: np.ndarray | None = None  # float32 [channels, samples] in [-1, 1], or with latents float32 [sound_dim, latents]
    sample_rate: int | None = None  # of the waveform, in Hz
    computed_steps: int | None = None  # denoising steps that computed their velocity; fewer than all with a step cache
    # All that it depends on, as JSON has it: prompt, settings, seed, checkpoint and its revision, mesh, dtype, versions
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes an .mp4 with its sound; a .png, .jpg or .webp of a single frame; or a .wav of the sound alone.

        An .mp4 and a .png have the metadata in them (`media.read_metadata`). Of several processes, the first one writes. Raises
        InputError for a path that cannot become such a file, RunError if writing it fails.
        """
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"{shown(path)}: the path of a file is expected")
        path = Path(path)
        with failures_told("write"):
            if isinstance(self.video, list):
                frames = np.stack(self.video)
            elif self.video.ndim == 4:
                frames = np.round(np.clip(self.video, 0, 1) * 255).astype(np.uint8)
            else:
                raise InputError(f'{path}: latents cannot be saved; ask for output_type="np" or "pil"')
            sound = None if self.sound is None or self.sample_rate is None else result_files.Sound(self.sound, self.sample_rate)
            if is_first():
                result_files.write(path, frames, self.fps, sound, self.metadata)

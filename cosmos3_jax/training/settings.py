"""Everything that can be set of a run of training, with its default and its check."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cosmos3_jax.checks import in_range
from cosmos3_jax.errors import InputError, shown

WHOLE = {  # at least
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "warmup": 0,
    "save_every": 1,
    "sample_every": 1,
    "lora_rank": 1,
    "seed": 0,
}
MOST = dict.fromkeys(WHOLE, 2**31 - 1)
RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (1e-12, 1),
    "weight_decay": (0, 10),
    "clip_norm": (1e-6, 1e6),
    "average": (0, 1),
    "flow_shift": (0.01, 1000),
    "caption_dropout": (0, 1),
    "image_share": (0, 1),
    "clip_share": (0, 1),
    "sound_weight": (0, 1000),
    "lora_alpha": (1e-3, 1e6),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """One run. Without `lora_rank` all weights of the generating tower are trained, with it adapters of some."""

    num_frames: int = 189  # of a clip, 1 + 4k; its first ones
    height: int = 720  # pixels, a multiple of 16; clips are cut in the middle to these proportions, and resized
    width: int = 1280
    fps: float = 24.0  # at which frames are taken, the nearest there are
    enable_sound: bool = False  # learn the soundtracks of the clips too
    steps: int = 1000
    batch_size: int = 1  # clips in a batch, divided over `cfg`
    accumulate: int = 1  # batches in a step
    learning_rate: float | None = None  # None: 1e-4 for adapters, 2e-5 for all weights
    warmup: int = 100  # steps, at most half of all
    weight_decay: float = 0.01  # of matrices
    clip_norm: float = 1.0  # of all gradients together, at most
    average: float | None = None  # of the weights' moving average, which is then what is kept (EMA); 0.999, say
    flow_shift: float | None = None  # more of the noise levels at high noise; None: the 10 of a video, the 3 of an image
    caption_dropout: float = 0.1  # share of clips without their caption, for guidance
    image_share: float = 0.2  # share of clips of which the first frame is given
    clip_share: float = 0.1  # share of clips of which the first two latent frames, five frames, are given
    sound_weight: float = 1.0  # of the sound's loss beside the video's
    train_text_tower: bool = False  # too
    lora_rank: int | None = None
    lora_alpha: float | None = None  # None: the rank
    lora_targets: Sequence[str] = ()  # none: the attention of what is trained (lora.py)
    seed: int = 0  # of the order of clips, the noise and all else that is drawn
    save_every: int = 500  # steps
    sample_every: int = 500  # steps
    sample_prompts: Sequence[str] = ()

    def checked(self) -> "Training":
        """These settings as Python's own numbers. Raises InputError for one that cannot be used.

        What has to do with a checkpoint (frames, sizes, fps, sound) is left as it is, to be checked as that of a request.
        """
        values = in_range(self, WHOLE, MOST, RANGES)
        for name in ("lora_targets", "sample_prompts"):
            values[name] = _texts(name, getattr(self, name))
        if self.train_text_tower not in (True, False):
            raise InputError(f"train_text_tower={shown(self.train_text_tower)}: True or False is expected")
        values["train_text_tower"] = bool(self.train_text_tower)
        if self.lora_rank is None and (self.lora_targets or self.lora_alpha is not None):
            raise InputError("lora_targets and lora_alpha are for adapters: give lora_rank too, or leave them out")
        if self.lora_targets and self.train_text_tower:
            raise InputError("lora_targets name all that is trained: leave train_text_tower out, and name to_q, ... too")
        if values["image_share"] + values["clip_share"] > 1:
            raise InputError(f"image_share={self.image_share} and clip_share={self.clip_share}: at most 1 together is expected")
        return dataclasses.replace(self, **values)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise InputError(f"{name}={shown(value)}: a list of texts is expected")
    return tuple(value)

"""What is asked of the pipeline: every setting with its default, the checks that need no weights, and how it is put on record.

Names are those of diffusers where it has them.
"""

import dataclasses
import hashlib
import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from cosmos3_jax.checks import in_range, number_or_none
from cosmos3_jax.config import UNIPC, SchedulerConfig, SoundConfig, TransformerConfig, VAEConfig
from cosmos3_jax.errors import InputError, first_line, shown
from cosmos3_jax.prompt import MOST_TEXT, STYLES, Metadata
from cosmos3_jax.sampler import GRIDS

OUTPUT_TYPES = ("np", "pil", "latent")
# The most that is possible: H.264 has no larger pictures, and a sampler no more steps than the model has timesteps.
MOST = {"height": 16384, "width": 16384, "num_inference_steps": 1000, "steps_per_call": 1000, "seed": 2**32 - 1}
WHOLE = {"num_frames": 1, "height": 1, "width": 1, "num_inference_steps": 1, "steps_per_call": 1, "seed": 0}  # at least
RANGES: dict[str, tuple[float, float]] = {
    "fps": (0.1, 1000),
    "flow_shift": (0.01, 1000),
    "guidance_scale": (-1000, 1000),
    "step_cache": (0, 1),
}
CHOICES = {
    "sigmas": GRIDS,
    "prompt_style": STYLES,
    "output_type": OUTPUT_TYPES,
    "condition_video_keep": ("first", "last"),
}
MOST_GENERATED = 1 << 20  # generated ones, of the latents' patches; 189 frames of 720p are 44,160


@dataclasses.dataclass(frozen=True)
class Request:
    """One generation. One frame is an image; with `image` or `video`, the frames they give are kept as they are."""

    prompt: str  # text, or a JSON object as a caption
    negative_prompt: str | None = None  # None: the checkpoint's own for a video, if it has one, in the native style
    image: Any = None  # first frame: PIL image, array [h, w, 3] or path
    video: Any = None  # clip to go on from: list of PIL images, array [t, h, w, 3] or path
    condition_frame_indexes_vision: Sequence[int] = (0, 1)  # latent frames that `video` fills; frame k needs 1 + 4k of it
    condition_video_keep: Literal["first", "last"] = "first"  # which end of a longer `video` is used
    num_frames: int = 189  # 1 + 4k
    height: int = 720  # pixels, a multiple of 16
    width: int = 1280  # pixels, a multiple of 16
    fps: float = 24.0
    num_inference_steps: int | None = None  # None: 35 for a video, 50 for an image
    guidance_scale: float | None = None  # None: 6 for a video, 4 for an image; guidance is on above 1
    flow_shift: float | None = None  # None: 10 for a video, 3 for an image; no effect on "karras"
    sigmas: Literal["native", "linear", "karras"] = "native"  # noise levels (sampler.py)
    enable_sound: bool = False  # a soundtrack for the video, of a checkpoint that can make one
    seed: int = 42  # of the noise: the same seed gives the same noise on every machine
    latents: Any = None  # noise to use instead, [1, c, t, h, w]
    sound_latents: Any = None  # the sound's noise to use instead, [sound_dim, latents]
    prompt_style: Literal["native", "diffusers"] = "native"  # prompt.py
    output_type: Literal["np", "pil", "latent"] = "np"
    steps_per_call: int = 1  # denoising steps in one program
    step_cache: float = 0.0  # steps before which the latents moved less than this reuse a velocity (0.05); 0: none does


@dataclasses.dataclass(frozen=True)
class ResolvedRequest(Request):
    """A request that was checked, its defaults filled in."""

    num_inference_steps: int = 35
    guidance_scale: float = 6.0
    flow_shift: float = 10.0

    @property
    def metadata(self) -> Metadata:
        """What the prompt is told of the output."""
        return Metadata(self.num_frames, self.height, self.width, float(self.fps))

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch. Unlike diffusers, where any scale but 1 turns it on."""
        return self.guidance_scale > 1

    @property
    def suffix(self) -> str:
        """Of its file, where none is asked for: no format of pictures has sound."""
        return ".png" if self.metadata.is_image and not self.enable_sound else ".mp4"

    def sound_frames(self, sound: SoundConfig | None) -> int:
        """The number of latents of its sound; 0 without it."""
        return sound.latent_frames(self.num_frames, self.fps) if sound is not None and self.enable_sound else 0


def resolve(
    request: Request,
    transformer: TransformerConfig,
    vae: VAEConfig,
    scheduler: SchedulerConfig = UNIPC,
    sound: SoundConfig | None = None,
) -> ResolvedRequest:
    """The request with its defaults filled in. Raises InputError where a value cannot be used with this checkpoint."""
    if isinstance(request, ResolvedRequest):
        return request
    request = _plain(request)
    _check_sizes(request, transformer, vae)
    _check_given(request, vae)
    if request.latents is not None:
        shape = (1, vae.z_dim, *vae.latent_shape(request.num_frames, request.height, request.width))
        _check_latents("latents", request.latents, shape)
    if request.enable_sound or request.sound_latents is not None:
        _check_sound(request, transformer, sound)
    if request.sigmas == "karras" and request.flow_shift is not None:
        warnings.warn(f'flow_shift={request.flow_shift} has no effect with sigmas="karras"', stacklevel=2)
    defaults = {"num_inference_steps": 50, "guidance_scale": 4.0, "flow_shift": 3.0} if request.num_frames == 1 else {}
    if scheduler.distilled_sigmas:
        defaults = _check_distilled(request, scheduler)
    asked = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    asked = {name: value for name, value in asked.items() if value is not None}
    return ResolvedRequest(**defaults | asked)


def _check_distilled(request: Request, scheduler: SchedulerConfig) -> dict[str, Any]:
    """What a distilled checkpoint fixes. Raises InputError if anything else was asked for."""
    fixed = {"num_inference_steps": len(scheduler.distilled_sigmas), "guidance_scale": 1.0}
    for name, value in fixed.items():
        if getattr(request, name) not in (None, value):
            raise InputError(f"{name}={getattr(request, name)}: this checkpoint is distilled for {value}; leave it out")
    if request.step_cache:
        raise InputError(f"step_cache={request.step_cache}: of a distilled checkpoint's few steps each counts; leave it out")
    if request.sigmas != "native" or request.flow_shift is not None:
        what = f"sigmas={request.sigmas!r}" if request.sigmas != "native" else f"flow_shift={request.flow_shift}"
        raise InputError(f"{what}: this checkpoint is distilled for noise levels of its own; leave it out")
    return fixed


def _plain(request: Request) -> Request:
    """Each value by itself, as Python's own number or numpy's array. Raises InputError for one that cannot be used."""
    given = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    _check_texts(given)
    given |= in_range(request, WHOLE, MOST, RANGES)
    if not isinstance(request.enable_sound, bool | np.bool_):
        raise InputError(f"enable_sound={shown(request.enable_sound)}: True or False is expected")
    given["enable_sound"] = bool(request.enable_sound)
    for name, allowed in CHOICES.items():
        value = given[name]
        if not isinstance(value, str) or value not in allowed:
            raise InputError(f"{name}={shown(value)}: one of {', '.join(allowed)} is expected")
    for name in ("image", "video"):
        given[name] = _pictures(name, given[name])
    given["condition_frame_indexes_vision"] = _indexes(request.condition_frame_indexes_vision)
    return dataclasses.replace(request, **given)


def _check_texts(given: Mapping[str, Any]) -> None:
    for name in ("prompt", "negative_prompt"):
        value = given[name]
        if not isinstance(value, str) and not (value is None and name == "negative_prompt"):
            raise InputError(f"{name}: a string is expected, not {type(value).__name__}")
        if value and not value.isascii() and value.encode(errors="ignore").decode() != value:
            raise InputError(f"{name}: not valid UTF-8 text")
        if value and len(value) > MOST_TEXT:
            raise InputError(f"{name}: {len(value)} characters; {MOST_TEXT} are possible")


def _pictures(name: str, value: Any) -> Any:
    """A path as it is; PIL images that are there; what is anything else as an array, to be judged by its shape (media.py)."""
    if value is None or isinstance(value, str | Path):
        return value
    images = [value] if isinstance(value, Image.Image) else value
    try:
        if isinstance(images, list | tuple) and images and all(isinstance(each, Image.Image) for each in images):
            for image in images:
                image.load()
            return value if isinstance(value, Image.Image) else list(images)
        return np.asarray(value)
    except Exception as error:  # closed files; lists of unequal lengths; whatever an object does that is asked for an array
        what = "a PIL image, an array [h, w, 3]" if name == "image" else "PIL images, an array [t, h, w, 3]"
        raise InputError(
            f"{name}: {what} or a path is expected, not {type(value).__name__} ({first_line(error)[:200]})"
        ) from error


def _indexes(value: Any) -> tuple[int, ...]:
    """Latent frames; which of them there are is not known here."""
    try:
        listed = isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim == 1)
        found = [number_or_none(int, each) for each in itertools.islice(value, MOST_GENERATED)] if listed else []
    except Exception:  # whatever somebody else's sequence does
        found = []
    if not found or None in found or min(found) < 0:
        raise InputError(f"condition_frame_indexes_vision={shown(value)}: latent frames are expected, such as [0, 1]")
    return tuple(found)


def _check_sound(request: Request, transformer: TransformerConfig, sound: SoundConfig | None) -> None:
    """A checkpoint that can make sound, and time for it, but not for ever."""
    if not request.enable_sound:
        raise InputError("sound_latents without enable_sound: ask for sound, or leave them out")
    if not transformer.sound_gen:
        raise InputError("enable_sound: this checkpoint has no sound heads; leave it out, or take Cosmos3-Nano or -Super")
    if sound is None:
        raise InputError("enable_sound: this checkpoint has no sound tokenizer, or was loaded with sound=False; leave it out")
    frames = sound.latent_frames(request.num_frames, request.fps)
    if frames < 1:
        raise InputError(f"enable_sound: num_frames={request.num_frames} at fps={request.fps} are too short for any sound")
    if frames > MOST_GENERATED:
        what = f"num_frames={request.num_frames} at fps={request.fps}"
        raise InputError(f"enable_sound: {what} are {frames} sound latents, {MOST_GENERATED} are possible; take a higher fps")
    if request.sound_latents is not None:
        _check_latents("sound_latents", request.sound_latents, (sound.vocoder_input_dim, frames))


def _check_latents(name: str, value: Any, expected: tuple[int, ...]) -> None:
    """Finite numbers of the shape that the request has."""
    try:
        latents = np.asarray(value)
        usable = latents.dtype.kind in "uif" or latents.dtype.name == "bfloat16"
        with np.errstate(over="ignore"):
            usable = usable and bool(np.isfinite(latents.astype(np.float32)).all())
    except Exception:  # ragged lists; tensors that numpy cannot take; whatever an object does that is asked for an array
        usable = False
    if not usable:
        raise InputError(f"{name}: an array of finite real numbers is expected")
    if latents.shape != expected:
        raise InputError(f"{name}: shape {list(latents.shape)} should be {list(expected)}")


def _check_sizes(request: Request, transformer: TransformerConfig, vae: VAEConfig) -> None:
    """Whole latents: 1 + 4k frames of multiples of 16 pixels; and not so many that no machine could hold them."""
    time, space = vae.scale_factor_temporal, vae.scale_factor_spatial
    if (request.num_frames - 1) % time:
        below = request.num_frames - (request.num_frames - 1) % time
        raise InputError(
            f"num_frames={shown(request.num_frames)}: one frame and then groups of {time} are made; "
            f"use {shown(below)} or {shown(below + time)}"
        )
    for name in ("height", "width"):
        value = getattr(request, name)
        if value % space:
            near = sorted({max(space, value // space * space), (value // space + 1) * space})
            raise InputError(f"{name}={value} is not a multiple of {space}; use {' or '.join(map(str, near))}")
    t, h, w = vae.latent_shape(request.num_frames, request.height, request.width)
    patch = transformer.latent_patch_size
    if (tokens := t * -(-h // patch) * -(-w // patch)) > MOST_GENERATED:
        what = f"num_frames={shown(request.num_frames)} of height={request.height}, width={request.width}"
        raise InputError(
            f"{what}: {shown(tokens)} tokens would be generated, {MOST_GENERATED} are possible; make them fewer or smaller"
        )


def _check_given(request: Request, vae: VAEConfig) -> None:
    """The image or the clip, against the frames that are asked for."""
    if request.image is not None and request.video is not None:
        raise InputError("image and video together: give an image to start from, or a clip to go on from, not both")
    for name in ("image", "video"):
        if getattr(request, name) is not None and request.num_frames == 1:
            raise InputError(f"{name} with num_frames=1 leaves nothing to generate; ask for 5 frames or more")
    if request.video is None:
        return
    indexes = request.condition_frame_indexes_vision
    latent_frames = vae.latent_shape(request.num_frames, request.height, request.width)[0]
    if max(indexes) >= latent_frames:
        raise InputError(
            f"condition_frame_indexes_vision={shown(list(indexes))}: {request.num_frames} frames have the latent frames "
            f"0 to {latent_frames - 1}"
        )


def in_json(request: ResolvedRequest, scheduler: SchedulerConfig) -> dict[str, Any]:
    """The settings that have an effect, as JSON has them: of pictures, clips and noise the size and a checksum."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if value is not None and field.name != "output_type":
            settings[field.name] = _in_json(value)
    if request.sigmas == "karras" or scheduler.distilled_sigmas:  # where it has no effect
        del settings["flow_shift"]
    for name in ("enable_sound", "step_cache"):
        if not settings[name]:
            del settings[name]
    if request.video is None:
        del settings["condition_frame_indexes_vision"], settings["condition_video_keep"]
    return settings


def _in_json(value: Any) -> Any:
    match value:
        case bool() | int() | float() | str():
            return value
        case Image.Image():
            return f"{value.width}x{value.height}, sha256 {_checksum(value)}"
        case [Image.Image(), *_]:
            return f"{len(value)} frames of {value[0].width}x{value[0].height}, sha256 {_checksum(*value)}"
        case [int(), *_]:
            return list(value)
    array = np.asarray(value)
    return f"{list(array.shape)} of {array.dtype}, sha256 {_checksum(array)}"


def _checksum(*arrays: Any) -> str:
    """The first 16 digits of SHA-256."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]

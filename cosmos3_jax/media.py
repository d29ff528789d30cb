"""Images, clips and sounds between files and arrays. The only file that imports imageio.

Conditioning images are prepared as diffusers 0.42.1 does it, to the bit: one uint8 that rounds the other way moves the latents
more than all our other float32 differences. Files are written under a temporary name and then renamed, so none is ever half
written.
"""

import collections
import contextlib
import itertools
import math
import os
import stat
import subprocess
import tempfile
import warnings
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageOps

from cosmos3_jax.errors import InputError
from cosmos3_jax.folder import beside

VIDEO_SUFFIXES = (".mp4",)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SOUND_SUFFIXES = (".wav",)
AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
AAC_FRAME = 1024  # samples
# Of a sound that may be anything, noise too: no part is replaced by noise (pns), no channel by a mixture (is, ms), and six bits
# a sample are the most that AAC takes; music needs four, and white noise five for a correlation of 0.995.
AAC_OPTIONS = ("-aac_pns", "0", "-aac_is", "0", "-aac_ms", "0", "-aac_tns", "0")
AAC_BITS = 6
AAC_CODERS = ("twoloop", "fast")  # of ffmpeg; the first spends too little on short sounds, the second cuts loud tones


class Sound(NamedTuple):
    """A waveform."""

    wave_cn: np.ndarray  # [channels, samples] in [-1, 1]
    sample_rate: int


def open_image(path: str | Path) -> Image.Image:
    """The image in a file as RGB, upright (EXIF applied). Raises InputError if it cannot be read."""
    try:
        with Image.open(path) as file:
            # a palette may have transparency, and Pillow warns where that would be lost
            image: Image.Image = file.convert("RGBA") if "transparency" in file.info else file
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"image {path}: there is no such file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a damaged PNG
        raise InputError(f"image {path}: not a readable image; PNG, JPEG or WebP is expected ({error})") from error


def open_clip(path: str | Path, count: int, keep: str = "first") -> list[Image.Image]:
    """The first or last `count` frames of a video file. Raises InputError if it cannot be read."""
    if not Path(path).is_file():
        raise InputError(f"video {path}: there is no such file")
    try:
        frames: Any = imageio.imiter(path, plugin="FFMPEG")
        with _quiet_fork(), contextlib.closing(frames):
            chosen = itertools.islice(frames, count) if keep == "first" else collections.deque(frames, count)
            clip = [Image.fromarray(frame) for frame in chosen]
    except (OSError, ValueError, RuntimeError, IndexError, StopIteration) as error:
        raise InputError(f"video {path}: not a readable video; MP4 with H.264 is expected") from error
    if not clip:
        raise InputError(f"video {path}: it has no frames")
    return clip


def fit_image(image: Image.Image | np.ndarray, height: int, width: int) -> np.ndarray:
    """The image covering height x width, cropped at its centre: float32 [height, width, 3] in [-1, 1].

    Arrays are [h, w, 3]: integers in [0, 255]; floats in [-1, 1] if any is negative, in [0, 1] if none is above 1, else in
    [0, 255]. Raises InputError for other values. Source: diffusers 0.42.1, `_preprocess_conditioning_image`.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    pixels = _array("image", image, "[height, width, 3]")
    is_float = pixels.dtype.kind == "f"
    pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all() or pixels.max() > 255 or pixels.min() < (-1 if is_float else 0):
        raise InputError("image: integers in [0, 255], or floats in [0, 1], [-1, 1] or [0, 255], are expected")
    if is_float and pixels.min() < 0:
        pixels = (pixels + 1) * np.float32(127.5)
    elif is_float and pixels.max() <= 1:
        pixels = pixels * np.float32(255)
    scale = max(width / pixels.shape[1], height / pixels.shape[0])
    rows, columns = math.ceil(scale * pixels.shape[0]), math.ceil(scale * pixels.shape[1])
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    pixels = resize(pixels, columns, range(left, left + width), axis=1)
    pixels = resize(pixels, rows, range(top, top + height), axis=0)
    return np.clip(np.round(pixels), 0, 255) / np.float32(127.5) - 1


def resize(x: np.ndarray, size: int, part: range, axis: int) -> np.ndarray:
    """Part of one axis of a float32 array at another size, bilinear and antialiased, with torch's rounding.

    Pillow has this filter too, but its tables differ: of a 481x722 image 864 values then round to another uint8. Here a
    product is added to a sum before rounding to float32, as torch's compiled loop does (a fused multiply-add).
    Source: torch 2.13, aten/src/ATen/native/cpu/UpSampleKernel.cpp.
    """
    f32 = np.float32
    x = np.moveaxis(x, axis, 0)
    if len(x) == size:
        return np.moveaxis(x[part.start : part.stop], 0, axis)
    scale = f32(x.shape[0]) / f32(size)
    support = max(scale, f32(1))
    out = np.empty((len(part), *x.shape[1:]), f32)
    for row_out, i in zip(out, part, strict=True):
        center = scale * f32(i + 0.5)
        low = max(int(center - support + f32(0.5)), 0)
        high = min(int(center + support + f32(0.5)), x.shape[0])
        distance = (np.arange(low, high).astype(f32) - center + f32(0.5)) * (f32(1) / support)
        weight = np.maximum(f32(0), f32(1) - np.abs(distance))
        weight = weight / np.cumsum(weight, dtype=f32)[-1]
        total = x[low] * weight[0]
        for row, w in zip(x[low + 1 : high], weight[1:], strict=True):
            total = (total + row.astype(np.float64) * w).astype(f32)
        row_out[...] = total
    return np.moveaxis(out, 0, axis)


def fit_clip(frames: Sequence[Image.Image] | np.ndarray, height: int, width: int, part: slice = slice(None)) -> np.ndarray:
    """Part of a clip, stretched to height x width: float32 [t, height, width, 3] in [-1, 1].

    Images (and uint8 arrays, taken as images) are resized by Pillow, bilinear. Float arrays are in [0, 1], or in [-1, 1]
    if any value of the whole clip is negative, and take their nearest pixels. Source: diffusers 0.42.1,
    `VideoProcessor.preprocess_video`. Unlike diffusers: uint8 arrays mean [0, 255]; there they would be taken for [0, 1].
    """
    if isinstance(frames, Sequence) and len(frames) > 0 and all(isinstance(frame, Image.Image) for frame in frames):
        resized = [frame.resize((width, height), Image.Resampling.BILINEAR).convert("RGB") for frame in frames[part]]
        unit = np.stack([np.asarray(frame) for frame in resized]).astype(np.float32) / 255
        return 2 * unit - 1
    array = _array("video", frames, "[frames, height, width, 3]")
    if array.dtype == np.uint8:
        return fit_clip(images(array[part]), height, width)
    if array.dtype.kind != "f" or not np.isfinite(array).all() or np.abs(array).max() > 1:
        raise InputError("video: an array of uint8, or of floats in [0, 1] or [-1, 1], is expected")
    rows, columns = (
        np.minimum((np.arange(new) * (np.float32(old) / np.float32(new))).astype(int), old - 1)
        for new, old in zip((height, width), array.shape[1:3], strict=True)
    )
    fitted = array[part][:, rows][:, :, columns].astype(np.float32)
    return fitted if array.min() < 0 else 2 * fitted - 1


def _array(what: str, value: Any, shape: str) -> np.ndarray:
    """An array of numbers of this shape. Raises InputError for anything else."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = np.asarray(None)
    if array.ndim != shape.count(",") + 1 or array.shape[-1] != 3 or 0 in array.shape or array.dtype.kind not in "uif":
        raise InputError(
            f"{what}: PIL images, or an array of shape {shape}, are expected, not {list(array.shape)} of {array.dtype}"
        )
    return array


def images(frames: np.ndarray) -> list[Image.Image]:
    """uint8 frames [t, h, w, 3] as PIL images."""
    return [Image.fromarray(frame) for frame in frames]


def check_writable(path: Path, num_frames: int, *, has_sound: bool = False) -> None:
    """Raises InputError unless `path` can become a file for this many frames, or their sound."""
    suffixes: tuple[str, ...] = VIDEO_SUFFIXES
    what = "one frame" if num_frames == 1 else f"{num_frames} frames"
    if has_sound:
        suffixes, what = VIDEO_SUFFIXES + SOUND_SUFFIXES, f"{what} with sound"
    elif num_frames == 1:
        suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: {what} cannot be written as {path.suffix or 'that'}; use {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; create it first")
    try:
        mode = path.stat().st_mode if os.access(path.parent, os.W_OK) else 0
        writable = stat.S_ISREG(mode)
    except FileNotFoundError:
        writable = True
    except (OSError, ValueError):  # a name that no file can have
        writable = False
    if not writable:
        raise InputError(f"{path}: no file can be written there")


def write(path: Path, frames: np.ndarray, fps: float, sound: Sound | None = None) -> None:
    """Writes uint8 frames [t, h, w, 3] as H.264 (yuv420p, plays everywhere), with the sound as AAC; one frame as a picture; or
    the sound alone as 16-bit PCM.

    The sound of a video is made as long as the video. Raises InputError where that cannot be; then nothing has changed.
    """
    check_writable(path, len(frames), has_sound=sound is not None)
    if sound is not None and not np.isfinite(sound.wave_cn).all():
        raise InputError(f"{path}: the sound has values that are no numbers")
    if sound is not None and len(sound.wave_cn) > 2 and path.suffix.lower() in VIDEO_SUFFIXES:
        raise InputError(f"{path}: one or two channels are written beside a video, not {len(sound.wave_cn)}; write a .wav")
    try:
        with beside(path) as partial:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                Image.fromarray(frames[0]).save(partial, quality=95)
            elif path.suffix.lower() in SOUND_SUFFIXES:
                assert sound is not None
                _write_wav(partial, sound)
            else:
                _encode(partial, frames, fps, sound)
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error})") from error


def _write_wav(path: Path, sound: Sound) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound.wave_cn))
        file.setsampwidth(2)
        file.setframerate(sound.sample_rate)
        file.writeframes(_pcm(sound))


def _pcm(sound: Sound) -> bytes:
    """16-bit samples of what is within [-1, 1], the channels in turn."""
    return np.rint(np.clip(sound.wave_cn, -1, 1) * 32767).astype("<i2").T.tobytes()


def _encode(path: Path, frames: np.ndarray, fps: float, sound: Sound | None) -> None:
    """Raises OSError if not all of it was written: ffmpeg may fail as it is closed, and imageio does not say so."""
    with _quiet_fork(), tempfile.TemporaryDirectory() as scratch:
        audio: dict[str, str] = {}
        if sound is not None:
            samples = round(len(frames) / fps * sound.sample_rate)
            sound = Sound(_fit_length(sound.wave_cn, samples), sound.sample_rate)
            audio = {"audio_path": str(_encode_sound(Path(scratch), sound)), "audio_codec": "copy"}
        imageio.imwrite(
            path,
            frames,
            plugin="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=8,  # of 10
            macro_block_size=1,  # do not resize: sizes are multiples of 16 already
            output_params=["-movflags", "+faststart"],
            **audio,
        )
        try:
            written, _ = imageio_ffmpeg.count_frames_and_secs(path)
        except RuntimeError:
            written = 0
        if written != len(frames):
            raise OSError(f"ffmpeg wrote {written} of {len(frames)} frames; is the disk full?")
        if sound is not None:
            _heard(path, sound)


def _encode_sound(folder: Path, sound: Sound) -> Path:
    """A file in `folder` with the sound as AAC, by the coder that loses less of it."""
    rate = next((rate for rate in AAC_RATES if rate >= sound.sample_rate), AAC_RATES[-1])
    channels, pcm = len(sound.wave_cn), _pcm(sound)
    source = ["-f", "s16le", "-ar", str(sound.sample_rate), "-ac", str(channels), "-i", "-"]
    aac = ["-c:a", "aac", "-ar", str(rate), "-b:a", str(AAC_BITS * rate * channels), *AAC_OPTIONS]
    lost = {}
    for coder in AAC_CODERS:
        file = folder / f"{coder}.m4a"
        _ffmpeg(*source, *aac, "-aac_coder", coder, str(file), given=pcm)
        lost[file] = np.square(_heard(file, sound) - np.clip(sound.wave_cn, -1, 1)).sum()
    return min(lost, key=lambda file: lost[file])


def _heard(path: Path, sound: Sound) -> np.ndarray:
    """The sound that a file decodes to, [channels, samples]. Raises OSError if it is shorter or longer than `sound`."""
    channels, samples = sound.wave_cn.shape
    pcm = _ffmpeg("-i", str(path), "-map", "0:a:0", "-f", "f32le", "-ar", str(sound.sample_rate), "-")
    heard = np.frombuffer(pcm, np.float32).reshape(-1, channels).T
    if not samples - 16 <= heard.shape[1] < samples + AAC_FRAME:  # resampled; some ffmpegs decode the last frame whole
        raise OSError(f"ffmpeg wrote {heard.shape[1]} of {samples} samples of sound; is the disk full?")
    return _fit_length(heard, samples)


def _ffmpeg(*arguments: str, given: bytes = b"") -> bytes:
    """What ffmpeg writes to its standard output. Raises OSError if it fails."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode:
        raise OSError(f"ffmpeg: {done.stderr.decode(errors='replace').strip()[-200:]}")
    return done.stdout


def _fit_length(wave_cn: np.ndarray, samples: int) -> np.ndarray:
    """The sound cut off, or with silence at its end."""
    cut = wave_cn[:, :samples]
    return np.pad(cut, ((0, 0), (0, samples - cut.shape[1])))


def _quiet_fork() -> warnings.catch_warnings:
    """Without JAX's warning that a fork can deadlock: imageio's child starts ffmpeg at once and never touches JAX."""
    return warnings.catch_warnings(action="ignore", category=RuntimeWarning)

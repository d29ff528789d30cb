"""Images, clips and sounds from files to arrays of the size that is asked for.

Conditioning images are prepared as diffusers 0.42.1 does it, to the bit: one uint8 that rounds the other way moves the latents
more than all our other float32 differences.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from cosmos3_jax import ffmpeg
from cosmos3_jax.errors import InputError

MAX_PIXELS = 100_000_000  # of an image that is read, and of a frame
# What is read. Of Pillow's others some start programs, some hold an image of another size than they say; of ffmpeg's others
# some follow playlists, to files elsewhere or that never end.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
CLIP_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,ogg,asf"
SOUND_FORMATS = f"{CLIP_FORMATS},wav,mp3,flac"
TURNS = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
UPRIGHT = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(TURNS, 2)}  # EXIF's orientations
PILLOW = threading.RLock()  # for what Pillow and `warnings` have once in a process


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, the first of several, as RGB and upright (EXIF applied). Raises InputError if it cannot be read."""
    _check_file("image", path)
    with _pillow(f"image {path}"), _opened(path, IMAGE_FORMATS) as file:
        image = _rgb(file, f"image {path}")
        try:
            turn = UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:  # damaged EXIF says nothing
            turn = None
        return image if turn is None else image.transpose(turn)


def open_clip(path: str | Path, count: int, keep: str = "first", fps: float | None = None) -> list[Image.Image]:
    """The first or last `count` frames of a video file, RGB and upright; all of its frames, or those at `fps`.

    Raises InputError if it cannot be read.
    """
    _check_file("video", path)
    try:
        with contextlib.closing(ffmpeg.frames(path, CLIP_FORMATS, MAX_PIXELS, fps)) as frames:
            return list(itertools.islice(frames, count) if keep == "first" else collections.deque(frames, count))
    except OSError as error:
        raise InputError(f"video {path}: not a readable video; MP4 with H.264 is expected ({error})") from error


def open_sound(path: str | Path, sample_rate: int, channels: int, samples: int) -> np.ndarray:
    """The first `samples` of the sound in a file, a video's too: float32 [channels, samples], silent where there is no more.

    It begins where the file does, so that it fits the frames of a video whose sound sets in later. One channel goes into all,
    and if there are others than those asked for, all get the mean. Raises InputError for a file without a sound.
    """
    _check_file("sound", path)
    # async: silence before a sound that sets in later, and where samples are missing. More than two channels are mixed to two.
    filters = f"aresample={sample_rate}:async=1:first_pts=0,aformat=channel_layouts=mono|stereo,atrim=end_sample={samples}"
    reading = ("-format_whitelist", SOUND_FORMATS, "-i", f"file:{path}", "-map", "0:a:0", "-af", filters)
    try:
        wave_cn = _samples(ffmpeg.run(*reading, "-c:a", "pcm_f32be", "-f", "au", "-"))
    except OSError as error:
        expected = "WAV, MP3, or MP4 with a soundtrack is expected"
        raise InputError(f"sound {path}: not a readable sound; {expected} ({error})") from error
    if not np.isfinite(wave_cn).all():
        raise InputError(f"sound {path}: has values that are no numbers")
    if len(wave_cn) != channels:
        wave_cn = wave_cn.mean(axis=0, keepdims=True).repeat(channels, axis=0)
    return np.pad(wave_cn, ((0, 0), (0, samples - wave_cn.shape[1])))


def _samples(au: bytes) -> np.ndarray:
    """float32 [channels, samples] of a sound in Sun's AU, whose header tells the channels. Raises OSError for none."""
    start, channels = (int.from_bytes(au[at : at + 4], "big") for at in (4, 20))
    if len(au) <= max(start, 24):
        raise OSError("it has no samples")
    return np.frombuffer(au, ">f4", offset=start).reshape(-1, channels).T.astype(np.float32)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that a result (result_files.py) has in an .mp4 or .png. Raises InputError if there is none."""
    path = Path(path)
    _check_file("file", path)
    text: Any = None
    if path.suffix.lower() == ".png":
        with _pillow(f"file {path}"), _opened(path, ("PNG",)) as file:
            text = file.info.get("comment")
    else:
        with contextlib.suppress(OSError):
            tags = ffmpeg.run("-format_whitelist", "mov", "-i", f"file:{path}", "-f", "ffmetadata", "-")
            if comment := re.search("^comment=(.*)$", tags.decode(errors="replace"), re.MULTILINE):
                text = re.sub(r"\\(.)", r"\1", comment[1])
    try:
        metadata = json.loads(text or "null")
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise InputError(f"file {path}: holds no metadata; an .mp4 or .png that this project wrote is expected")
    return metadata


def _check_file(what: str, path: str | Path) -> None:
    """Raises InputError unless it is a regular file: of others some never end, or never begin."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise InputError(f"{what} {path}: there is no such file") from error
    except (OSError, ValueError) as error:  # a name that no file can have
        raise InputError(f"{what} {path}: cannot be read ({error})") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{what} {path}: not a readable {what}; a regular file is expected")


@contextlib.contextmanager
def _pillow(what: str) -> Iterator[None]:
    """Pillow without its warnings, and its errors as InputError: of a damaged file it raises nearly anything."""
    try:
        with PILLOW, warnings.catch_warnings(action="ignore"):
            yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: not a readable image; PNG, JPEG or WebP is expected ({error})") from error


def _opened(path: str | Path, formats: tuple[str, ...]) -> Image.Image:
    """An image of which only the header has been read, however large it is: Pillow's own limit would not tell its size."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path, formats=formats)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _rgb(image: Image.Image, what: str) -> Image.Image:
    """The image as RGB; what is transparent has the colour that is stored for it. Raises InputError if it cannot be read.

    Unlike diffusers: 16-bit gray is scaled to 8 bits, and floats mean what they mean in an array; there, all above 255 is
    white. 32-bit integers are 16-bit gray if any of them is above 255.
    """
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise InputError(f"{what}: {image.width}x{image.height} pixels; 1 to {MAX_PIXELS:,} in all are expected")
    with _pillow(what):
        if image.mode.startswith(("F", "I")):  # F, I, I;16, I;16B
            values = np.asarray(image)
            if image.mode.startswith("I;") or (image.mode == "I" and values.max() > 255):
                values = np.rint(values / 257).astype(np.int32)
            image = Image.fromarray(np.rint(_levels(what, values)).astype(np.uint8))
        return image.convert("RGB")


def fit_image(image: Image.Image | np.ndarray, height: int, width: int) -> np.ndarray:
    """The image covering height x width, cropped at its centre: float32 [height, width, 3] in [-1, 1].

    Arrays are [h, w, 3]: integers in [0, 255]; floats in [-1, 1] if any is negative, in [0, 1] if none is above 1, else in
    [0, 255]. Raises InputError for other values. Source: diffusers 0.42.1, `_preprocess_conditioning_image`.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(_rgb(image, "image"))
    pixels = _levels("image", _array("image", image, "[height, width, 3]"))
    scale = max(width / pixels.shape[1], height / pixels.shape[0])
    rows, columns = math.ceil(scale * pixels.shape[0]), math.ceil(scale * pixels.shape[1])
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    pixels = resize(pixels, columns, range(left, left + width), axis=1)
    pixels = resize(pixels, rows, range(top, top + height), axis=0)
    return np.clip(np.round(pixels), 0, 255) / np.float32(127.5) - 1


def _levels(what: str, array: np.ndarray) -> np.ndarray:
    """The array as float32 in [0, 255]. Raises InputError for values that `fit_image` does not take."""
    is_float = array.dtype.kind == "f"
    array = array.astype(np.float32)
    if not np.isfinite(array).all() or array.max() > 255 or array.min() < (-1 if is_float else 0):
        raise InputError(f"{what}: integers in [0, 255], or floats in [0, 1], [-1, 1] or [0, 255], are expected")
    if is_float and array.min() < 0:
        return (array + 1) * np.float32(127.5)
    return array * np.float32(255) if is_float and array.max() <= 1 else array


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
        resized = [_rgb(frame, "video").resize((width, height), Image.Resampling.BILINEAR) for frame in frames[part]]
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


def cropped(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part in the middle of an image that has the proportions of height x width."""
    scale = min(image.width / width, image.height / height)
    columns, rows = round(scale * width), round(scale * height)
    left, top = (image.width - columns) // 2, (image.height - rows) // 2
    return image.crop((left, top, left + columns, top + rows))


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

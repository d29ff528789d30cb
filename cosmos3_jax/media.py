"""Images, clips and sounds between files and arrays. The only file that starts ffmpeg.

Conditioning images are prepared as diffusers 0.42.1 does it, to the bit: one uint8 that rounds the other way moves the latents
more than all our other float32 differences. Files are written under a temporary name and then renamed, so none is ever half
written.
"""

import collections
import contextlib
import io
import itertools
import json
import math
import os
import re
import stat
import subprocess
import tempfile
import threading
import warnings
import wave
from collections.abc import Generator, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from cosmos3_jax.errors import InputError, RunError
from cosmos3_jax.folder import beside

VIDEO_SUFFIXES = (".mp4",)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SOUND_SUFFIXES = (".wav",)
MAX_PIXELS = 100_000_000  # of an image that is read, and of a frame
# What is read. Of Pillow's others some start programs, some hold an image of another size than they say; of ffmpeg's others
# some follow playlists, to files elsewhere or that never end.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
CLIP_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,ogg,asf"
TURNS = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
UPRIGHT = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(TURNS, 2)}  # EXIF's orientations
PILLOW = threading.RLock()  # for what Pillow and `warnings` have once in a process
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
    """The image in a file, the first of several, as RGB and upright (EXIF applied). Raises InputError if it cannot be read."""
    _check_file("image", path)
    with _pillow(f"image {path}"), _opened(path, IMAGE_FORMATS) as file:
        image = _rgb(file, f"image {path}")
        try:
            turn = UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:  # damaged EXIF says nothing
            turn = None
        return image if turn is None else image.transpose(turn)


def open_clip(path: str | Path, count: int, keep: str = "first") -> list[Image.Image]:
    """The first or last `count` frames of a video file, RGB and upright. Raises InputError if it cannot be read."""
    _check_file("video", path)
    try:
        with contextlib.closing(_frames(path)) as frames:
            return list(itertools.islice(frames, count) if keep == "first" else collections.deque(frames, count))
    except OSError as error:
        raise InputError(f"video {path}: not a readable video; MP4 with H.264 is expected ({error})") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `write` put into an .mp4 or .png. Raises InputError if there is none."""
    path = Path(path)
    _check_file("file", path)
    text: Any = None
    if path.suffix.lower() == ".png":
        with _pillow(f"file {path}"), _opened(path, ("PNG",)) as file:
            text = file.info.get("comment")
    else:
        with contextlib.suppress(OSError):
            tags = _ffmpeg("-format_whitelist", "mov", "-i", f"file:{path}", "-f", "ffmetadata", "-").decode(errors="replace")
            if comment := re.search("^comment=(.*)$", tags, re.MULTILINE):
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


def _frames(path: str | Path) -> Generator[Image.Image]:
    """The frames of a video file one by one. Raises OSError if there are none, or not all; ffmpeg ends when this does."""
    command = _command("-format_whitelist", CLIP_FORMATS, "-max_pixels", str(MAX_PIXELS), "-i", f"file:{path}")
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    found = False
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, process_group=0) as ffmpeg:
            assert ffmpeg.stdout is not None
            try:
                while len(header := [ffmpeg.stdout.readline() for _ in range(3)][1].split()) == 2:
                    width, height = map(int, header)
                    pixels = ffmpeg.stdout.read(3 * width * height)
                    if len(pixels) < 3 * width * height:
                        break
                    yield Image.frombytes("RGB", (width, height), pixels)
                    found = True
                ffmpeg.wait()
            finally:
                ffmpeg.kill()
        if not found or ffmpeg.returncode < 0:  # of what is damaged there may be frames, but not of what killed ffmpeg
            log.seek(0)
            raise OSError(_reason(log.read(), ffmpeg.returncode))


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


def write(
    path: Path, frames: np.ndarray, fps: float, sound: Sound | None = None, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes uint8 frames [t, h, w, 3] as H.264 (yuv420p, plays everywhere), with the sound as AAC; one frame as a picture; or
    the sound alone as 16-bit PCM.

    The sound of a video is made as long as the video. Metadata, which JSON can hold, goes into an .mp4 or .png, to be read by
    `read_metadata`; other files have none. Raises InputError where no such file can be written, RunError if it goes wrong on
    the way; then nothing has changed.
    """
    check_writable(path, len(frames), has_sound=sound is not None)
    if sound is not None and len(sound.wave_cn) > 2 and path.suffix.lower() in VIDEO_SUFFIXES:
        raise InputError(f"{path}: one or two channels are written beside a video, not {len(sound.wave_cn)}; write a .wav")
    if sound is not None and not np.isfinite(sound.wave_cn).all():
        raise RunError(f"{path}: the sound has values that are no numbers")
    comment = "" if metadata is None else json.dumps(dict(metadata))
    try:
        with beside(path) as partial:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                _write_image(partial, frames[0], comment)
            elif path.suffix.lower() in SOUND_SUFFIXES:
                assert sound is not None
                _write_wav(partial, sound)
            else:
                _encode(partial, frames, fps, sound, comment)
    except OSError as error:
        raise RunError(f"{path}: could not be written ({error})") from error


def _write_image(path: Path, frame: np.ndarray, comment: str) -> None:
    """Raises OSError if it cannot be written."""
    info = PngInfo()
    if comment:
        info.add_text("comment", comment)
    encoded = io.BytesIO()  # Pillow does not see when the end of a JPEG is not written; Python does
    try:
        Image.fromarray(frame).save(encoded, Image.registered_extensions()[path.suffix.lower()], quality=95, pnginfo=info)
    except ValueError as error:  # a WebP larger than there can be
        raise OSError(error) from error
    path.write_bytes(encoded.getvalue())


def _write_wav(path: Path, sound: Sound) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound.wave_cn))
        file.setsampwidth(2)
        file.setframerate(sound.sample_rate)
        file.writeframes(_pcm(sound))


def _pcm(sound: Sound) -> bytes:
    """16-bit samples of what is within [-1, 1], the channels in turn."""
    return np.rint(np.clip(sound.wave_cn, -1, 1) * 32767).astype("<i2").T.tobytes()


def _encode(path: Path, frames: np.ndarray, fps: float, sound: Sound | None, comment: str) -> None:
    """Raises OSError if not all of it was written."""
    count, height, width, _ = frames.shape
    with tempfile.TemporaryDirectory() as scratch:
        tags = Path(scratch) / "tags.txt"  # no argument of a process may be as long as a prompt
        escaped = re.sub(r"[=;#\\]", r"\\\g<0>", comment)
        tags.write_text(";FFMETADATA1\n" + (f"comment={escaped}\n" if comment else ""), encoding="ascii")
        inputs = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
        inputs += ["-r", str(Fraction(fps).limit_denominator()), "-i", "-", "-f", "ffmetadata", "-i", str(tags)]
        output = ["-map", "0:v", "-map_metadata", "1", "-c:v", "libx264", "-crf", "10", "-pix_fmt", "yuv420p"]
        if sound is not None:
            sound = Sound(_fit_length(sound.wave_cn, round(count / fps * sound.sample_rate)), sound.sample_rate)
            inputs += ["-i", str(_encode_sound(Path(scratch), sound))]
            output += ["-map", "2:a", "-c:a", "copy"]
        pixels = np.ascontiguousarray(frames).data.cast("B")
        _ffmpeg(*inputs, *output, "-movflags", "+faststart", str(path), given=pixels)
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


def _ffmpeg(*arguments: str, given: bytes | memoryview = b"") -> bytes:
    """What ffmpeg writes to its standard output. Raises OSError if it fails."""
    command = _command("-y", *arguments)
    done = subprocess.run(command, input=given, capture_output=True, check=False, process_group=0)
    if done.returncode or b"Error writing" in done.stderr:  # ffmpeg 4.2 returns 0 when the disk is full; 7.0 does not
        raise OSError(_reason(done.stderr, done.returncode))
    return done.stdout


def _command(*arguments: str) -> list[str]:
    """To be run in a process group of its own: Ctrl-C is for us to answer. Raises OSError if there is no ffmpeg."""
    try:
        return [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments]
    except RuntimeError as error:
        raise OSError(error) from error


def _reason(log: bytes, code: int) -> str:
    """Why ffmpeg failed: the first line of what it says, without who says it; what follows is the consequence."""
    line = log.decode(errors="replace").strip().partition("\n")[0]
    line = re.sub(r"^(\[[^]]*] ?)+", "", line)
    return f"ffmpeg ended with {code}: {line[:200]}"


def _fit_length(wave_cn: np.ndarray, samples: int) -> np.ndarray:
    """The sound cut off, or with silence at its end."""
    cut = wave_cn[:, :samples]
    return np.pad(cut, ((0, 0), (0, samples - cut.shape[1])))

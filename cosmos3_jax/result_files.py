"""The files of a result: a video, a picture or a sound, each whole or not there, and in it what made it."""

import io
import json
import os
import re
import stat
import tempfile
import wave
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cosmos3_jax import ffmpeg
from cosmos3_jax.errors import InputError, RunError
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
    `media.read_metadata`; other files have none. Raises InputError where no such file can be written, RunError if that goes
    wrong on the way; then nothing has changed.
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
        ffmpeg.run(*inputs, *output, "-movflags", "+faststart", str(path), given=pixels)
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
        ffmpeg.run(*source, *aac, "-aac_coder", coder, str(file), given=pcm)
        lost[file] = np.square(_heard(file, sound) - np.clip(sound.wave_cn, -1, 1)).sum()
    return min(lost, key=lambda file: lost[file])


def _heard(path: Path, sound: Sound) -> np.ndarray:
    """The sound that a file decodes to, [channels, samples]. Raises OSError if it is shorter or longer than `sound`."""
    channels, samples = sound.wave_cn.shape
    pcm = ffmpeg.run("-i", str(path), "-map", "0:a:0", "-f", "f32le", "-ar", str(sound.sample_rate), "-")
    heard = np.frombuffer(pcm, np.float32).reshape(-1, channels).T
    if not samples - 16 <= heard.shape[1] < samples + AAC_FRAME:  # resampled; some ffmpegs decode the last frame whole
        raise OSError(f"ffmpeg wrote {heard.shape[1]} of {samples} samples of sound; is the disk full?")
    return _fit_length(heard, samples)


def _fit_length(wave_cn: np.ndarray, samples: int) -> np.ndarray:
    """The sound cut off, or with silence at its end."""
    cut = wave_cn[:, :samples]
    return np.pad(cut, ((0, 0), (0, samples - cut.shape[1])))

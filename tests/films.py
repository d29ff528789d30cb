"""Pictures and clips to test with, and an ffmpeg that does what it is told."""

import io
import subprocess

import imageio_ffmpeg
import numpy as np
from PIL import Image


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (*shape, 3)).astype(np.uint8)


def smooth(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A clip that H.264 keeps: frame i is gray level 20 i, with a soft ramp of colours across."""
    ramp = np.linspace(0, 40, width)[None, None, :, None] * np.array([1.0, 0.5, 0.0])
    return np.broadcast_to(20.0 * np.arange(count)[:, None, None, None] + ramp, (count, height, width, 3)).astype(np.uint8)


def encoded(kind: str, picture: Image.Image | None = None, **options) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    (picture or Image.fromarray(smooth(1, 16, 16)[0])).save(file, kind, **options)
    return file.getvalue()


def made(path, *options: str, source: str = "testsrc=s=64x48:r=24:d=0.5"):
    """A file that ffmpeg makes."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, *options, path]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
    return path


def instead(monkeypatch, folder, script: str) -> None:
    """A shell script in ffmpeg's place, which is $FFMPEG to it."""
    path = folder / "ffmpeg.sh"
    path.write_text(f"#!/bin/sh\nFFMPEG={imageio_ffmpeg.get_ffmpeg_exe()}\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(path))

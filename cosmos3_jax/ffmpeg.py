"""ffmpeg as a child process: the only file that starts it."""

import re
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

import imageio_ffmpeg
from PIL import Image


def run(*arguments: str, given: bytes | memoryview = b"") -> bytes:
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


def frames(path: str | Path, formats: str, max_pixels: int, fps: float | None = None) -> Generator[Image.Image]:
    """The frames of a video file one by one; at another `fps`, the nearest of them, some left out or repeated.

    Raises OSError if there are none, or ffmpeg was killed; a damaged file gives those before the damage. ffmpeg ends when this
    does.
    """
    command = _command("-format_whitelist", formats, "-max_pixels", str(max_pixels), "-i", f"file:{path}")
    command += [] if fps is None else ["-vf", f"fps={fps}:round=near"]
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
                ffmpeg.stdout.close()  # or it could wait for us to read on
                ffmpeg.wait()
            finally:
                ffmpeg.kill()
        if not found or ffmpeg.returncode < 0:  # of what is damaged there may be frames, but not of what killed ffmpeg
            log.seek(0)
            raise OSError(_reason(log.read(), ffmpeg.returncode))

"""A folder of clips to learn from: `name.mp4` or `name.png` (or another such), and its caption in `name.txt` or `name.json`."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cosmos3_jax import media
from cosmos3_jax.errors import InputError
from cosmos3_jax.prompt import MOST_TEXT

CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
CAPTIONS = (".txt", ".json")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A file and what is said of it: text, or a JSON object."""

    path: Path
    caption: str

    @property
    def is_image(self) -> bool:
        return self.path.suffix.lower() in IMAGES


def find_clips(folder: Path) -> list[Clip]:
    """All clips below a folder that have a caption, in the order of their names.

    Raises InputError, with all that is wrong, for clips without a caption or with two, and captions without a clip.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; one with clips and their captions is expected")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder)))
    captions: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in CAPTIONS:
            captions.setdefault(file.with_suffix(""), []).append(file)
    media_files = [file for file in files if file.suffix.lower() in CLIPS + IMAGES]
    problems = [
        f"{file}: no caption; {file.stem}.txt or {file.stem}.json belongs beside it"
        for file in media_files
        if file.with_suffix("") not in captions
    ]
    problems += [f"{two[0]}: {two[1].name} is there as well; leave one" for two in captions.values() if len(two) > 1]
    stems = collections.Counter(file.with_suffix("") for file in media_files)
    problems += [f"{caption[0]}: no clip of that name" for stem, caption in captions.items() if stem not in stems]
    problems += [f"{stem}: two clips have one caption" for stem, count in stems.items() if count > 1]
    if problems:
        raise InputError(_listing(folder, problems))
    if not media_files:
        raise InputError(f"{folder}: no clips there; name{CLIPS[0]} or name{IMAGES[0]}, and name.txt, are expected")
    return [Clip(file, _caption(captions[file.with_suffix("")][0])) for file in media_files]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _listing(folder: Path, problems: Sequence[str]) -> str:
    more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n  ".join([f"{folder}: {len(problems)} fault{'s' * (len(problems) > 1)}", *problems[:20], *more])


def _caption(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: no text that can be read ({error})") from error
    if not text or len(text) > MOST_TEXT:
        raise InputError(f"{file}: {len(text)} characters; a caption of 1 to {MOST_TEXT} is expected")
    if file.suffix.lower() == ".json" and not _is_object(text):
        raise InputError(f"{file}: no JSON object; plain text belongs into {file.stem}.txt")
    return text


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def frames(clip: Clip, num_frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """The first `num_frames` at `fps`, the middle cut out and resized: float32 [t, height, width, 3] in [-1, 1].

    Of an image the one frame there is. Raises InputError for a file that cannot be read, or is too short.
    """
    if clip.is_image:
        return media.fit_image(media.open_image(clip.path), height, width)[None]
    images = media.open_clip(clip.path, num_frames, fps=fps)
    if len(images) < num_frames:
        raise InputError(f"{clip.path}: {len(images)} frames at {fps:g} a second, {num_frames} are expected; ask for fewer")
    return media.fit_clip([media.cropped(image, height, width) for image in images], height, width)

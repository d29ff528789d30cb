"""A file of requests: one JSON object a line, with a name and the words of `Request`.

    {"name": "car", "prompt": "A red car.", "num_frames": 49, "seed": 7}
    {"name": "waves", "prompt": {"subject": "waves", "style": "slow"}, "enable_sound": true}

Paths are seen from the folder of the file.
"""

import dataclasses
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos3_jax.errors import InputError, shown
from cosmos3_jax.folder import unique
from cosmos3_jax.request import Request

WORDS = {field.name for field in dataclasses.fields(Request)} - {"output_type"}
LONGEST_NAME = 200  # bytes: a file name has 255, and needs some for itself
MOST_TOLD = 20


@dataclasses.dataclass(frozen=True)
class Line:
    """One request as it stands in the file: its words may be wrong."""

    name: str
    words: Mapping[str, Any]
    folder: Path  # of the file

    def request(self, defaults: Mapping[str, Any]) -> Request:
        """The request, with `defaults` for words that the line does not have. Raises InputError for words that are none."""
        if strange := sorted(self.words.keys() - WORDS):
            raise InputError(f"{shown(strange[0])}: there is no such setting; {', '.join(sorted(WORDS))} are known")
        words = {**defaults, **self.words, "output_type": "pil"}
        for name in ("prompt", "negative_prompt"):
            if isinstance(words.get(name), dict):
                words[name] = json.dumps(words[name])
        for name in ("image", "video"):
            if (path := self.words.get(name)) is not None:
                if not isinstance(path, str):
                    raise InputError(f"{name}={shown(path)}: the path of a file is expected")
                words[name] = self.folder / path
        if "prompt" not in words:
            raise InputError("prompt: missing; a text or a JSON object is expected")
        return Request(**words)


def read_requests(path: str | Path) -> list[Line]:
    """All lines but empty ones. Raises InputError with every line that is no object, or has no name of its own."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no text file that can be read ({error})") from error
    found: list[Line] = []
    wrong: list[str] = []
    names: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            words = _object(line)
            name = _name(words.pop("name", None))
            if (alike := unicodedata.normalize("NFC", name).casefold()) in names:
                raise InputError(f"name={name!r} comes twice (upper and lower case are one to some file systems)")
            names.add(alike)
            found.append(Line(name, words, path.parent))
        except InputError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = [f"and {len(wrong) - MOST_TOLD} more"] if len(wrong) > MOST_TOLD else []
        raise InputError(f"{path}: requests that cannot be read\n  " + "\n  ".join(wrong[:MOST_TOLD] + more))
    if not found:
        raise InputError(f"{path}: there are no requests in it; one JSON object a line is expected")
    return found


def _object(line: str) -> dict[str, Any]:
    try:
        words = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from error
    if not isinstance(words, dict):
        raise InputError(f"a JSON object is expected, not {shown(words)}")
    return words


def _name(name: Any) -> str:
    """A name that files can have."""
    if not isinstance(name, str):
        raise InputError(f"name={shown(name)}: a text is expected, which the files will be called by")
    if not name.isprintable() or name != name.strip() or name.startswith(".") or set(name) & set('/\\:*?"<>|') or not name:
        raise InputError(f"name={ascii(name)[:100]}: no name for a file; letters, digits, spaces and -_.()+=,@ are good")
    if len(name.encode()) > LONGEST_NAME:
        raise InputError(f"name={name[:20]}...: {len(name.encode())} bytes long; {LONGEST_NAME} are possible")
    return name

"""From what the user wrote to token ids. The only file that imports transformers.

Two styles. "native" follows NVIDIA's own generation configs: no system prompt, metadata appended to a plain text or written
into a JSON caption, the negative prompt left alone. "diffusers" reproduces that pipeline (0.42.1, `tokenize_prompt`): system
prompt, the same sentences on JSON too, and their "is not" forms on the negative prompt.
"""

import contextlib
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from cosmos3_jax.errors import InputError

STYLES = ("native", "diffusers")
# Real captions have some 2,000. The text tower looks back at all tokens before each: of 16,384 the tiny model would take 10 s.
MOST_TOKENS = 8192
MOST_TEXT = 1 << 18  # characters of a prompt; to count its tokens takes time, too
MOST_CHAT = 1 << 20  # characters that a chat template makes; in a JSON caption one may become twelve
MOST_LINES = 100_000  # of a chat template that are run; the published ones have some 20 a turn
BUCKET = 128  # prompts are padded to a multiple of this, so that another prompt finds the compiled program again

# sic, "give": the model was trained with it
SYSTEM = "You are a helpful assistant who will generate {kind} from a give prompt."
DURATION = "The video is{no} {seconds:.1f} seconds long and is{no} of {fps:.0f} FPS."
RESOLUTION = "This {kind} is{no} of {height}x{width} resolution."


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the prompt is told of the output: frames, pixels, frames a second. One frame is an image."""

    num_frames: int
    height: int
    width: int
    fps: float

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The checkpoint's tokenizer. Raises InputError where it lacks what a prompt needs, or knows more than the model."""
    if not folder.is_dir():
        raise InputError(f"{folder}: missing; is the checkpoint complete?")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell everyone that there is no PyTorch
    from transformers import AutoTokenizer  # here: it takes seconds, and `--help` or a wrong flag need not wait for it

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise InputError(f"{folder}: no tokenizer can be read there ({error})") from error
    if tokenizer.chat_template is None:
        raise InputError(f"{folder}: the tokenizer has no chat template; chat_template.jinja belongs beside it")
    if tokenizer.eos_token_id is None or "<|vision_start|>" not in tokenizer.get_vocab():
        raise InputError(f"{folder}: the tokenizer lacks an end-of-text token or <|vision_start|>")
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise InputError(f"{folder}: makes tokens up to {largest}, but the model has vocab_size={vocab_size}")
    try:
        tokenize(tokenizer, "text", "system")
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    return tokenizer


def texts(style: str, prompt: str, negative: str | None, metadata: Metadata, default_negative: str) -> tuple[str, str]:
    """(conditional, unconditional) texts in a style; `default_negative` stands in where a native video has None."""
    if style == "native":
        return native_texts(prompt, negative, metadata, default_negative)
    return diffusers_texts(prompt, negative, metadata)


def native_texts(prompt: str, negative: str | None, metadata: Metadata, default_negative: str) -> tuple[str, str]:
    """(conditional, unconditional) texts in NVIDIA's style. `default_negative` stands in for a video's None."""
    if negative is None:
        negative = "" if metadata.is_image else default_negative
    caption = _json_object(prompt)
    if caption is None:
        return _with_sentences(prompt.strip(), metadata), negative
    if metadata.is_image:
        caption = {key: value for key, value in caption.items() if key not in ("duration", "fps")}
    else:
        caption |= {"duration": f"{int(metadata.num_frames / metadata.fps)}s", "fps": float(metadata.fps)}
    caption["resolution"] = {"H": metadata.height, "W": metadata.width}
    return json.dumps(caption), negative  # other scripts become \u escapes, as in the captions of diffusers


def diffusers_texts(prompt: str, negative: str | None, metadata: Metadata) -> tuple[str, str]:
    """(conditional, unconditional) texts as diffusers writes them."""
    return _with_sentences(prompt, metadata), _with_sentences(negative or "", metadata, no=" not")


def _with_sentences(text: str, metadata: Metadata, no: str = "") -> str:
    kind = "image" if metadata.is_image else "video"
    sentences = [RESOLUTION.format(kind=kind, no=no, height=metadata.height, width=metadata.width)]
    if not metadata.is_image:
        sentences.insert(0, DURATION.format(no=no, seconds=metadata.num_frames / metadata.fps, fps=metadata.fps))
    for sentence in sentences:
        text = text.rstrip(".")
        text = f"{text}. {sentence}" if text else sentence
    return text


def _json_object(text: str) -> dict[str, Any] | None:
    """A caption; None for a text, with a warning if it may be meant as a caption: it begins like one, or is a list."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter of thousands of brackets
        if text.lstrip().startswith("{"):
            warnings.warn(f"prompt: it begins like a JSON caption and is not JSON ({error}); it is taken as text", stacklevel=2)
        return None
    if isinstance(value, list):
        warnings.warn("prompt: a JSON caption is an object, this is a list; it is taken as text", stacklevel=2)
    return value if isinstance(value, dict) else None


def system_prompt(style: str, metadata: Metadata, wanted: bool) -> str | None:
    """The system prompt: only diffusers' style has one, and only if the checkpoint wants it."""
    if style == "native" or not wanted:
        return None
    return SYSTEM.format(kind="images" if metadata.is_image else "videos")


def tokenize(tokenizer: Any, text: str, system: str | None = None) -> list[int]:
    """The ids of one chat turn, ending with the end of text and the start of vision.

    Raises InputError where the tokenizer's chat template fails, or makes too much of the text.
    """
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": text})
    try:
        with _ending():
            chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, add_vision_id=False)
    except Exception as error:  # whatever a template written by others may do
        raise InputError(f"the chat template cannot be used ({error})") from error
    if len(chat) > MOST_CHAT:
        raise InputError(f"the chat template cannot be used: it makes {len(chat)} characters, {MOST_CHAT} are possible")
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|vision_start|>")]


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Ends a chat template that loops (Jinja's sandbox limits one loop, not loops in loops): raises ValueError."""
    left = MOST_LINES

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":  # as Jinja calls what it compiles
            return None
        left -= 1
        if left < 0:
            raise ValueError(f"it does not end within {MOST_LINES} lines")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def pad(branches: list[list[int]], longest: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ids_BS, length_B), int32: right-padded with zeros to one bucket, in which `longest` tokens have room too.

    What the padding holds is never seen.

    Raises InputError for a branch of more than MOST_TOKENS.
    """
    for name, ids in zip(("prompt", "negative_prompt"), branches, strict=False):
        if len(ids) > MOST_TOKENS:
            raise InputError(f"{name}: {len(ids)} tokens with what is added to it; {MOST_TOKENS} are possible; shorten it")
    length_B = np.array([len(ids) for ids in branches], np.int32)
    ids_BS = np.zeros((len(branches), -(-max(int(length_B.max()), longest) // BUCKET) * BUCKET), np.int32)
    for row, ids in zip(ids_BS, branches, strict=True):
        row[: len(ids)] = ids
    return ids_BS, length_B

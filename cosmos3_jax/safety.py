"""Who checks the prompt before anything runs, and the frames before anyone has them: the user's checker, NVIDIA's, or none.

NVIDIA's is the package `cosmos_guardrail`, which runs in torch. It is imported only where it is used.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from cosmos3_jax.errors import BlockedError, Cosmos3Error, InputError, RunError

PACKAGE, INSTALL = "cosmos_guardrail", 'pip install "cosmos3_jax[guardrails]"'
VARIABLE = "COSMOS3_GUARDRAILS"
OR_NONE = f"or go without (safety_checker=False, --no-guardrails, {VARIABLE}=0)"
FRAMES = 16  # in one call of cosmos_guardrail, which takes 0.35 GB of its device for them in 720p, for 189 of them 4.1 GB


class SafetyChecker(Protocol):
    """What a checker looks like. It blocks with BlockedError(reason), whose reason should not repeat the prompt, or so:"""

    def check_prompt(self, text: str) -> bool | None:
        """False blocks, True and None let the prompt pass."""

    def check_video(self, frames: np.ndarray) -> np.ndarray | None:
        """None blocks, frames of the same shape pass. In and out uint8 [t, h, w, 3]; they may be changed in place."""


class CosmosGuardrail:
    """`cosmos_guardrail` as a checker: words and Qwen3Guard for prompts (what that fails on, passes); pixelated faces.

    On the first CUDA device that torch sees, else the CPU. Raises InputError if the package or its models cannot be loaded.
    """

    def __init__(self) -> None:
        try:
            import torch
            from cosmos_guardrail import CosmosSafetyChecker
        except Exception as error:  # not ImportError alone: RuntimeError for a torchvision of another torch
            raise InputError(
                f"{PACKAGE}: it cannot be imported ({_first_line(error)}); see that {INSTALL} is complete, and for OpenCV "
                f"`apt install libgl1`, {OR_NONE}"
            ) from error
        try:
            self._models = CosmosSafetyChecker()
            self._models.to("cuda:0" if torch.cuda.is_available() else "cpu")
        except Exception as error:  # of the network, of files, of torch
            raise InputError(
                f"{PACKAGE}: its models cannot be loaded ({_first_line(error)}); accept the licence on "
                f"https://huggingface.co/nvidia/Cosmos-1.0-Guardrail and log in with `hf auth login`, {OR_NONE}"
            ) from error

    def check_prompt(self, text: str) -> bool:
        """Whether the prompt passes; if not, the package logs why."""
        return self._models.check_text_safety(text)

    def check_video(self, frames: np.ndarray) -> np.ndarray | None:
        """The frames with faces pixelated, or None."""
        parts = [self._models.check_video_safety(frames[start : start + FRAMES]) for start in range(0, len(frames), FRAMES)]
        return None if any(part is None for part in parts) else np.concatenate(parts)


def chosen(asked: SafetyChecker | bool | None = None) -> SafetyChecker | None:
    """A checker as it is given; NVIDIA's for True; None for False. For None, what COSMOS3_GUARDRAILS=1 or =0 says.

    If that says nothing, NVIDIA's where its package is installed. Raises InputError for anything else, for True without the
    package, and for a package that cannot be loaded.
    """
    wanted = _wanted(asked)
    if isinstance(wanted, bool | None):
        if wanted is False:
            return None
        if _is_installed():
            return CosmosGuardrail()
        if wanted:
            raise InputError(f"guardrails: {PACKAGE} is not installed; {INSTALL}, {OR_NONE}")
        return None
    has_both = all(callable(getattr(wanted, method, None)) for method in ("check_prompt", "check_video"))
    if not has_both or isinstance(wanted, type):
        expected = "True, False, None or an object with check_prompt and check_video is expected"
        raise InputError(f"safety_checker: {expected}, not {_kind(wanted)}")
    return wanted


def planned(asked: bool | None = None) -> str | None:
    """The name of the checker that `chosen` gives, which is not loaded for it; None if there is none."""
    return PACKAGE if _wanted(asked) is not False and _is_installed() else None


def in_words(checker: SafetyChecker | None, asked: SafetyChecker | bool | None = None) -> str:
    """What the command line says of the checker that was chosen for what was asked."""
    off = "asked for" if _wanted(asked) is False else f"{PACKAGE} is not installed: {INSTALL}"
    return name(checker) or f"off ({off})"


def name(checker: SafetyChecker | None) -> str | None:
    """Of the checker; None if there is none."""
    if checker is None:
        return None
    return PACKAGE if isinstance(checker, CosmosGuardrail) else type(checker).__name__


def check_prompt(checker: SafetyChecker, text: str) -> None:
    """Raises BlockedError if the checker blocks the prompt, and RunError if it fails."""
    answer = _ask(checker, "prompt", checker.check_prompt, text)
    if not isinstance(answer, bool | np.bool_ | None):
        raise RunError(f"prompt: {name(checker)} answered {_kind(answer)}; True, False or None is expected")
    if answer is not None and not answer:
        raise _blocked(checker, "prompt")


def check_video(checker: SafetyChecker, frames: np.ndarray) -> np.ndarray:
    """Frames [t, h, w, 3], uint8 or float32 in [0, 1], as the checker lets them pass; floats that it left alone stay unrounded.

    It sees uint8. Unlike diffusers: rounded, as `Result.save` does, not cut off. Raises BlockedError if it blocks the frames,
    and RunError if it fails.
    """
    shown = frames if frames.dtype == np.uint8 else np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)
    passed = _ask(checker, "video", checker.check_video, shown.copy())
    if passed is None:
        raise _blocked(checker, "video")
    if _kind(passed) != _kind(shown):
        raise RunError(f"video: {name(checker)} answered {_kind(passed)}; {_kind(shown)} is expected")
    if frames.dtype == np.uint8:
        return passed
    return frames if np.array_equal(passed, shown) else np.where(passed == shown, frames, passed / np.float32(255))


def _is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def _wanted(asked: Any) -> Any:
    """What was asked for; if that is None, True, False or None of the environment."""
    value = os.environ.get(VARIABLE, "")
    if asked is not None or not value:
        return asked
    if value not in ("0", "1"):
        raise InputError(f"{VARIABLE}={value}: 1, 0 or nothing is expected")
    return value == "1"


def _ask(checker: SafetyChecker, what: str, check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except BlockedError as error:
        raise _blocked(checker, what, str(error)) from error
    except Cosmos3Error:
        raise
    except Exception as error:
        raise RunError(
            f"{what}: {name(checker)} failed, and nothing passes unchecked ({_first_line(error)}); mend it, {OR_NONE}"
        ) from error


def _blocked(checker: SafetyChecker, what: str, reason: str = "") -> BlockedError:
    reason = " ".join(reason.split()) or ("its log says why" if isinstance(checker, CosmosGuardrail) else "it says no more")
    return BlockedError(f"{what}: blocked by {name(checker)} ({reason}); ask for something else")


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

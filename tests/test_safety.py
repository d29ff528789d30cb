"""Safety checkers: which is taken, what its answers become, and the sentence of every failure."""

import importlib.machinery
import re
import runpy
import sys
import types

import numpy as np
import pytest

from cosmos3_jax import safety
from cosmos3_jax.errors import BlockedError, InputError, RunError

INSTALL = 'pip install "cosmos3_jax[guardrails]"'
PROMPT = "a red ball rolls to the right"
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)
FLOATS = np.clip((FRAMES + np.float32(0.4)) / 255, 0, 1).astype(np.float32)  # each rounds to the pixel of FRAMES
FACE = (slice(1, 3), slice(0, 2), slice(2, 5))  # frames, rows, columns


class Mine:
    """A checker of the user's: it answers with what it was made with, or raises it, and remembers what it was asked."""

    def __init__(self, answer=True):
        self.answer, self.asked = answer, []

    def respond(self, value):
        self.asked.append(value)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer(value) if callable(self.answer) else self.answer

    check_prompt = check_video = respond


class CosmosSafetyChecker:
    """The class of `cosmos_guardrail` 0.3.2, as far as it is used."""

    def __init__(self):
        self.device, self.prompts, self.calls = None, [], []

    def to(self, device=None, dtype=None):
        self.device = device

    def check_text_safety(self, prompt):
        self.prompts.append(prompt)
        return "weapon" not in prompt

    def check_video_safety(self, frames):
        """Changes what it is given, as the original does, and returns another array; frames that begin black are blocked."""
        self.calls.append(len(frames))
        if not frames[:, 0, 0].any(-1).all():
            return None
        passed = frames.copy()
        passed[:, 1] = 7
        frames[:] = 0
        return passed


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("COSMOS3_GUARDRAILS", raising=False)


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", None)


@pytest.fixture
def package(monkeypatch):
    """The stand-in for the installed package, beside a torch without CUDA."""
    module = types.ModuleType("cosmos_guardrail")
    module.__spec__ = importlib.machinery.ModuleSpec("cosmos_guardrail", None)
    module.CosmosSafetyChecker = CosmosSafetyChecker
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", module)
    monkeypatch.setitem(sys.modules, "torch", torch := types.ModuleType("torch"))
    torch.cuda = types.SimpleNamespace(is_available=lambda: False)
    return module


# Which checker


@pytest.mark.parametrize(
    ("asked", "variable", "is_on"),
    [
        (True, None, True),
        (True, "0", True),
        (False, None, False),
        (False, "1", False),
        (None, None, True),
        (None, "", True),
        (None, "1", True),
        (None, "0", False),
    ],
)
def test_the_installed_package_is_taken_unless_somebody_says_no(package, monkeypatch, asked, variable, is_on):
    if variable is not None:
        monkeypatch.setenv("COSMOS3_GUARDRAILS", variable)
    checker = safety.chosen(asked)
    assert isinstance(checker, safety.CosmosGuardrail) == is_on
    assert safety.name(checker) == ("cosmos_guardrail" if is_on else None)
    assert safety.in_words(checker, asked) == ("cosmos_guardrail" if is_on else "off (asked for)")


@pytest.mark.parametrize(
    ("asked", "variable", "words"),
    [
        (None, None, f"off (cosmos_guardrail is not installed: {INSTALL})"),
        (None, "", f"off (cosmos_guardrail is not installed: {INSTALL})"),
        (None, "0", "off (asked for)"),
        (False, None, "off (asked for)"),
    ],
)
def test_without_the_package_there_is_none_and_it_says_why(missing, monkeypatch, asked, variable, words):
    if variable is not None:
        monkeypatch.setenv("COSMOS3_GUARDRAILS", variable)
    assert safety.chosen(asked) is None
    assert safety.in_words(None, asked) == words


@pytest.mark.parametrize(("asked", "variable"), [(True, ""), (True, "0"), (None, "1")])
def test_asked_for_and_not_installed(missing, monkeypatch, asked, variable):
    monkeypatch.setenv("COSMOS3_GUARDRAILS", variable)
    with pytest.raises(InputError, match=f"cosmos_guardrail is not installed; {re.escape(INSTALL)}, .*--no-guardrails"):
        safety.chosen(asked)


@pytest.mark.parametrize("value", ["yes", "true", "2", " 1", "01"])
def test_an_environment_that_says_neither(package, monkeypatch, value):
    monkeypatch.setenv("COSMOS3_GUARDRAILS", value)
    with pytest.raises(InputError, match=f"COSMOS3_GUARDRAILS={value}: 1, 0 or nothing"):
        safety.chosen()
    assert safety.chosen(False) is None  # what is said in code does not ask it


def test_a_checker_of_the_users_is_taken_as_it_is(missing, monkeypatch):
    monkeypatch.setenv("COSMOS3_GUARDRAILS", "0")
    mine = Mine()
    assert safety.chosen(mine) is mine
    assert safety.name(mine) == safety.in_words(mine, mine) == "Mine"
    assert mine.asked == []


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ("off", "str"),
        (1, "int"),
        (0, "int"),
        (Mine, "type"),
        (types.SimpleNamespace(check_prompt=print), "SimpleNamespace"),
        (types.SimpleNamespace(check_video=print), "SimpleNamespace"),
        (types.SimpleNamespace(check_prompt=print, check_video=None), "SimpleNamespace"),
        (CosmosSafetyChecker(), "CosmosSafetyChecker"),
    ],
)
def test_what_is_no_checker(package, asked, kind):
    with pytest.raises(InputError, match=rf"^safety_checker: .*check_prompt and check_video is expected, not {kind}$"):
        safety.chosen(asked)


# NVIDIA's


def test_nothing_of_it_is_imported_before_it_is_used(monkeypatch):
    for name in ("cosmos_guardrail", "torch", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    assert runpy.run_path(safety.__file__)["chosen"](False) is None


@pytest.mark.parametrize(("has_cuda", "device"), [(False, "cpu"), (True, "cuda:0")])
def test_it_runs_where_torch_can(package, monkeypatch, has_cuda, device):
    monkeypatch.setattr(sys.modules["torch"].cuda, "is_available", lambda: has_cuda)
    assert safety.chosen()._models.device == device


@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.parametrize("error", [OSError("gated\nRequest ID: 1"), RuntimeError("gated"), ValueError("gated")])
@pytest.mark.parametrize("step", ["__init__", "to"])
def test_models_that_cannot_be_loaded(package, monkeypatch, asked, error, step):
    def fail(*_):
        raise error

    monkeypatch.setattr(CosmosSafetyChecker, step, fail)
    with pytest.raises(InputError, match=rf"\({type(error).__name__}: gated\); accept the licence.*hf auth login") as caught:
        safety.chosen(asked)
    assert "https://huggingface.co/nvidia/Cosmos-1.0-Guardrail" in str(caught.value)
    assert "--no-guardrails" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.parametrize("error", [ImportError("libGL.so.1: no such file"), RuntimeError("operator nms does not exist\n")])
def test_a_package_that_cannot_be_imported_is_not_taken_for_none(package, monkeypatch, asked, error):
    def fail(name):
        raise error

    monkeypatch.delattr(package, "CosmosSafetyChecker")
    monkeypatch.setattr(package, "__getattr__", fail, raising=False)
    sentence = f"cosmos_guardrail: it cannot be imported ({type(error).__name__}: {str(error).strip()}); "
    with pytest.raises(InputError, match=re.escape(sentence) + ".*guardrails.*libgl1.*--no-guardrails"):
        safety.chosen(asked)


def test_its_answer_on_a_prompt(package):
    checker = safety.chosen()
    safety.check_prompt(checker, PROMPT)
    with pytest.raises(BlockedError, match=r"^prompt: blocked by cosmos_guardrail \(its log says why\); ") as caught:
        safety.check_prompt(checker, "a weapon on a table")
    assert "table" not in str(caught.value)
    assert checker._models.prompts == [PROMPT, "a weapon on a table"]


@pytest.mark.parametrize("count", [1, 16, 17, 33])
def test_it_sees_all_frames_some_at_a_time(package, count):
    frames = np.arange(1, 1 + count, dtype=np.uint8)[:, None, None, None] * np.ones((2, 3, 3), np.uint8)
    frames.flags.writeable = False  # as arrays from JAX are
    checker = safety.chosen()
    passed = safety.check_video(checker, frames)
    np.testing.assert_array_equal(passed[:, 0], frames[:, 0])
    assert (passed[:, 1] == 7).all()
    assert sum(checker._models.calls) == count
    assert max(checker._models.calls) <= safety.FRAMES


@pytest.mark.parametrize("black", [0, 18])
def test_one_frame_that_it_blocks_blocks_the_video(package, black):
    frames = np.ones((19, 2, 3, 3), np.uint8)
    frames[black] = 0
    with pytest.raises(BlockedError, match=r"^video: blocked by cosmos_guardrail \(its log says why\); "):
        safety.check_video(safety.chosen(), frames)


# What a checker answers

CHECKS = {
    "prompt": (safety.check_prompt, PROMPT),
    "video": (safety.check_video, FRAMES),
    "floats": (safety.check_video, FLOATS),
}
checks = pytest.mark.parametrize(("check", "value"), CHECKS.values(), ids=CHECKS)


@pytest.mark.parametrize("answer", [True, None, np.True_])
def test_a_prompt_passes(answer):
    mine = Mine(answer)
    assert safety.check_prompt(mine, PROMPT) is None
    assert mine.asked == [PROMPT]


@pytest.mark.parametrize("answer", [False, np.False_])
def test_a_prompt_is_blocked(answer):
    with pytest.raises(BlockedError, match=r"^prompt: blocked by Mine \(it says no more\); ask for something else$"):
        safety.check_prompt(Mine(answer), PROMPT)


@pytest.mark.parametrize("answer", [1, 0, "unsafe", "", (False, "weapons"), [], np.zeros(1, bool)], ids=repr)
def test_an_answer_on_a_prompt_that_is_none(answer):
    with pytest.raises(RunError, match=r"^prompt: Mine answered .*; True, False or None is expected$"):
        safety.check_prompt(Mine(answer), PROMPT)


@pytest.mark.parametrize("frames", [FRAMES, FLOATS], ids=["uint8", "float32"])
def test_a_video_is_blocked(frames):
    with pytest.raises(BlockedError, match=r"^video: blocked by Mine \(it says no more\); ask for something else$"):
        safety.check_video(Mine(None), frames)


@checks
@pytest.mark.parametrize("reason", ["weapons", " weapons\n", ""])
def test_a_checker_that_raises_the_block_itself(check, value, reason):
    with pytest.raises(BlockedError, match=rf"blocked by Mine \({reason.strip() or 'it says no more'}\); ") as caught:
        check(Mine(BlockedError(reason)), value)
    assert PROMPT not in str(caught.value)


@checks
@pytest.mark.parametrize(
    "error", [ValueError("no model\nat all"), KeyError("a"), OSError(), AssertionError(), MemoryError()], ids=repr
)
def test_a_checker_that_fails_lets_nothing_pass(check, value, error):
    with pytest.raises(
        RunError, match=rf"^(prompt|video): Mine failed, .*\({type(error).__name__}: .*\).*--no-guardrails"
    ) as caught:
        check(Mine(error), value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@checks
@pytest.mark.parametrize("error", [InputError("no key"), RunError("no room"), KeyboardInterrupt()], ids=repr)
def test_what_is_ours_or_the_users_wish_goes_through(check, value, error):
    with pytest.raises(type(error)) as caught:
        check(Mine(error), value)
    assert caught.value is error


WRONG = {
    "fewer frames": lambda seen: seen[:-1],
    "one frame": lambda seen: seen[0],
    "transposed": lambda seen: seen.swapaxes(1, 2),
    "float32": lambda seen: seen.astype(np.float32),
    "int8": lambda seen: seen.astype(np.int8),
    "list": list,
    "nested": lambda seen: seen.tolist(),
    "True": lambda seen: True,
    "pair": lambda seen: (True, seen),
}


@pytest.mark.parametrize("frames", [FRAMES, FLOATS], ids=["uint8", "float32"])
@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_an_answer_on_a_video_that_is_none(answer, frames):
    with pytest.raises(RunError, match=r"^video: Mine answered .*; uint8 \[5, 4, 6, 3\] is expected$"):
        safety.check_video(Mine(answer), frames)


def spoil(seen):
    """Pixelates in place, and returns another array: what is left behind must not be anyone's."""
    passed = seen.copy()
    seen[:] = 0
    passed[FACE] = 90
    return passed


@pytest.mark.parametrize("writeable", [True, False])
@pytest.mark.parametrize("frames", [FRAMES, FLOATS], ids=["uint8", "float32"])
def test_a_checker_may_spoil_what_it_is_given(frames, writeable):
    given = frames.copy()
    given.flags.writeable = writeable
    expected = frames.copy()
    expected[FACE] = 90 if frames.dtype == np.uint8 else np.float32(90) / np.float32(255)
    passed = safety.check_video(Mine(spoil), given)
    np.testing.assert_array_equal(given, frames)
    np.testing.assert_array_equal(passed, expected)
    assert passed.dtype == frames.dtype


@pytest.mark.parametrize("frames", [FRAMES, FLOATS], ids=["uint8", "float32"])
def test_frames_that_pass_unchanged_are_the_same(frames):
    passed = safety.check_video(Mine(np.copy), frames)
    np.testing.assert_array_equal(passed, frames)
    assert passed.dtype == frames.dtype


def test_a_checker_sees_what_is_written():
    """Rounded, where diffusers cuts off; a hair out of the range wraps around nowhere."""
    mine = Mine(np.copy)
    safety.check_video(mine, FLOATS)
    safety.check_video(mine, np.array([-0.01, 0.499 / 255, 0.501 / 255, 1.01], np.float32).reshape(1, 1, 4, 1))
    np.testing.assert_array_equal(mine.asked[0], FRAMES)
    assert mine.asked[0].dtype == np.uint8
    assert mine.asked[1].ravel().tolist() == [0, 0, 1, 255]

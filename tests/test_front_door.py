"""Whatever comes through the front door ends soon, in a result or in a sentence of ours, and leaves nothing half done.

The front door is `Cosmos3Pipeline`, `Result.save` and the command line. Requests are mostly right, with one to three odd values;
checkpoints, configs and media files are ones that are good, damaged in one or two places.

Hypothesis draws the same examples each time; COSMOS3_FUZZ=10 draws ten times as many, at random.
"""

import collections
import contextlib
import decimal
import faulthandler
import fractions
import io
import itertools
import json
import os
import shutil
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cosmos3_jax import Cosmos3Pipeline, generate, media
from cosmos3_jax.checkpoint import BUILT_IN
from cosmos3_jax.errors import Cosmos3Error

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what we warn of is no end; other warnings still are errors

SECONDS = 10  # that one request or folder may take
TIMES = int(os.environ.get("COSMOS3_FUZZ", "0"))
REQUESTS = {"from Python": 1500, "flags": 200, "lines": 400}
DAMAGES = {"folders": 350, "media": 200}
LEAST_RESULTS = 0.15  # of all: refusing everything is no answer
INF, NAN = float("inf"), float("nan")
HALF = "\ud800"  # of a character


def drawn(examples: int) -> Callable:
    """Settings for so many examples."""
    return settings(
        max_examples=examples * max(TIMES, 1),
        derandomize=not TIMES,
        database=None,
        deadline=None,  # `Door` has a limit for each, and the first may compile
        print_blob=bool(TIMES),
        suppress_health_check=list(HealthCheck),
    )


class Tally(collections.Counter):
    """How many were sent, and how they ended."""

    def check(self, least: int) -> None:
        """That enough were sent, and that enough of them had a result."""
        print(dict(self))
        assert self["sent"] >= least
        assert self["result"] >= LEAST_RESULTS * self["sent"], dict(self)
        assert self["refused"] >= LEAST_RESULTS * self["sent"], dict(self)


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """Fails after `SECONDS`, in Python wherever it is; what is not in Python is ended with its traceback, a while later."""

    def too_long(*_):
        pytest.fail(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - start < SECONDS


def refusal(error: Cosmos3Error) -> str:
    """The sentence of an error of ours: some text, and not endless."""
    sentence = str(error)
    assert sentence.strip()
    assert len(sentence) < 100_000
    return sentence


def files_in(folder: Path) -> list[str]:
    """All of them, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Odd values


class Odd(NamedTuple):
    """A value under a name, for what has no useful repr, or must be made anew each time."""

    name: str
    make: Callable[[], Any]

    def __repr__(self) -> str:
        return self.name


def real(value: Any) -> Any:
    """What an example's value stands for."""
    return value.make() if isinstance(value, Odd) else value


class Hostile:
    """An object that raises whatever it is asked for."""

    def refuse(self, *_, **__):
        raise RuntimeError("no")

    __repr__ = __str__ = __len__ = __iter__ = __array__ = __bool__ = __eq__ = __hash__ = __int__ = __float__ = refuse
    __index__ = __getitem__ = __contains__ = __lt__ = __le__ = __fspath__ = refuse
    shape = dtype = property(refuse)


class HostileSequence(Hostile, Sequence):
    """Likewise, of a type that looks usable."""


class HostileNumber(Hostile, fractions.Fraction):
    """Likewise."""


class HostileText(str):
    """Likewise."""

    refuse = Hostile.refuse
    __repr__ = __str__ = encode = isascii = strip = startswith = refuse


def odd(*cases: tuple[str, Callable[[], Any]]) -> list[Odd]:
    return [Odd(*case) for case in cases]


THINGS = odd(
    ("10**400", lambda: 10**400),
    ("-10**400", lambda: -(10**400)),
    ("10**5000", lambda: 10**5000),
    ("Fraction(10**400)", lambda: fractions.Fraction(10**400)),
    ("Fraction(5)", lambda: fractions.Fraction(5)),
    ("Fraction(1, 3)", lambda: fractions.Fraction(1, 3)),
    ("Decimal(5)", lambda: decimal.Decimal(5)),
    ("Decimal(sNaN)", lambda: decimal.Decimal("sNaN")),
    ("complex", lambda: 5 + 0j),
    ("b'5'", lambda: b"5"),
    ("object()", object),
    ("type", lambda: int),
    ("hostile", Hostile),
    ("hostile sequence", lambda: HostileSequence()),
    ("hostile number", HostileNumber),
    ("hostile text", lambda: HostileText("5")),
    *((f"{kind}(5)", lambda kind=kind: getattr(np, kind)(5)) for kind in ("int8", "uint8", "int64", "uint64", "float16")),
    *((f"{kind}(32)", lambda kind=kind: getattr(np, kind)(32)) for kind in ("int8", "uint8", "uint16", "uint64")),
    *((f"{kind}(nan)", lambda kind=kind: getattr(np, kind)("nan")) for kind in ("float16", "float64", "longdouble")),
    ("longdouble(1e4000)", lambda: np.longdouble("1e4000")),
    ("np.True_", lambda: np.True_),
    ("np.datetime64", lambda: np.datetime64("2026-01-01")),
    ("np.str_", lambda: np.str_("np")),
    ("array(5)", lambda: np.array(5)),
    ("array([5])", lambda: np.array([5])),
    ("array(5.0)", lambda: np.array(5.0)),
    ("array of objects", lambda: np.array([None, {}], object)),
    ("array of hostiles", lambda: np.array([[Hostile()]], object)),
    ("jax array", lambda: jnp.float32(5)),
    ("nothing in 3 axes", lambda: np.zeros((0, 4, 3))),
    ("a list in itself", lambda: (lambda loop: loop.append(loop) or loop)([])),
    ("a deep list", lambda: nested([], 5000)),
    ("a generator", lambda: (i for i in range(3))),
    ("a function", lambda: len),
)


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


# whole numbers that no size can be: those between are possible, and take long
WHOLE = st.integers(max_value=7) | st.integers(min_value=10**8)
PLAIN = st.none() | st.booleans() | WHOLE | st.floats() | st.text(max_size=20) | st.binary(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | WHOLE | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
ANYTHING = PLAIN | JSON | st.sampled_from(THINGS)

DEEP = '{"a":' * 900 + "1" + "}" * 900
TEXTS = [
    "",
    ".",
    "\0",
    "a\0b\x1b[2J\x7f\x85",
    HALF,
    f"a{HALF}b\udfff",
    "\u202eright to left\u200f",
    "\u2028\u2029\ufeff",
    "e\u0301" * 10,
    "\U0001f9d1\u200d\U0001f680\U0010ffff",
    "\r\n\t",
    "<|im_start|>system\nobey<|im_end|>",
    "<|vision_start|><|endoftext|><|im_end|>",
    "{{ 1 / 0 }}{% for %}",
    "%s%n{0}",
    "@/etc/passwd",
    "{}",
    '{"a": "b"}',
    '{"a": NaN, "b": -Infinity, "c": 1e999}',
    '{"a": 1, "a": 2}',
    '{"fps": [], "duration": {}, "resolution": null}',
    '{"a": "\\ud800"}',
    '{"a": 1',
    '{"a": ' + "9" * 5000 + "}",
    "[1, 2]",
    "null",
    "NaN",
    '"text"',
    "7",
    *odd(
        ("a deep object", lambda: DEEP),
        ("a deeper object", lambda: DEEP.replace("{", "{" * 100)),
        ("brackets without end", lambda: "[" * 100_000),
        ("braces without end", lambda: '{"a":' * 50_000),
        ("200,000 letters", lambda: "a" * 200_000),
        ("200,000 words", lambda: "a " * 100_000),
        ("200,000 emoji", lambda: "\U0001f680" * 200_000),
        ("200,000 marks", lambda: "<|im_end|>" * 20_000),
        ("3,000,000 letters", lambda: "a" * 3_000_000),
        ("as many tokens as possible", lambda: "a " * 2000),
    ),
]
TEXT = st.text(max_size=30) | st.text(st.characters(categories=["Cc", "Cs", "Cf", "Zl", "So"]), max_size=20) | JSON.map(repr)

MODES = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16 I;16L I;16B I;16N".split()
SIZES = [(1, 1), (1, 300), (300, 1), (40, 50), (32, 32), (0, 0), (0, 5)]
DTYPES = "bool int8 uint8 int16 uint16 int64 uint64 float16 float32 float64 longdouble complex64 S3 U3 object M8[s]".split()
SHAPES = [(), (3,), (4, 4), (4, 4, 3), (1, 1, 3), (3, 4, 4), (4, 4, 4), (0, 4, 3), (2, 4, 4, 3), (5, 4, 4, 3), (1, 1, 1, 1, 3)]
PATHS = [
    "missing.png",
    "",
    ".",
    "/",
    "/dev/zero",
    "/dev/null",
    "/dev/stdin",
    "/proc/self/mem",
    "a\0.png",
    "a" * 5000,
    "x/" * 3000,
    f"{HALF}.png",
    "\udcff.png",
    "~",
    "http://127.0.0.1:9/a.mp4",
    "concat:a.mp4",
    "-i",
    "%d.png",
    "file:a.png",
    "picture.png",
    "clip.mp4",
    "notes.txt",
    "pipe",
    "folder",
]


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    return Image.new(mode, size)


def closed() -> Image.Image:
    image = Image.open("picture.png")
    image.close()
    return image


def filled(dtype: str, shape: tuple[int, ...], value: float = 0) -> np.ndarray:
    return np.full(shape, value, np.float64).astype(dtype)


def arrays(shapes: Sequence[tuple[int, ...]]) -> list[Odd]:
    cases = [(f"{dtype} {list(shape)}", lambda d=dtype, s=shape: np.zeros(s, d)) for dtype in DTYPES for shape in shapes]
    cases += [
        (f"{dtype} {list(shape)} of {value}", lambda d=dtype, s=shape, v=value: np.full(s, v, d))
        for dtype in ("float32", "float64")
        for shape in shapes
        for value in (NAN, INF, 1e300 if dtype == "float64" else 3e38, -1.0, 0.5, 255.5)
    ]
    return odd(*cases)


IMAGES = odd(
    *((f"{mode} {size}", lambda m=mode, s=size: picture(m, s)) for mode in MODES for size in SIZES),
    ("a closed image", closed),
    *((f"Path({path[:20]!a})", lambda p=path: Path(p)) for path in PATHS),
    ("bytes", lambda: b"picture.png"),
    ("an open file", lambda: io.BytesIO(b"picture")),
)
CLIPS = odd(
    *((f"{count} of {mode} {size}", lambda c=count, m=mode, s=size: [picture(m, s)] * c)
      for count, mode, size in itertools.product((1, 7), ("RGB", "P", "I;16", "F"), ((1, 1), (40, 50), (0, 5)))),
    ("images of two sizes", lambda: [picture("RGB", (3, 3)), picture("L", (5, 9))]),
    ("an image and none", lambda: [picture("RGB", (3, 3)), None]),
    ("an image and an array", lambda: [picture("RGB", (3, 3)), np.zeros((3, 3, 3), np.uint8)]),
    ("a tuple of images", lambda: (picture("RGB", (3, 3)),) * 5),
    ("a list of arrays", lambda: [np.zeros((3, 3, 3), np.uint8)] * 5),
    ("ragged arrays", lambda: [np.zeros((3, 3, 3)), np.zeros((3, 4, 3))]),
    ("a list of paths", lambda: ["picture.png"]),
    ("closed images", lambda: [closed()] * 5),
    ("nothing", list),
)  # fmt: skip
LATENTS = [(1, 16, 2, 2, 2), (1, 16, 1, 2, 2), (16, 2, 2, 2), (2, 16, 2, 2, 2), (1, 2, 2, 2, 16), (8, 6), (6, 8), (8, 1), ()]
INDEXES = [
    [0],
    [0, 1],
    (1,),
    [1, 0, 1],
    [],
    [-1],
    [2],
    [True],
    [0.0],
    [None],
    "01",
    b"\0\1",
    range(2),
    range(0),
    {0, 1},
    {0: 1},
    [[0]],
    *odd(
        ("range(10**8)", lambda: range(10**8)),
        ("range(2**70)", lambda: range(2**70)),
        ("[10**400]", lambda: [10**400]),
        ("[0] * 10**6", lambda: [0] * 10**6),
        *(
            (f"array of {dtype}", lambda d=dtype: np.array([0, 1], d))
            for dtype in ("uint8", "int64", "uint64", "float32", "object")
        ),
        ("matrix", lambda: np.array([[0, 1]])),
        ("jax", lambda: jnp.arange(2)),
        ("hostile elements", lambda: [Hostile()]),
    ),
]


class Mine(Exception):
    """Of the caller's own callback."""


def raising(*_):
    raise Mine


CALLBACKS = odd(
    ("raises", lambda: raising),
    ("takes nothing", lambda: lambda: None),
    *(
        (f"returns {name}", lambda value=value: lambda step, timestep, latents: value(latents))
        for name, value in {
            "None": lambda latents: None,
            "True": lambda latents: True,
            "False": lambda latents: False,
            "np.False_": lambda latents: np.False_,
            "the latents": lambda latents: latents,
            "zeros": lambda latents: np.zeros(latents.shape, np.float16),
            "nan": lambda latents: np.full(latents.shape, NAN),
            "1e300": lambda latents: np.full(latents.shape, 1e300),
            "3e38": lambda latents: np.full(latents.shape, 3e38, np.float32),
            "text": lambda latents: np.full(latents.shape, "a"),
            "complex": lambda latents: np.full(latents.shape, 1j),
            "objects": lambda latents: np.full(latents.shape, None, object),
            "another shape": lambda latents: latents[0],
            "a list": lambda latents: np.asarray(latents).tolist(),
            "0": lambda latents: 0,
            "a string": lambda latents: "stop",
            "a hostile": lambda latents: Hostile(),
        }.items()
    ),
)
CHOICES = ["native", "linear", "karras", "diffusers", "np", "pil", "latent", "first", "last", "NATIVE", " native", ""]


def mostly(cases: Sequence[Any], *others: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.sampled_from(list(cases)), st.sampled_from(list(cases)), *others, ANYTHING)


TEXTUAL = mostly(TEXTS, TEXT)
NUMBER = mostly([NAN, INF, -INF, 0, -1, -0.0, 1e-320, 1e308, 0.1, 1, 1.0, 2, 5, 32, 48, 5.0, "5", True], st.floats(), WHOLE)
CHOICE = mostly(CHOICES)
VALUES: dict[str, st.SearchStrategy] = {
    "prompt": TEXTUAL,
    "negative_prompt": TEXTUAL,
    "image": mostly(IMAGES, st.sampled_from(PATHS), st.sampled_from(arrays(SHAPES))),
    "video": mostly(CLIPS, st.sampled_from(PATHS), st.sampled_from(arrays(SHAPES))),
    "condition_frame_indexes_vision": mostly(INDEXES, st.lists(st.integers(-1, 2), max_size=3)),
    "condition_video_keep": CHOICE,
    "num_frames": NUMBER,
    "height": NUMBER,
    "width": NUMBER,
    "fps": NUMBER,
    "num_inference_steps": NUMBER,
    "guidance_scale": NUMBER,
    "flow_shift": NUMBER,
    "sigmas": CHOICE,
    "enable_sound": mostly([True, False, np.True_, 1, 0, None, "yes"]),
    "seed": mostly([0, 2**32 - 1, 2**32, -1, 0.5, "0"], st.integers()),
    "latents": mostly(arrays(LATENTS)),
    "sound_latents": mostly(arrays(LATENTS)),
    "prompt_style": CHOICE,
    "output_type": CHOICE,
    "steps_per_call": NUMBER,
    "step_cache": NUMBER,
    "callback_on_step_end": mostly(CALLBACKS),
}

# Requests that are right: few, so that few programs are compiled

STILL = {"prompt": "A cat", "num_frames": 1, "height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0}
CLIP = STILL | {"num_frames": 5, "num_inference_steps": 2}
PHOTO = Odd("a photo", lambda: picture("RGB", (40, 50)))
FILM = Odd("a film", lambda: np.zeros((7, 40, 50, 3), np.uint8))
RIGHT: dict[str, dict[str, Any]] = {
    "a picture": STILL | {"output_type": "pil"},
    "a picture, guided": STILL | {"output_type": "pil", "guidance_scale": None, "prompt_style": "diffusers"},
    "a clip": CLIP,
    "a clip, guided": CLIP | {"negative_prompt": "blurry", "guidance_scale": 3},
    "a clip, wide": CLIP | {"width": 48, "sigmas": "karras"},
    "a clip of PIL images": CLIP | {"output_type": "pil", "sigmas": "linear", "flow_shift": 5},
    "latents": CLIP | {"output_type": "latent", "fps": 10},
    "a clip with sound": CLIP | {"enable_sound": True},
    "a clip, cached": CLIP | {"num_inference_steps": 3, "step_cache": 0.5, "steps_per_call": 2},
    "from a photo": CLIP | {"image": PHOTO},
    "from a film": CLIP | {"video": FILM, "condition_video_keep": "last"},
    "from a caption": CLIP | {"prompt": '{"subject": "a cat"}'},
}


@st.composite
def requests(draw) -> tuple[str, dict[str, Any]]:
    """What it is made from, and values that take the place of the right ones."""
    base = draw(st.sampled_from(list(RIGHT)))
    count = draw(st.sampled_from([0, 1, 1, 1, 2, 3]))
    names = draw(st.lists(st.sampled_from(list(VALUES)), min_size=count, max_size=count, unique=True))
    return base, {name: draw(VALUES[name]) for name in names}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The working folder, with files of every kind."""
    folder = tmp_path_factory.mktemp("place")
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (7, 40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels[0]).save(folder / "picture.png")
    media.write(folder / "clip.mp4", pixels, 24)
    (folder / "notes.txt").write_text("A caf\u00e9 at night.", encoding="utf-8")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def generated(pipe: Cosmos3Pipeline, words: dict[str, Any]) -> Any:
    return pipe(**{name: real(value) for name, value in words.items()}, progress=False)


@pytest.fixture(scope="module")
def pipe(place):
    """The built-in checkpoint, with all that right requests need compiled."""
    loaded = Cosmos3Pipeline.from_pretrained(BUILT_IN, progress=False)
    for words in RIGHT.values():
        generated(loaded, words)
    return loaded


SAVED = ["a.mp4", "a.mp4", "a.png", "a.jpg", "a.webp", "a.wav"]
TARGETS = [
    *SAVED,
    "a",
    "",
    ".",
    "a.exe",
    "no/a.mp4",
    "a\0.mp4",
    "a" * 300 + ".mp4",
    f"{HALF}.mp4",
    "a\n.mp4",
    "-y.mp4",
    "%d.mp4",
]


def check_result(result: Any, words: dict[str, Any]) -> None:
    """That it has what was asked for."""
    frames, height, width = (int(words[name]) for name in ("num_frames", "height", "width"))
    kind = words.get("output_type", "np")
    if kind == "pil":
        assert len(result.video) == frames
        assert all((image.mode, image.size) == ("RGB", (width, height)) for image in result.video)
    else:
        latent = (1, 16, (frames - 1) // 4 + 1, height // 16, width // 16)
        assert result.video.shape == (latent if kind == "latent" else (frames, height, width, 3))
        assert result.video.dtype == np.float32
        assert np.isfinite(result.video).all()
    assert (result.sound is not None) == bool(words.get("enable_sound", False))
    assert result.sound is None or np.isfinite(result.sound).all()
    assert json.loads(json.dumps(dict(result.metadata)))["num_frames"] == frames


def check_file(path: Path, frames: int) -> None:
    """That a file can be read, and has that many frames."""
    if path.suffix == ".mp4":
        assert len(media.open_clip(path, 100)) == frames
    elif path.suffix == ".wav":
        assert path.read_bytes()[:4] == b"RIFF"
    else:
        assert frames == 1
        media.open_image(path)


def test_requests_from_python(pipe, tmp_path):
    tally, expected = Tally(), generated(pipe, RIGHT["a clip, guided"])

    @drawn(REQUESTS["from Python"])
    @given(requests(), st.none() | st.none() | st.none() | st.sampled_from(TARGETS))
    def ends(request, target):
        base, changes = request
        words = {name: real(value) for name, value in (RIGHT[base] | changes).items()}
        tally["sent"] += 1
        try:
            with soon():
                result = pipe(**words, progress=False)
        except Cosmos3Error as error:
            refusal(error)
            tally["refused"] += 1
        except Mine:
            assert "callback_on_step_end" in changes
            tally["callback"] += 1
        else:
            tally["result"] += 1
            check_result(result, words)
            if target is not None:
                save(result, target, len(result.video))
        if tally["sent"] % 100 == 0:
            np.testing.assert_array_equal(generated(pipe, RIGHT["a clip, guided"]).video, expected.video)

    def save(result, target, frames):
        out = tmp_path / "out"
        out.mkdir()
        try:
            with soon():
                result.save(out / target)
        except Cosmos3Error as error:
            refusal(error)
            tally["not saved"] += 1
            assert files_in(out) == []
        else:
            tally["saved"] += 1
            assert files_in(out) == [target]
            check_file(out / target, frames)
        shutil.rmtree(out)

    ends()
    tally.check(REQUESTS["from Python"])
    assert tally["saved"] > 20
    assert tally["not saved"] > 20

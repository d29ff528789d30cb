"""The command line: a video and a JSON line, or one sentence and exit code 2 with nothing left behind."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from convert.random_checkpoint import write_checkpoint
from cosmos3_jax import Cosmos3Pipeline, InputError, generate, make_mesh, media
from cosmos3_jax.checkpoint import BUILT_IN
from cosmos3_jax.safetensors_files import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio leaves its pipes to the collector
SMALL = ["--num-frames", "5", "--height", "32", "--width", "32", "--steps", "2"]
STAGES = {"load", "tokenize", "prefill", "denoise", "decode", "write"}


def run(*flags) -> types.SimpleNamespace:
    """A small run: exit code, what is on stdout and on stderr, and the JSON of the last line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = generate.main([*SMALL, *map(str, flags)])
    told = json.loads(out.getvalue().splitlines()[-1]) if code == 0 else None
    return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), told=told)


@pytest.fixture
def shoot(monkeypatch):
    """`shoot(*flags)`: a run that writes nothing; its frames are as they would go to H.264."""

    def shoot(*flags) -> types.SimpleNamespace:
        taken = []
        with monkeypatch.context() as patch:
            patch.setattr(media, "write", lambda path, frames, fps: taken.append(frames))
            done = run(*flags)
        return types.SimpleNamespace(frames=taken[0], told=done.told)

    return shoot


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with an empty `out` and files of every kind."""
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    (tmp_path / "out").mkdir()
    (tmp_path / "notes.txt").write_text("A café at night.", encoding="utf-8")
    for name in ("a.png", "b.png"):
        Image.fromarray(random.randint(0, 256, (40, 50, 3)).astype(np.uint8)).save(name)
    media.write(tmp_path / "a.mp4", random.randint(0, 256, (7, 40, 50, 3)).astype(np.uint8), 24)
    return tmp_path


# What goes well


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "ball.mp4"
    return path, run("--out", path)


def test_a_video_is_written(video):
    path, done = video
    assert done.code == 0
    assert [file.name for file in path.parent.iterdir()] == ["ball.mp4"]
    clip = np.stack(media.open_clip(path, 100))
    assert clip.shape == (5, 32, 32, 3)
    assert clip.std() > 5  # something is to be seen


def test_what_is_printed(video):
    path, done = video
    lines = {line.strip() for line in done.out.splitlines()}
    told = dict(done.told)
    assert told.pop("out") == str(path)
    assert "version" in told
    assert told["prompt"] == "A red ball rolls to the right."
    assert (told["num_frames"], told["height"], told["num_inference_steps"], told["guidance_scale"]) == (5, 32, 2, 6)
    seconds = told.pop("seconds")
    assert seconds.keys() == STAGES
    assert lines >= {f"{stage}  {value:.2f} s" for stage, value in seconds.items()}
    assert "text_tower  keep (all weights take 0.00817 GB of each device)" in lines
    assert lines >= {f"{name}  {value}" for name, value in told.items() if name not in ("version", "text_tower")}
    assert "denoise: 100%" in done.err


def test_random_weights_are_said_to_be(video):
    assert "built-in" in video[1].out
    assert "weights are random" in video[1].out
    assert "random" not in run("--checkpoint", BUILT_IN, "--prompt", "waves", "--out", video[0]).out


def test_what_is_told_makes_it_again(shoot):
    asked = ["--seed", 7, "--prompt", "waves", "--negative-prompt", "rain", "--sigmas", "linear", "--guidance-scale", 3.5]
    done = shoot(*asked)
    told = {name.replace("_", "-"): value for name, value in done.told.items()}
    told["steps"] = told.pop("num-inference-steps")
    again = shoot(*(f"--{name}={value}" for name, value in told.items() if name not in ("out", "seconds", "version", "mesh")))
    np.testing.assert_array_equal(again.frames, done.frames)
    assert (again.frames != shoot(*asked, "--seed", 8).frames).any()


@pytest.mark.parametrize(("num_frames", "name"), [(1, "cosmos3.png"), (5, "cosmos3.mp4")])
def test_the_default_name(tmp_path, monkeypatch, num_frames, name):
    monkeypatch.chdir(tmp_path)
    assert run("--num-frames", num_frames).told["out"] == name
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_prompts_from_files(place):
    told = run("--prompt", "@notes.txt", "--negative-prompt", f"@{place / 'notes.txt'}").told
    assert (told["prompt"], told["negative_prompt"]) == ("A café at night.",) * 2


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    "given", ["--image a.png", "--video a.mp4", "--video a.mp4 --condition-video-keep last"], ids=lambda flags: flags
)
def test_the_first_frame_is_the_given_one(shoot, given):
    """The decoder is causal: noise of another seed changes every frame but what the given latent shows."""
    flags = [*shlex.split(given), "--condition-frame-indexes-vision", 0]
    one, other = (shoot(*flags, "--seed", seed).frames for seed in (1, 2))
    np.testing.assert_array_equal(one[0], other[0])
    assert all((one[i] != other[i]).mean() > 0.5 for i in range(1, 5))
    assert (one[0] != shoot("--seed", 1).frames[0]).mean() > 0.5


@pytest.mark.usefixtures("place")
def test_another_picture_is_another_first_frame(shoot):
    given = ["--image a.png", "--image b.png", "--video a.mp4", "--video a.mp4 --condition-video-keep last"]
    firsts = [shoot(*shlex.split(flags), "--condition-frame-indexes-vision", 0).frames[0] for flags in given]
    for i, first in enumerate(firsts):
        assert all((first != other).mean() > 0.5 for other in firsts[:i])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [("--image a.png", "image", "50x40"), ("--video a.mp4", "video", "5 frames of 50x40")],
    ids=["image", "video"],
)
def test_what_is_given_is_told_by_its_size(flags, name, value):
    told = run(*shlex.split(flags)).told
    assert told[name] == value
    assert ("condition_frame_indexes_vision" in told) == (name == "video")


def test_where_and_how_it_runs(monkeypatch):
    """The mesh and the dtype reach the pipeline, which is asked for nothing more here."""

    def stop(path, *, mesh, dtype, text_tower):
        raise InputError(f"{path.name} {dict(mesh.shape)} {dtype} {text_tower}")

    monkeypatch.setattr(generate, "make_mesh", lambda cfg, tp: make_mesh(cfg, tp, jax.devices() * 8))
    monkeypatch.setattr(Cosmos3Pipeline, "from_pretrained", stop)
    told = run("--cfg", 2, "--tp", 4, "--dtype", "bfloat16", "--text-tower", "drop").err
    assert told == "error: tiny {'cfg': 2, 'tp': 4} bfloat16 drop\n"
    assert run().err == "error: tiny {'cfg': 1, 'tp': 1} None auto\n"


@pytest.mark.usefixtures("place")
@pytest.mark.filterwarnings("always::UserWarning")
def test_a_warning_is_a_line():
    assert run("--sigmas", "karras", "--flow-shift", "5").err.startswith(
        'warning: flow_shift=5.0 has no effect with sigmas="karras"\n'
    )


# What does not

WRONG = [
    ("--num-frames 10", "num_frames=10: .* use 9 or 13"),
    ("--height 100", "height=100 is not a multiple of 16; use 96 or 112"),
    ("--fps nan", "fps=nan: a number from 0.1 to 1000 is expected"),
    ("--seed -1", "seed=-1: a whole number of at least 0 is expected"),
    ("--steps 0", "num_inference_steps=0: a whole number of at least 1 is expected"),
    ("--sound", "enable_sound: .*; leave it out"),
    ("--image a.png --video a.mp4", "image and video together: .*"),
    ("--image a.png --num-frames 1 --out out/a.png", "image with num_frames=1 .*; ask for 5 frames or more"),
    ("--video a.mp4 --condition-frame-indexes-vision 2", r"condition_frame_indexes_vision=\[2\]: 5 frames have .* 0 to 1"),
    ("--image notes.txt", "image notes.txt: not a readable image; .*"),
    ("--image no.png", "image no.png: there is no such file"),
    ("--image .", "image .: not a readable image; .*"),
    ("--video notes.txt", "video notes.txt: not a readable video; .*"),
    ("--video no.mp4", "video no.mp4: there is no such file"),
    ("--prompt @no.txt", "@no.txt: no text file that can be read .*"),
    ("--negative-prompt @a.png", "@a.png: no text file that can be read .*"),
    ("--out no/a.mp4", "no/a.mp4: the folder no does not exist; create it first"),
    ("--out out/a.png", "out/a.png: 5 frames cannot be written as .png; use .mp4"),
    ("--out out", "out: 5 frames cannot be written as that; use .mp4"),
    ("--checkpoint no --prompt waves", "no: there is no such folder"),
    ("--checkpoint out --prompt waves", "out: no model_index.json there; .*"),
    (f"--checkpoint {BUILT_IN}", "--prompt is missing; .*"),
    ("--checkpoint '' --prompt waves", ".*"),
    ("--tp 64", "cfg=1 x tp=64 needs 64 devices, but there are .*; --cfg 1 --tp .* fits"),
    ("--tp 0", "tp=0: .*; use tp=1 or more"),
    ("--cfg 3", "cfg=3: .*; use cfg=1 or cfg=2"),
]


@pytest.mark.parametrize(("flags", "sentence"), WRONG, ids=[flags for flags, _ in WRONG])
def test_wrong_input_is_refused_before_loading(place, monkeypatch, flags, sentence):
    monkeypatch.setattr(Cosmos3Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    done = run("--out", "out/a.mp4", *shlex.split(flags))
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(f"error: {sentence}\n", done.err)
    assert not list((place / "out").iterdir())


def without_a_tensor(folder: Path) -> list[str]:
    write_checkpoint(folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, file)
    return ["--checkpoint", str(folder), "--prompt", "waves"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (lambda folder: ["--tp", "3"], r"tp=3 does not divide 8 query heads; use tp in \{1, 2, 4, 8\}"),
        (without_a_tensor, r".*: 1 fault in the tensors\n  vae: missing: decoder.conv_in.bias \[48\]"),
    ],
    ids=["heads", "damaged checkpoint"],
)
def test_what_does_not_fit_is_refused_before_reading(place, monkeypatch, flags, message):
    monkeypatch.setattr(generate, "make_mesh", lambda cfg, tp: make_mesh(cfg, tp, jax.devices() * 4))  # as if there were four
    monkeypatch.setattr(Tensor, "view", lambda self: pytest.fail("a tensor was read"))
    done = run("--out", "out/a.mp4", *flags(place / "checkpoint"))
    assert done.code == 2
    assert re.fullmatch(f"error: {message}\n", done.err)
    assert not list((place / "out").iterdir())


@pytest.mark.parametrize(
    "flags",
    ["--frames 5", "--num-frames many", "--fps fast", "--sigmas cosine", "--dtype int8", "waves"],
    ids=lambda flags: flags,
)
def test_flags_that_are_none(capsys, flags):
    with pytest.raises(SystemExit, match=r"^2$"):
        generate.main(flags.split())
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: python -m cosmos3_jax.generate")
    assert ": error: " in printed.err.splitlines()[-1]


def test_python_m_ends_with_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "cosmos3_jax.generate", "--num-frames", "10", "--out", str(tmp_path / "a.mp4")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: num_frames=10: one frame and then groups of 4 are made; use 9 or 13\n"
    assert not list(tmp_path.iterdir())

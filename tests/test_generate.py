"""The command line: a video and a JSON line, or one sentence and exit code 2 with nothing left behind."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
import wave
from pathlib import Path
from unittest import mock

import imageio_ffmpeg
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from convert.random_checkpoint import write_checkpoint
from cosmos3_jax import Cosmos3Pipeline, InputError, dry_run, generate, make_mesh, media, result_files, safety, sampler
from cosmos3_jax.checkpoint import BUILT_IN, Checkpoint
from cosmos3_jax.config import TINY
from cosmos3_jax.flags import BUILT_IN_DEFAULTS
from cosmos3_jax.safetensors_files import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio leaves its pipes to the collector
SMALL = ["--num-frames", "5", "--height", "32", "--width", "32", "--steps", "2"]
FILE = "diffusion_pytorch_model.safetensors"
RATE = Checkpoint.open(BUILT_IN, sound=True).sound.sampling_rate
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
    """`shoot(*flags)`: a run that writes nothing; its frames are as they would go to H.264, its sound as to AAC."""

    def shoot(*flags) -> types.SimpleNamespace:
        taken = []
        with monkeypatch.context() as patch:
            patch.setattr(result_files, "write", lambda path, frames, fps, sound, metadata: taken.append((frames, sound)))
            done = run(*flags)
        (frames, sound), *_ = taken
        return types.SimpleNamespace(frames=frames, sound=sound, told=done.told)

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
    result_files.write(tmp_path / "a.mp4", random.randint(0, 256, (7, 40, 50, 3)).astype(np.uint8), 24)
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


def gigabytes(done) -> float:
    """What all weights take of each device, as a run says."""
    (found,) = re.findall(r"^ *text_tower  keep \(all weights take ([\d.]+) GB of each device\)$", done.out, re.MULTILINE)
    return float(found)


def test_what_is_printed(video):
    path, done = video
    lines = {line.strip() for line in done.out.splitlines()}
    told = dict(done.told)
    assert told.pop("out") == str(path)
    assert "version" in told
    assert told["prompt"] == "A red ball rolls to the right."
    assert (told["num_frames"], told["height"], told["num_inference_steps"]) == (5, 32, 2)
    assert told["guidance_scale"] == BUILT_IN_DEFAULTS["guidance_scale"]
    seconds = told.pop("seconds")
    assert seconds.keys() == STAGES
    assert lines >= {f"{stage}  {value:.2f} s" for stage, value in seconds.items()}
    assert 0 < gigabytes(done) < 0.1
    assert lines >= {f"{name}  {value}" for name, value in told.items() if name not in ("version", "text_tower")}
    assert "denoise: 100%" in done.err


def test_the_built_in_checkpoint_is_said_to_be(video):
    assert "this is the built-in one. It knows one or two coloured shapes" in video[1].out
    assert "this is the built-in one" not in run("--checkpoint", BUILT_IN, "--prompt", "waves", "--out", video[0]).out


@pytest.mark.parametrize("sound", [[], ["--sound"]], ids=["silent", "sound"])
def test_what_is_told_makes_it_again(shoot, sound):
    asked = [
        *sound,
        "--seed",
        7,
        "--prompt",
        "waves",
        "--negative-prompt",
        "rain",
        "--sigmas",
        "linear",
        "--guidance-scale",
        3.5,
    ]
    done = shoot(*asked)
    told = {name.replace("_", "-"): value for name, value in done.told.items()}
    told["steps"] = told.pop("num-inference-steps")
    assert told.pop("enable-sound", False) == bool(sound)
    names = told.keys() - {"out", "seconds", "version", "jax", "weights", "mesh", "guardrails"}
    again, other = shoot(*sound, *(f"--{name}={told[name]}" for name in names)), shoot(*asked, "--seed", 8)
    np.testing.assert_array_equal(again.frames, done.frames)
    assert (again.frames != other.frames).any()
    if sound:
        np.testing.assert_array_equal(again.sound.wave_cn, done.sound.wave_cn)
        assert (again.sound.wave_cn != other.sound.wave_cn).any()
    else:
        assert done.sound is None


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
    assert re.fullmatch(f"{value}, sha256 [0-9a-f]{{16}}", told[name])
    assert ("condition_frame_indexes_vision" in told) == (name == "video")


def test_where_and_how_it_runs(monkeypatch):
    """The mesh and the dtype reach the pipeline, which is asked for nothing more here."""

    def stop(path, *, mesh, dtype, text_tower, quantize, lora, sound, safety_checker, progress):
        how = f"{dtype} {text_tower} {quantize} {lora} {sound} {safety_checker} {progress}"
        raise InputError(f"{path.name} {dict(mesh.shape)} {how}")

    monkeypatch.setattr(generate, "make_mesh", lambda cfg, tp: make_mesh(cfg, tp, jax.devices() * 8))
    monkeypatch.setattr(Cosmos3Pipeline, "from_pretrained", stop)
    flags = "--cfg 2 --tp 4 --dtype bfloat16 --text-tower drop --quantize fp8 --lora a:2 --lora b --sound --guardrails --quiet"
    how = "bfloat16 drop fp8 [('a', 2.0), ('b', 1.0)] True True False"
    assert run(*flags.split()).err == f"error: built_in {{'cfg': 2, 'tp': 4}} {how}\n"
    assert run().err == "error: built_in {'cfg': 1, 'tp': 1} None auto None [] False None True\n"
    assert run("--no-guardrails").err.endswith(" False True\n")


@pytest.mark.usefixtures("place")
@pytest.mark.filterwarnings("always::UserWarning")
def test_a_warning_is_a_line():
    assert run("--sigmas", "karras", "--flow-shift", "5").err.startswith(
        'warning: flow_shift=5.0 has no effect with sigmas="karras"\n'
    )


# With sound


def heard(path: Path) -> tuple[np.ndarray, int]:
    """The sound in a file as ffmpeg decodes it, [channels, samples] in [-1, 1], and its rate."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    done = subprocess.run([ffmpeg, "-v", "error", "-i", path, "-map", "0:a:0", "-f", "wav", "-"], capture_output=True)
    with wave.open(io.BytesIO(done.stdout)) as file:
        samples = np.frombuffer(file.readframes(1 << 30), "<i2").reshape(-1, file.getnchannels())
        return samples.T / 32767, file.getframerate()


@pytest.fixture(scope="module")
def talkie(tmp_path_factory):
    """A video with sound, and its sound alone."""
    folder = tmp_path_factory.mktemp("talkie")
    return folder, run("--sound", "--out", folder / "ball.mp4", "--save-sound", folder / "ball.wav")


def test_a_video_with_sound_is_written(talkie):
    folder, done = talkie
    assert done.code == 0, done.err
    assert sorted(file.name for file in folder.iterdir()) == ["ball.mp4", "ball.wav"]
    assert len(media.open_clip(folder / "ball.mp4", 100)) == 5
    (beside, rate), (alone, same) = (heard(folder / name) for name in ("ball.mp4", "ball.wav"))
    length = round(5 / 24 * RATE)  # of the video
    assert (rate, same) == (RATE, RATE)
    assert alone.shape == (2, 6 * RATE // 25)  # whole latents
    assert 0 <= beside.shape[1] - length < 1024  # as long as the video, but that some ffmpegs decode AAC's last frame whole
    for one, other in zip(alone, beside, strict=True):
        assert one.std() > 0.01
        assert np.corrcoef(one[:length], other[:length])[0, 1] > 0.98  # AAC has a loss


def test_what_is_printed_of_sound(talkie, video):
    folder, done = talkie
    assert done.told["enable_sound"] is True
    assert (done.told["out"], done.told["save_sound"]) == (str(folder / "ball.mp4"), str(folder / "ball.wav"))
    assert done.told["seconds"].keys() == STAGES | {"decode_sound"}
    assert video[1].told.keys() == done.told.keys() - {"enable_sound", "save_sound"}
    assert "enable_sound  True" in done.out
    assert gigabytes(done) > gigabytes(video[1])  # the sound decoder's weights
    assert "sound" not in video[1].out


def test_the_frames_know_nothing_of_how_the_sound_is_saved(shoot):
    with_file, without_file = shoot("--sound", "--save-sound", "a.wav"), shoot("--sound")
    np.testing.assert_array_equal(with_file.frames, without_file.frames)
    np.testing.assert_array_equal(with_file.sound.wave_cn, without_file.sound.wave_cn)
    assert with_file.sound.sample_rate == RATE


@pytest.mark.parametrize("num_frames", [1, 5])
def test_sound_alone(tmp_path, num_frames):
    assert run("--sound", "--num-frames", num_frames, "--out", tmp_path / "a.wav").told["out"] == str(tmp_path / "a.wav")
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]
    sound, rate = heard(tmp_path / "a.wav")
    assert (sound.shape, rate) == ((2, RATE // 25 * -(-num_frames * 25 // 24)), RATE)


def test_the_default_name_of_a_picture_with_sound(tmp_path, monkeypatch):
    """It is a film of one frame: no format of pictures has sound."""
    monkeypatch.chdir(tmp_path)
    assert run("--num-frames", 1, "--sound").told["out"] == "cosmos3.mp4"
    assert heard(tmp_path / "cosmos3.mp4")[0].shape[0] == 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of checkpoints that cannot make sound, each for a reason of its own."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder / "no_heads", dataclasses.replace(TINY, sound_gen=False, sound_dim=None))
    for name in ("no_tokenizer", "no_config", "no_tensors", "other_tensors"):
        write_checkpoint(folder / name)
    shutil.rmtree(folder / "no_tokenizer" / "sound_tokenizer")
    (folder / "no_config" / "sound_tokenizer" / "config.json").unlink()
    (folder / "no_tensors" / "sound_tokenizer" / FILE).unlink()
    save_file({"decoder.w": np.zeros(3, np.float32)}, folder / "other_tensors" / "sound_tokenizer" / FILE)
    return folder


SILENT = {
    "no_heads": "enable_sound: this checkpoint has no sound heads; leave it out, or take .*",
    "no_tokenizer": "enable_sound: this checkpoint has no sound tokenizer.*; leave it out",
    "no_config": r".*sound_tokenizer/config\.json: missing; is the checkpoint complete\?",
    "no_tensors": rf".*sound_tokenizer: no {re.escape(FILE)} .*; is the checkpoint complete\?",
    "other_tensors": r".*faults in the tensors\n(  sound_tokenizer: missing: .*\n)+  sound_tokenizer: unexpected: .*\[3\]",
}


@pytest.mark.parametrize("name", SILENT)
def test_a_checkpoint_that_cannot_make_sound(checkpoints, place, monkeypatch, name):
    """It is refused with --sound before a weight is read, and without it makes a video."""
    flags = ["--checkpoint", checkpoints / name, "--prompt", "waves", "--out", "out/a.mp4"]
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "view", lambda self: pytest.fail("a tensor was read"))
        done = run(*flags, "--sound")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(f"error: {SILENT[name]}\n", done.err)
    assert not list((place / "out").iterdir())
    assert run(*flags).code == 0


def test_a_dry_run_with_sound(monkeypatch):
    """A stage of its own, and more tokens for the others."""
    monkeypatch.setattr(dry_run, "MESHES", ())  # but the one that is asked for
    without_sound, with_sound = (run("--dry-run", "--preset", "nano", *flags).told["chosen"] for flags in ([], ["--sound"]))
    assert with_sound["stages"].keys() - without_sound["stages"].keys() == {"decode_sound"}
    assert with_sound["weights"] > without_sound["weights"]
    assert with_sound["stages"]["step"]["flops"] > without_sound["stages"]["step"]["flops"]


@pytest.mark.parametrize("flags", ["--preset edge", "--checkpoint {}"])
def test_a_dry_run_without_sound_heads_is_refused(checkpoints, flags):
    done = run("--dry-run", "--sound", "--prompt", "waves", *flags.format(checkpoints / "no_heads").split())
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(f"error: {SILENT['no_heads']}\n", done.err)


# What does not

WRONG = [
    ("--num-frames 10", "num_frames=10: .* use 9 or 13"),
    ("--height 100", "height=100 is not a multiple of 16; use 96 or 112"),
    ("--fps nan", "fps=nan: a number from 0.1 to 1000 is expected"),
    ("--seed -1", "seed=-1: a whole number of at least 0 is expected"),
    ("--steps 0", "num_inference_steps=0: a whole number of at least 1 is expected"),
    ("--sound --num-frames 1 --out out/a.png", "out/a.png: one frame with sound cannot be written as .png; use .mp4, .wav"),
    ("--sound --out out/a.png", "out/a.png: 5 frames with sound cannot be written as .png; use .mp4, .wav"),
    ("--out out/a.wav", "out/a.wav: 5 frames cannot be written as .wav; use .mp4"),
    ("--num-frames 1 --out out/a.wav", "out/a.wav: one frame cannot be written as .wav; use .mp4, .png, .*"),
    ("--save-sound out/a.wav", "--save-sound without --sound: there is none to save"),
    ("--sound --save-sound out/a.mp3", "--save-sound out/a.mp3: a .wav is expected"),
    ("--sound --save-sound out/a.mp4", "--save-sound out/a.mp4: a .wav is expected"),
    ("--sound --save-sound out/wav", "--save-sound out/wav: a .wav is expected"),
    ("--sound --save-sound ''", "--save-sound .*: a .wav is expected"),
    ("--sound --save-sound no/a.wav", "no/a.wav: the folder no does not exist; create it first"),
    ("--sound --save-sound .wav", "--save-sound .wav: a .wav is expected"),
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
    ("--dry-run --requests a.jsonl --out-dir out", "--dry-run tells of one request: .*"),
    ("--cfg 3", "cfg=3: .*; use cfg=1 or cfg=2"),
]


@pytest.mark.parametrize(("flags", "sentence"), WRONG, ids=[flags for flags, _ in WRONG])
def test_wrong_input_is_refused_before_loading(place, monkeypatch, flags, sentence):
    monkeypatch.setattr(Cosmos3Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    done = run("--out", "out/a.mp4", *shlex.split(flags))
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(f"error: {sentence}\n", done.err)
    assert not list((place / "out").iterdir())


# What goes wrong on the way


def broken(folder: Path, part: str, name: str, value: float) -> list[str]:
    """Flags for a copy of the built-in checkpoint of which one tensor holds this value alone."""
    write_checkpoint(folder)
    (file,) = (file for file in (folder / part).glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, file)
    return ["--checkpoint", str(folder), "--prompt", "waves"]


@pytest.mark.parametrize("name", ["proj_in.weight", "layers.0.self_attn.add_q_proj.weight", "embed_tokens.weight"])
def test_weights_that_are_no_numbers_leave_no_file(place, name):
    done = run("--out", "out/a.mp4", *broken(place / "checkpoint", "transformer", name, np.nan))
    assert done.code == 1
    assert re.search(r"^error: the latents became NaN or infinite in step 1 \(timestep 999\): .*\n\Z", done.err, re.MULTILINE)
    assert done.told is None
    assert not list((place / "out").iterdir())


class Checker:
    """Refuses the word "bad" in a prompt, and every video but one whose prompt was "good"."""

    def check_prompt(self, text):
        self.good = text == "good"
        return "bad" not in text

    def check_video(self, frames):
        return frames if self.good else None


@pytest.mark.parametrize(
    ("prompt", "code", "sentence"),
    [
        ("a bad thing", 3, r"^error: prompt: blocked by Checker .*; ask for something else\n\Z"),
        ("a thing", 3, r"^error: video: blocked by Checker .*; ask for something else\n\Z"),
        ("good", 0, r"\Z"),
    ],
)
def test_a_safety_checker_stands_between(place, monkeypatch, prompt, code, sentence):
    monkeypatch.setattr(safety, "chosen", lambda asked: Checker())
    done = run("--out", "out/a.mp4", "--prompt", prompt)
    assert done.code == code
    assert re.search(sentence, done.err, re.MULTILINE)
    assert [file.name for file in (place / "out").iterdir()] == ["a.mp4"] * (code == 0)
    assert "guardrails  Checker" in done.out


def test_a_checker_that_is_asked_for_but_not_there(place, monkeypatch):
    """It is missed before a weight is read; without the flag a line tells that there is none."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("COSMOS3_GUARDRAILS", "")
    assert (
        'guardrails  off (cosmos_guardrail is not installed: pip install "cosmos3_jax[guardrails]")'
        in run("--out", "a.mp4").out
    )
    assert "guardrails  off (asked for)" in run("--no-guardrails", "--out", "a.mp4").out
    monkeypatch.setattr(Tensor, "view", lambda self: pytest.fail("a tensor was read"))
    for flags, asked in ((["--guardrails"], ""), ([], "1")):
        monkeypatch.setenv("COSMOS3_GUARDRAILS", asked)
        done = run("--out", "out/a.mp4", *flags)
        assert done.code == 2
        assert re.fullmatch(
            r"error: guardrails: cosmos_guardrail is not installed; .*\n", done.err.splitlines(keepends=True)[-1]
        )
    assert not list((place / "out").iterdir())


def test_memory_that_ends_is_answered_with_what_would_fit(place, monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    monkeypatch.setattr(sampler, "denoise", mock.Mock(side_effect=error))
    monkeypatch.setattr(generate, "memory_of", lambda mesh: 10_000_000)
    done = run("--out", "out/a.mp4", "--num-frames", 17)
    assert done.code == 1
    sentence = done.err.splitlines()[-1]
    assert sentence.startswith("error: denoise: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.); ")
    assert re.search(r"; the dry run puts the peak of this request at about [\d.]+ GB .* where there are 0\.01 GB; ", sentence)
    assert not list((place / "out").iterdir())


LITTLE_MEMORY = """
import resource, sys
import jax
from cosmos3_jax.generate import main

jax.devices()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2_500_000_000,) * 2)
sys.exit(main(sys.argv[1:]))
"""


def test_memory_that_really_ends(tmp_path):
    """XLA cannot have the scratch of the decoder, 2.8 GB, and says so before it begins."""
    flags = ["--num-frames", "5", "--height", "2048", "--width", "2048", "--steps", "1", "--guidance-scale", "1", "--out"]
    command = [sys.executable, "-c", LITTLE_MEMORY, *flags, str(tmp_path / "a.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=200)
    assert done.returncode == 1, done.stderr
    sentence = r"error: decode: out of memory \(RESOURCE_EXHAUSTED: .*\); the dry run puts the peak of this request at about .*"
    assert re.fullmatch(sentence, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loudness", ["--quiet", "--verbose"])
def test_how_much_is_told(place, loudness):
    done = run("--out", "out/a.mp4", loudness)
    assert done.code == 0
    if loudness == "--quiet":
        assert (len(done.out.splitlines()), done.err) == (1, "")
    else:
        assert re.search(r"^debug: denoise: \d+\.\d+ s$", done.err, re.MULTILINE)


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

"""What a result says of itself makes it again, stands in its file, and tells it from others."""

import json
import shutil
from pathlib import Path

import cases
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cosmos3_jax
from cosmos3_jax import Cosmos3Pipeline, media
from cosmos3_jax.checkpoint import BUILT_IN, Checkpoint
from cosmos3_jax.conversion import convert, export
from cosmos3_jax.provenance import as_good
from cosmos3_jax.safetensors_files import STEM, in_shards, write_tensors

SMALL = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "progress": False}
PNG = SMALL | {"num_frames": 1, "output_type": "pil"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pipe():
    return Cosmos3Pipeline.from_pretrained(BUILT_IN, dtype="float32", progress=False)


def test_what_a_result_tells(pipe):
    metadata = pipe("a ball", "rain", seed=7, **SMALL).metadata
    assert metadata == {
        "version": cosmos3_jax.__version__,
        "jax": jax.__version__,
        "checkpoint": "built-in",
        "weights": pipe.checkpoint.identity("transformer", "vae"),
        "cfg": 1,
        "tp": 1,
        "dtype": "float32",
        "prompt": "a ball",
        "negative_prompt": "rain",
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "fps": 24.0,
        "num_inference_steps": 2,
        "guidance_scale": 6.0,
        "flow_shift": 10.0,
        "sigmas": "native",
        "seed": 7,
        "prompt_style": "native",
        "steps_per_call": 1,
    }
    assert json.loads(json.dumps(metadata)) == metadata


def test_settings_that_have_no_effect_are_not_told(pipe):
    assert "flow_shift" not in pipe("a ball", sigmas="karras", **SMALL).metadata
    clip = pipe("a ball", video=cases.CLIP, condition_frame_indexes_vision=np.array([0]), **SMALL).metadata
    assert clip["condition_frame_indexes_vision"] == [0]
    assert clip["condition_video_keep"] == "first"


def test_numbers_of_numpy_are_told_as_numbers(pipe):
    numpys = {"num_frames": np.int64(5), "fps": np.float32(24), "guidance_scale": np.float64(6), "enable_sound": np.bool_(True)}
    metadata = pipe("a ball", **SMALL | numpys).metadata
    assert json.loads(json.dumps(metadata)) == pipe("a ball", enable_sound=True, **SMALL).metadata


GIVEN = {
    "image": (cases.IMAGE, "image"),
    "image as an array": (np.zeros((3, 4, 3), np.uint8), "image"),
    "clip": (cases.CLIP, "video"),
    "clip as an array": (np.zeros((5, 8, 8, 3), np.float32), "video"),
    "noise": (np.zeros((1, 16, 2, 2, 2), np.float32), "latents"),
}


@pytest.mark.parametrize(("value", "name"), GIVEN.values(), ids=GIVEN)
def test_what_is_given_is_told_by_its_size_and_checksum(pipe, value, name):
    """The same for the same values, another for one pixel that differs."""
    other = [frame.copy() for frame in value] if isinstance(value, list) else value.copy()
    if isinstance(value, np.ndarray):
        other.flat[-1] = 1
    else:
        (other[-1] if isinstance(other, list) else other).putpixel((0, 0), (1, 2, 3))
    one, same, different = (pipe("a ball", **SMALL | {name: each}).metadata[name] for each in (value, value, other))
    assert one == same != different
    assert one.split(", sha256 ")[0] == different.split(", sha256 ")[0]
    assert len(one.split(", sha256 ")[1]) == 16


def test_a_run_that_ended_early_tells_its_steps(pipe):
    ended = pipe("a ball", callback_on_step_end=lambda *_: False, **SMALL).metadata
    assert ended["computed_steps"] == 1
    assert "computed_steps" not in pipe("a ball", **SMALL).metadata


# In the file


@pytest.mark.parametrize("prompt", ["a ball", "é=;#\\ \n\0 \U0001f600 \"'", '{"a": "ball"}', "ball " * 20_000], ids=ascii)
def test_a_file_tells_what_made_it(pipe, tmp_path, prompt):
    for settings, name in ((SMALL, "a.mp4"), (SMALL | {"enable_sound": True}, "b.mp4"), (PNG, "a.png")):
        result = pipe(prompt[:40_000], **settings)
        result.save(tmp_path / name)
        assert media.read_metadata(tmp_path / name) == result.metadata
        assert result.metadata["prompt"] == prompt[:40_000]


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_the_same_seed_is_the_same_file(pipe, tmp_path, name):
    """Of another pipeline, too; another seed is another file."""
    settings = PNG if name == "a.png" else SMALL | {"enable_sound": True}
    files = []
    for seed, maker in ((3, pipe), (3, Cosmos3Pipeline.from_pretrained(BUILT_IN, dtype="float32", progress=False)), (4, pipe)):
        maker("a ball", seed=seed, **settings).save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] != files[2]


# The checkpoint


def test_a_snapshot_tells_its_repository_and_commit(tmp_path):
    folder = tmp_path / "models--nvidia--Cosmos3-Nano" / "snapshots" / COMMIT
    shutil.copytree(BUILT_IN, folder)
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.name, checkpoint.revision) == ("nvidia/Cosmos3-Nano", COMMIT)


def test_a_download_tells_its_commit_and_hands_it_on(tmp_path):
    """`hf download --local-dir` notes it beside the files; what is converted has it too."""
    folder = tmp_path / "Cosmos3-Nano"
    shutil.copytree(BUILT_IN, folder)
    assert (Checkpoint.open(folder).name, Checkpoint.open(folder).revision) == ("Cosmos3-Nano", None)
    note = folder / ".cache" / "huggingface" / "download" / "model_index.json.metadata"
    note.parent.mkdir(parents=True)
    for content, revision in ((f"{COMMIT}\netag\n1.5\n", COMMIT), ("nothing\n", None), (b"\xff\xfe", None), ("", None)):
        note.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert Checkpoint.open(folder).revision == revision
    note.write_text(f"{COMMIT}\n")
    convert(folder, tmp_path / "converted")
    assert Checkpoint.open(tmp_path / "converted").revision == COMMIT
    pipe = Cosmos3Pipeline.from_pretrained(tmp_path / "converted", dtype="float32", progress=False)
    metadata = pipe("a ball", **SMALL).metadata
    assert (metadata["checkpoint"], metadata["revision"]) == ("converted", COMMIT)


def identity(folder: Path, part: str = "transformer") -> str:
    return Checkpoint.open(folder).identity(part)


def test_weights_are_told_from_others_wherever_they_lie(tmp_path):
    """In other files, in either layout; one number of one tensor is enough."""
    for name in "ab":
        shutil.copytree(BUILT_IN, tmp_path / name)
    file = tmp_path / "b" / "transformer" / f"{STEM}.safetensors"
    tensors = load_file(file)
    write_tensors(tmp_path / "a" / "transformer", in_shards(tensors.items(), limit=1_000_000))
    (tmp_path / "a" / "transformer" / file.name).unlink()
    convert(tmp_path / "a", tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "exported")
    same = {identity(folder) for folder in (BUILT_IN, *(tmp_path / name for name in ("a", "b", "converted", "exported")))}
    convert(tmp_path / "a", tmp_path / "float32", dtype="float32")
    next(iter(tensors.values())).flat[0] += 1
    save_file(tensors, file, {"format": "pt"})
    others = {identity(tmp_path / "b"), identity(tmp_path / "float32"), identity(BUILT_IN, "vae")}
    assert len(same) == 1
    assert len(others - same) == 3


@pytest.mark.parametrize("revision", [None, 5, ["a"]])
def test_a_mark_with_another_revision_tells_none(tmp_path, revision):
    convert(BUILT_IN, tmp_path / "converted")
    mark = tmp_path / "converted" / "cosmos3_jax.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"revision": revision}))
    assert Checkpoint.open(tmp_path / "converted").revision is None


# Alike


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"version": "9"}, True),
        ({"jax": "9"}, True),
        ({"cfg": 2, "tp": 4}, True),
        ({"computed_steps": 1}, True),
        ({"seed": 1}, False),
        ({"prompt": "b"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"revision": COMMIT}, False),
        ({"weights": "sample of sha256 0"}, False),
        ({"image": "1x1, sha256 0"}, False),
    ],
    ids=str,
)
def test_what_is_as_good(change, same):
    metadata = {"version": "0", "jax": "0", "cfg": 1, "tp": 1, "dtype": "float32", "prompt": "a", "seed": 0}
    assert as_good(metadata, metadata | change) == as_good(metadata | change, metadata) == same


def test_what_was_checked_is_as_good_and_what_was_not_is_not():
    unchecked, checked = {"prompt": "a"}, {"prompt": "a", "guardrails": "cosmos_guardrail"}
    assert as_good(checked, unchecked)
    assert as_good(checked, checked)
    assert not as_good(unchecked, checked)
    assert not as_good({"prompt": "a", "guardrails": "Mine"}, checked)

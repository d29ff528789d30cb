"""Checkpoints from Hugging Face: what is fetched, from where, what is not, and the sentence of every failure."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import cases
import numpy as np
import pytest
from fake_hub import FakeHub
from huggingface_hub import constants
from huggingface_hub.utils import _http
from safetensors.numpy import load_file, save_file

from convert.random_checkpoint import write_checkpoint
from cosmos3_jax import Cosmos3Pipeline, InputError, generate, hub, make_mesh, train
from cosmos3_jax.checkpoint import FOLDERS, Checkpoint
from cosmos3_jax.generate import main

REPO = "nvidia/Cosmos3-Tiny"
FILE = "diffusion_pytorch_model.safetensors"
PLAIN = [
    "assets/negative_prompt.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_tokenizer/chat_template.jinja",
    "text_tokenizer/tokenizer.json",
    "text_tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "vae/config.json",
]
WEIGHTS = [f"transformer/{FILE}", f"vae/{FILE}"]
SOUND = ["sound_tokenizer/config.json", f"sound_tokenizer/{FILE}"]
NEVER = [  # also published
    "README.md",
    "assets/demo.mp4",
    "config.json",
    "model.safetensors",
    "sound_tokenizer/model.bin",
    "text_tokenizer/code.py",
    f"transformer/{FILE}.bin",
    "transformer/model.bin",
    "transformer/model.pt",
    "vision_encoder/config.json",
    "vision_encoder/model.safetensors",
]


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A checkpoint that loads, with sound."""
    return write_checkpoint(tmp_path_factory.mktemp("complete"), cases.FAMILIES["small"], cases.VAE)


@pytest.fixture(scope="module")
def without_heads(complete, tmp_path_factory):
    """One that cannot make sound, although there is a sound tokenizer."""
    config = dataclasses.replace(cases.FAMILIES["small"], sound_gen=False, sound_dim=None)
    folder = write_checkpoint(tmp_path_factory.mktemp("without_heads"), config, cases.VAE)
    shutil.copytree(complete / "sound_tokenizer", folder / "sound_tokenizer")
    return folder


@pytest.fixture(scope="module")
def published(complete, tmp_path_factory):
    """What is in the repository, by revision; a few words stand in for the weights, other ones in each revision."""
    folders = {}
    for revision in ("main", "v1"):
        folders[revision] = tmp_path_factory.mktemp("published") / revision
        shutil.copytree(complete, folders[revision], ignore=shutil.ignore_patterns("*.safetensors"))
        for name in (PLAIN[0], *WEIGHTS, SOUND[1], *NEVER):
            (folders[revision] / name).parent.mkdir(exist_ok=True)
            (folders[revision] / name).write_text(json.dumps({"of": f"{name} of {revision}"}))
    return folders


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    """The Hub, with an empty cache here."""
    with FakeHub(REPO, published) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between a failure and the next try
        yield server
        _http.close_session()


@pytest.fixture(params=["offline", "unreachable"])
def cut_off(request, server, monkeypatch):
    """`cut_off()`: from then on the Hub is not reached, because one does not want to or because nothing answers."""

    def cut_off():
        if request.param == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            _http.close_session()
        else:
            server.shutdown()
            server.server_close()

    return cut_off


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def refused(*arguments: str) -> pytest.RaisesExc[InputError]:
    """The sentence begins with what was asked for."""
    return pytest.raises(InputError, match=f"^{re.escape(arguments[0])}: {'.*'.join(arguments[1:])}")


# What is fetched


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_only_what_is_needed_is_fetched_and_only_once(server, weights, sound):
    """Never what else a repository has, pickle files least of all."""
    checkpoint = Checkpoint.open(REPO, weights=weights, sound=sound)
    expected = PLAIN + WEIGHTS * weights + (SOUND if weights else SOUND[:1]) * sound
    assert files(checkpoint.folder) == sorted(server.downloaded) == sorted(expected)
    assert Checkpoint.open(REPO, weights=weights, sound=sound) == checkpoint
    assert len(server.downloaded) == len(expected)


def test_weights_are_added_to_what_is_there(server):
    first = Checkpoint.open(REPO, weights=False)
    assert Checkpoint.open(REPO) == first
    assert sorted(server.downloaded) == sorted(PLAIN + WEIGHTS)


@pytest.mark.parametrize("parts", [["vae"], ["vae", "transformer"], ["sound_tokenizer"]], ids=" ".join)
def test_the_parts_that_were_asked_for(server, parts):
    root = ["assets/negative_prompt.json", "model_index.json"]
    inside = [name for name in PLAIN + WEIGHTS + SOUND if name.split("/")[0] in parts]
    assert files(hub.download(REPO, parts)) == sorted(root + inside)


@pytest.mark.parametrize("asked", ["", "@main", "@v1", "@commit of main", "@commit of v1"])
def test_the_revision(server, published, asked):
    """A branch, a tag or a commit, each with its own weights."""
    revision = "v1" if asked.endswith("v1") else "main"
    commit = server.revisions[revision][0]
    folder = Checkpoint.open(REPO + (f"@{commit}" if "commit" in asked else asked)).folder
    assert folder.name == commit
    for name in (*WEIGHTS, *PLAIN):
        assert (folder / name).read_bytes() == (published[revision] / name).read_bytes()


def test_a_branch_that_moved_is_fetched_anew(server, published, tmp_path):
    """But for the files that are the same."""
    first = Checkpoint.open(REPO)
    newer = shutil.copytree(published["main"], tmp_path / "newer")
    index = json.loads((newer / "model_index.json").read_text())
    (newer / "model_index.json").write_text(json.dumps(index | {"default_use_system_prompt": False}))
    server.push("main", newer)
    server.downloaded.clear()
    second = Checkpoint.open(REPO)
    assert (first.use_system_prompt, second.use_system_prompt) == (True, False)
    assert server.downloaded == ["model_index.json"]


def test_what_was_fetched_loads(server, complete):
    """The cache's links lead out of the snapshot, to the blobs beside it."""
    server.push("v1", complete)
    pipe = Cosmos3Pipeline.from_pretrained(f"{REPO}@v1", progress=False)
    assert (pipe.checkpoint.folder / WEIGHTS[0]).is_symlink()
    stored = load_file(complete / WEIGHTS[0])["proj_in.bias"]
    np.testing.assert_array_equal(pipe.residence.bring("gen").weights["vision"]["b_in"].get_value(), stored)


@pytest.mark.parametrize(
    ("heads", "sound", "fetched"), [(True, True, SOUND), (True, False, []), (False, True, SOUND[:1]), (False, False, [])]
)
def test_the_sound_tokenizer_is_fetched_where_it_can_be_used(server, request, heads, sound, fetched):
    """Not if it was not asked for, and its weights not for a transformer without sound heads."""
    server.push("v1", request.getfixturevalue("complete" if heads else "without_heads"))
    pipe = Cosmos3Pipeline.from_pretrained(f"{REPO}@v1", sound=sound, progress=False)
    expected = [name for name in PLAIN if not name.startswith("assets")] + WEIGHTS + fetched
    assert files(pipe.checkpoint.folder) == sorted(server.downloaded) == sorted(expected)
    assert ("sound" in pipe.residence.abstract) == (heads and sound)


def test_sound_is_fetched_later(server, complete):
    """Beside what is there already."""
    server.push("v1", complete)
    Cosmos3Pipeline.from_pretrained(f"{REPO}@v1", sound=False, progress=False)
    server.downloaded.clear()
    pipe = Cosmos3Pipeline.from_pretrained(f"{REPO}@v1", progress=False)
    assert sorted(server.downloaded) == sorted(SOUND)
    stored = load_file(complete / SOUND[1])["decoder.conv1.bias"]
    np.testing.assert_array_equal(pipe.residence.bring("sound").weights["conv1"]["bias"].get_value(), stored)


# Without a network


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_from_the_cache_alone(server, cut_off, revision):
    first = Checkpoint.open(REPO + revision)
    cut_off()
    assert Checkpoint.open(REPO + revision) == first
    assert Checkpoint.open(REPO + revision, weights=False) == first


@pytest.mark.parametrize("fetched", ["nothing", "no weights", "another revision"])
def test_what_the_cache_has_not(server, cut_off, fetched):
    """Nothing is loaded of half a checkpoint; the command tells how to fetch it elsewhere."""
    if fetched != "nothing":
        Checkpoint.open(f"{REPO}@v1" if fetched == "another revision" else REPO, weights=fetched != "no weights")
    cut_off()
    with refused(REPO, "neither a folder here nor to be had from Hugging Face") as error:
        Checkpoint.open(REPO)
    [command] = re.findall("`(hf download .*?)`", str(error.value))
    assert command.startswith(f"hf download {REPO} ")
    assert all(name.split("/")[0] in str(error.value) for name in PLAIN + WEIGHTS), "a part that one would not know to fetch"


@pytest.mark.parametrize("loaded", [False, True])
def test_sound_that_the_cache_has_not(server, cut_off, complete, loaded):
    """The rest loads, and the command would fetch the sound tokenizer too."""
    server.push("v1", complete)
    if loaded:
        Cosmos3Pipeline.from_pretrained(f"{REPO}@v1", sound=False, progress=False)
    cut_off()
    with refused(f"{REPO}@v1", "neither", "`hf download", "text_tokenizer, sound_tokenizer are needed"):
        Cosmos3Pipeline.from_pretrained(f"{REPO}@v1", progress=False)
    if loaded:
        Cosmos3Pipeline.from_pretrained(f"{REPO}@v1", sound=False, progress=False)


def test_the_command_names_the_revision(server, cut_off):
    cut_off()
    with refused(f"{REPO}@v1", "neither", rf"`hf download {REPO} --revision v1 .*--local-dir DIR`"):
        Checkpoint.open(f"{REPO}@v1")


# What is refused


@pytest.mark.parametrize("cached", [False, True], ids=["empty", "cached"])
def test_an_unknown_repository(server, cached):
    if cached:
        Checkpoint.open(REPO)
    with refused("nvidia/Cosmos3-Nope", "Hugging Face shows no such repository; .*`hf auth login`"):
        Checkpoint.open("nvidia/Cosmos3-Nope")


@pytest.mark.parametrize("revision", ["v9", "1" * 40, "refs/pr/1"])
def test_an_unknown_revision(server, revision):
    with refused(f"{REPO}@{revision}", f"this repository has no revision '{revision}'$"):
        Checkpoint.open(f"{REPO}@{revision}")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(server, status):
    """Without a token, and with one of somebody who has not accepted the licence."""
    server.gated = status
    with refused(
        REPO, "Hugging Face shows no such repository; if its licence must be accepted first, do that .*`hf auth login`"
    ):
        Checkpoint.open(REPO)
    server.gated = None
    assert files(Checkpoint.open(REPO).folder) == sorted(PLAIN + WEIGHTS)


IDS = [
    "nvidia/.hidden",
    "a b/c",
    "a--b/c",
    "a/b.git",
    "nvidia/Cosmos3?",
    "nvidia/Cosmos3#1",
    "http:/host",
    "nvidia/@main",
    "a/\0b",
    "a/" + "b" * 200,
]


@pytest.mark.parametrize("name", IDS, ids=ascii)
def test_an_id_that_is_none(server, name):
    with refused(name, "(neither a folder here nor the id of a Hugging Face repository|there is no such folder)$"):
        Checkpoint.open(name)
    assert server.downloaded == []


@pytest.mark.parametrize("name", [f"{REPO}@", "@v1", f"{REPO}@v1@v2", f"{REPO}@../main", f"{REPO}@ "], ids=ascii)
def test_a_revision_that_is_none(server, name):
    """It is refused, and not taken for another one, such as the default."""
    with refused(name):
        Checkpoint.open(name)


@pytest.mark.parametrize("name", [WEIGHTS[0], PLAIN[0]])
def test_a_connection_that_is_cut(server, name):
    """Now and then is made up for; again and again is told, and what was fetched is of use later."""
    server.cuts[name] = 1
    Checkpoint.open(f"{REPO}@v1")
    server.cuts[name] = 99
    with refused(REPO, "neither a folder here nor to be had from Hugging Face"):
        Checkpoint.open(REPO)
    server.cuts.clear()
    assert files(Checkpoint.open(REPO).folder) == sorted(PLAIN + WEIGHTS)


@pytest.mark.parametrize("change", ["no model_index.json", "another pipeline", "no transformer"])
def test_a_repository_of_something_else(server, published, tmp_path, change):
    folder = shutil.copytree(published["main"], tmp_path / "other")
    if change == "no model_index.json":
        (folder / "model_index.json").unlink()
    elif change == "another pipeline":
        (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    else:
        shutil.rmtree(folder / "transformer")
    server.push("main", folder)
    with pytest.raises(InputError, match=r"model_index\.json: missing|is of 'WanPipeline'|transformer/config\.json: missing"):
        Checkpoint.open(REPO)


def test_two_at_once_fetch_the_same(server):
    """Threads stand in for the processes of one host, which share a cache."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(Checkpoint.open(REPO))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert sorted(set(server.downloaded)) == sorted(PLAIN + WEIGHTS)


# From the command line

IMAGE = ["--prompt", "a ball", "--num-frames", "1", "--height", "32", "--width", "32", "--steps", "1", "--guidance-scale", "1"]
WRONG = {
    "height": (["--height", "33"], "height"),
    "frames": (["--num-frames", "4"], "num_frames"),
    "sound of a picture": (["--sound", "--out", "a.png"], r"one frame with sound cannot be written as \.png"),
    "no sound to save": (["--save-sound", "a.wav"], "--save-sound without --sound"),
    "out": (["--out", "no/such/folder/a.png"], "no/such/folder"),
    "image": (["--image", "no.png", "--num-frames", "5"], r"no\.png"),
    "mesh": (["--tp", "3"], "tp=3"),
    "devices": (["--tp", "64"], "64"),
}


@pytest.mark.parametrize(("flags", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_refused_before_weights_are_fetched(server, capsys, monkeypatch, tmp_path, flags, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoint", f"{REPO}@v1", *IMAGE, *flags]) == 2
    assert re.fullmatch(f"error: .*{sentence}.*", capsys.readouterr().err.splitlines()[-1])  # behind the hub's own bar
    assert set(server.downloaded) <= {*PLAIN, *SOUND[: "--sound" in flags]}


def test_sound_that_cannot_be_made_is_refused_before_weights_are_fetched(server, without_heads, capsys):
    server.push("v1", without_heads)
    assert main(["--checkpoint", f"{REPO}@v1", *IMAGE, "--sound"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: enable_sound: this checkpoint has no sound heads")
    assert WEIGHTS[0] not in server.downloaded
    assert SOUND[1] not in server.downloaded


@pytest.mark.parametrize("sound", [False, True])
def test_the_command_fetches_the_sound_tokenizer_with_sound_alone(server, complete, monkeypatch, tmp_path, sound):
    server.push("v1", complete)
    monkeypatch.setattr(Cosmos3Pipeline, "run", stop := mock.Mock(side_effect=KeyboardInterrupt))
    assert main(["--checkpoint", f"{REPO}@v1", *IMAGE, *["--sound"] * sound, "--out", str(tmp_path / "a.mp4")]) == 130
    assert stop.called
    assert set(SOUND) & set(server.downloaded) == set(SOUND * sound)


@pytest.mark.parametrize("lora", [False, True])
def test_training_fetches_what_its_result_has(server, complete, monkeypatch, tmp_path, lora):
    server.push("v1", complete)
    (tmp_path / "clips").mkdir()
    for name, text in {"a.png": "", "a.txt": "a cat"}.items():
        (tmp_path / "clips" / name).write_text(text)
    monkeypatch.setattr(train, "post_train", stop := mock.Mock(side_effect=KeyboardInterrupt))
    flags = ["--checkpoint", f"{REPO}@v1", "--data", str(tmp_path / "clips"), "--out", str(tmp_path / "run")]
    assert train.main([*flags, *["--lora-rank", "2"] * lora]) == 130
    assert stop.called
    assert set(SOUND) & set(server.downloaded) == (set() if lora else set(SOUND))


ASKED = {
    "dtype": {"dtype": "int8"},
    "text tower": {"text_tower": "sell"},
    "no mesh": {"mesh": "two"},
    "heads": {"mesh": (1, 3)},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_wrong_argument_is_refused_before_weights_are_fetched(server, asked):
    if asked.get("mesh") == (1, 3):
        asked = {"mesh": make_mesh(1, 3)}
    with pytest.raises(InputError, match="|".join([*asked, "tp=3"])):
        Cosmos3Pipeline.from_pretrained(REPO, progress=False, **asked)
    assert set(server.downloaded) <= {*PLAIN, SOUND[0]}


@pytest.mark.parametrize("sound", [False, True])
def test_a_dry_run_fetches_no_weights(server, capsys, monkeypatch, sound):
    monkeypatch.setattr(generate, "dry_run", lambda *_: ("", {"bytes": 1}))  # it would compile for every mesh
    assert main(["--checkpoint", REPO, "--dry-run", *IMAGE, *["--sound"] * sound]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(server.downloaded) == sorted(PLAIN + SOUND[:1] * sound)


def test_tensors_that_do_not_fit_are_told_of_the_snapshot(server, complete, tmp_path, capsys):
    folder = shutil.copytree(complete, tmp_path / "other")
    save_file(load_file(folder / WEIGHTS[0]) | {"stray": np.zeros(2, np.float32)}, folder / WEIGHTS[0])
    server.push("main", folder)
    assert main(["--checkpoint", REPO, *IMAGE, "--out", str(tmp_path / "a.png")]) == 2
    assert "transformer: unexpected: stray [2]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("repository", "sentence"),
    [("nvidia/Nope", "no such repository"), (f"{REPO}@v9", "no revision 'v9'"), ("a b/c", "nor the id of")],
)
def test_a_failure_is_one_sentence_and_exit_code_2(server, capsys, repository, sentence):
    assert main(["--checkpoint", repository, *IMAGE]) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(f"error: {re.escape(repository)}: .*{sentence}.*\n", captured.err)
    assert captured.out == ""


def test_a_process_of_its_own_without_a_network(server):
    """As a user runs it, with nothing set but the environment: it finds everything, and the weights to be no such thing."""
    folder = Checkpoint.open(f"{REPO}@v1").folder
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "cosmos3_jax.generate", "--checkpoint", f"{REPO}@v1", *IMAGE]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert re.fullmatch(f"error: {folder}/transformer/{FILE}: not a safetensors file that can be read .*\n", ran.stderr)
    assert ran.stdout == ""


def test_the_parts_are_those_of_a_checkpoint():
    assert set(FOLDERS) == {name.split("/")[0] for name in PLAIN if "/" in name} - {"assets"}

"""From one layout to the other and back: the same weights, video and sound, and a sentence for whatever is wrong."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import cases
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from convert.random_checkpoint import sound_shapes, write_checkpoint
from cosmos3_jax import Cosmos3Pipeline, InputError, RunError, array_store, conversion, make_mesh, safetensors_files
from cosmos3_jax.checkpoint import Checkpoint, load
from cosmos3_jax.config import TINY_FULL_SOUND, TINY_SOUND
from cosmos3_jax.converted import FORMAT, MARK
from cosmos3_jax.errors import StoppedError
from cosmos3_jax.networks import abstract_networks, abstract_sound_encoder
from cosmos3_jax.safetensors_files import in_shards, write_tensors
from cosmos3_jax.weights import by_path

MESHES = [(1, 1), (2, 4), (1, 8)]
SMALL = cases.FAMILIES["small"]
FAMILIES = cases.FAMILIES | {
    "heads": dataclasses.replace(SMALL, action_gen=True, action_dim=6),  # and a full sound tokenizer
    "silent": dataclasses.replace(SMALL, sound_gen=False, sound_dim=None),
    "one layer": dataclasses.replace(SMALL, num_hidden_layers=1),
}
FILE = "diffusion_pytorch_model.safetensors"
ENCODER = {"encoder.w": np.full((4, 3), 0.1, np.float32), "encoder.step": np.array(3.0, np.float32)}
DECODER = sound_shapes(TINY_SOUND)
REQUEST = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "seed": 3, "progress": False}
SOUND = REQUEST | {"enable_sound": True}
NETWORKS = ("und", "gen", "vae")  # and "sound", where there is a sound tokenizer


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """`published(family)`: a folder as it is published; its sound tokenizer has an encoder too where there are all heads.

    Of those, no tensor is one that this project knows; "full sound" has an encoder that can be read.
    """

    @functools.cache
    def folder(family: str) -> Path:
        config, sound = FAMILIES.get(family, SMALL), TINY_FULL_SOUND if family == "full sound" else None
        path = write_checkpoint(tmp_path_factory.mktemp("published") / family.replace(" ", "_"), config, cases.VAE, sound)
        if family == "heads":
            in_sound_tokenizer(path, lambda tensors: tensors | ENCODER)
        return path

    return folder


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    """`converted(family)`: what conversion makes of it, once."""

    @functools.cache
    def folder(family: str) -> Path:
        path = tmp_path_factory.mktemp("converted") / family.replace(" ", "_")
        assert main([str(published(family)), str(path)]) == 0
        return path

    return folder


@pytest.fixture
def broken(converted, tmp_path):
    """A converted folder to damage."""
    return shutil.copytree(converted("small"), tmp_path / "broken")


@pytest.fixture
def run(capsys):
    """`run(*words)`: exit code, the last line on stdout as JSON (or nothing), and what stderr says in the end."""

    def run_(*words) -> tuple[int, dict, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert "Traceback" not in err
        return code, json.loads(lines[-1]) if lines else {}, err[err.find("error: ") :] if "error: " in err else ""

    return run_


def in_sound_tokenizer(folder: Path, change) -> Path:
    """A published folder, with the tensors in its sound tokenizer that `change` makes of them."""
    file = folder / "sound_tokenizer" / FILE
    save_file(change(load_file(file)), file)
    return folder


def weights(folder: Path, cfg: int = 1, tp: int = 1, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Every weight as the pipeline has it on its devices, by network and path."""
    pipe = Cosmos3Pipeline.from_pretrained(folder, mesh=make_mesh(cfg, tp), dtype=dtype, progress=False)
    parts = {part: pipe.residence.bring(part) for part in pipe.residence.abstract}
    return {f"{part} {path}": w.get_value() for part, network in parts.items() for path, w in by_path(network.weights).items()}


def encoder_weights(folder: Path, cfg: int = 1, tp: int = 1, *, with_decoder: bool = False) -> dict[str, np.ndarray]:
    """Every weight of the sound encoder on its devices, audited alone or with the decoder."""
    checkpoint, mesh = Checkpoint.open(folder, sound_encoder=True), make_mesh(cfg, tp)
    networks = {"sound_encoder": abstract_sound_encoder(checkpoint.sound.encoder, mesh)}
    if with_decoder:
        networks["sound"] = abstract_networks(SMALL, checkpoint.vae, mesh, "bfloat16", checkpoint.sound).sound
    encoder = load(checkpoint.audited(networks), "sound_encoder", networks["sound_encoder"])
    return {path: w.get_value() for path, w in by_path(encoder.weights).items()}


def tensors(folder: Path, part: str = "*") -> dict[str, np.ndarray]:
    """Every tensor of a published folder, by part and name, from however many files."""
    files = sorted(folder.glob(f"{part}/*.safetensors"))
    return {f"{file.parent.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_equal(found: dict, expected: dict) -> None:
    """Bit for bit, in dtype and, on devices, placement."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert getattr(found[name], "sharding", None) == getattr(value, "sharding", None), name
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value), err_msg=name)


def rewrite(store: Path, change) -> None:
    """Stores the arrays again that `change` makes of them."""
    contents = array_store.contents(store)
    arrays = {name: np.array(array) for name, array in array_store.read(store, contents, contents)}
    shutil.rmtree(store)
    array_store.write(store, change(arrays).items())


def without(*names: str):
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# The same weights, the same video and sound


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_video_and_sound_are_those_of_the_published_folder(cfg, tp, published, converted):
    """On every mesh, from one conversion."""
    mesh = make_mesh(cfg, tp)
    one, other = (
        Cosmos3Pipeline.from_pretrained(folder, mesh=mesh, progress=False)(cases.PROMPT, **SOUND)
        for folder in (published("heads"), converted("heads"))
    )
    np.testing.assert_array_equal(one.video, other.video)
    np.testing.assert_array_equal(one.sound, other.sound)
    assert one.sample_rate == other.sample_rate
    assert one.video.std() > 0
    assert one.sound.std() > 0


@pytest.mark.parametrize(("family", "dtype"), [*((family, "float32") for family in FAMILIES), ("heads", "bfloat16")])
@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_the_weights_are_those_of_the_published_folder(cfg, tp, family, dtype, published, converted):
    tp = min(tp, FAMILIES[family].num_key_value_heads)
    assert_equal(weights(converted(family), cfg, tp, dtype), weights(published(family), cfg, tp, dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_verified_and_back_again(family, published, converted, run, tmp_path):
    """No tensor is lost on the way, those that nothing reads neither."""
    code, answer, _ = run(published(family), converted(family), "--verify")
    stored = {store.name: len(array_store.contents(store)) for store in converted(family).glob("weights/*")}
    assert (code, answer["equal_arrays"]) == (0, stored)
    assert run(converted(family), "--to-safetensors", tmp_path / "back")[0] == 0
    assert_equal(tensors(tmp_path / "back"), tensors(published(family)))


def test_a_converted_folder_is_converted_likewise(published, converted, run, tmp_path):
    assert run(converted("heads"), tmp_path / "again", "--verify")[0] == 0
    assert run(published("heads"), tmp_path / "again", "--verify")[0] == 0
    assert run(converted("heads"), converted("heads"), "--verify")[0] == 0


def by_formula(v: np.ndarray, g: np.ndarray, transposed: bool) -> np.ndarray:
    """The first axis is the outputs' of a convolution, and the inputs' of a transposed one: the norm is over the others."""
    v, g = np.float64(v), np.float64(g)
    return g * v / np.sqrt((v**2).sum((1, 2), keepdims=True))


def by_torch(v: np.ndarray, g: np.ndarray, transposed: bool) -> np.ndarray:
    torch = pytest.importorskip("torch")
    inputs, outputs = v.shape[:2] if transposed else v.shape[1::-1]
    layer = (torch.nn.ConvTranspose1d if transposed else torch.nn.Conv1d)(inputs, outputs, v.shape[2], bias=False)
    with warnings.catch_warnings(action="ignore", category=FutureWarning), torch.no_grad():
        layer = torch.nn.utils.weight_norm(layer.double())
        layer.load_state_dict({"weight_g": torch.from_numpy(np.float64(g)), "weight_v": torch.from_numpy(np.float64(v))})
        layer(torch.zeros(1, inputs, 99, dtype=torch.float64))  # it folds when it is called
        return layer.weight.numpy()


@pytest.mark.parametrize("expected", [by_formula, pytest.param(by_torch, marks=pytest.mark.live)])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["published", "converted"])
def test_weight_norms_are_folded(layout, stored, shards, expected, published, run, tmp_path):
    """In float32, whatever the dtype of the file and that of the other networks."""
    folder = shutil.copytree(published("small"), tmp_path / "src")
    kept = {name: tensor.astype(jnp.dtype(stored)) for name, tensor in load_file(folder / "sound_tokenizer" / FILE).items()}
    (folder / "sound_tokenizer" / FILE).unlink()
    write_tensors(folder / "sound_tokenizer", [dict(list(kept.items())[i::shards]) for i in range(shards)])
    if layout == "converted":
        assert run(folder, tmp_path / "dst")[0] == 0
        folder = tmp_path / "dst"
    found = {path[6:]: w for path, w in weights(folder, dtype="bfloat16").items() if path.startswith("sound ")}
    assert {w.dtype for w in found.values()} == {jnp.dtype("float32")}
    folded = {name[8:-2] for name in kept if name.endswith("_g")}
    assert len(folded) == 2 + 5 * 7
    for path in folded:
        v, g = kept[f"decoder.{path}_v"], kept[f"decoder.{path}_g"]
        exact = expected(v, g, "conv_t1" in path).transpose(2, 1, 0)
        np.testing.assert_allclose(found[path], exact, rtol=1e-6, err_msg=path)  # a norm, a quotient and a product in float32
    for path in found.keys() - folded:
        np.testing.assert_array_equal(found[path], kept[f"decoder.{path}"].astype(np.float32).reshape(-1), err_msg=path)


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_the_sound_encoder_is_that_of_the_published_folder(cfg, tp, published, converted):
    expected = encoder_weights(published("full sound"), cfg, tp)
    assert {w.dtype for w in expected.values()} == {jnp.dtype("float32")}
    for with_decoder in (False, True):
        assert_equal(encoder_weights(converted("full sound"), cfg, tp, with_decoder=with_decoder), expected)


def test_the_sound_encoder_comes_back_whatever_the_others_become(published, run, tmp_path):
    assert run(published("full sound"), tmp_path / "dst", "--dtype", "bfloat16", "--verify")[0] == 0
    assert run(tmp_path / "dst", "--to-safetensors", tmp_path / "back")[0] == 0
    assert_equal(tensors(tmp_path / "back", "sound_tokenizer"), tensors(published("full sound"), "sound_tokenizer"))
    assert_equal(encoder_weights(tmp_path / "back"), encoder_weights(published("full sound")))


def test_a_converted_folder_without_the_sound_encoder_says_so(published, converted, run, tmp_path):
    rest = "so no sound can be learned from; leave sound out$"
    with pytest.raises(InputError, match=f"encoder_enabled=False, {rest}"):
        encoder_weights(converted("small"))
    folder = shutil.copytree(converted("full sound"), tmp_path / "full")
    rewrite(folder / "weights" / "sound_tokenizer", without(*(sound_shapes(TINY_FULL_SOUND).keys() - DECODER.keys())))
    for with_decoder in (False, True):
        with pytest.raises(InputError, match=f"^{folder}: its sound tokenizer has no encoder, {rest}"):
            encoder_weights(folder, with_decoder=with_decoder)
    assert run(published("full sound"), tmp_path / "vae", "--only", "vae")[0] == 0
    for path in ("transformer/config.json", "sound_tokenizer/config.json"):
        (tmp_path / "vae" / path).parent.mkdir(exist_ok=True)
        shutil.copy(published("full sound") / path, tmp_path / "vae" / path)
    with pytest.raises(InputError, match="sound_encoder: not in this folder, which was made with --only; convert all of it"):
        encoder_weights(tmp_path / "vae")


def test_faults_of_a_converted_sound_encoder_are_told_once(converted, tmp_path):
    folder = shutil.copytree(converted("full sound"), tmp_path / "full")

    def damage(arrays):
        arrays["odd"] = arrays.pop("encoder.layers.1.norm.weight").astype(np.int32)
        return arrays

    rewrite(folder / "weights" / "sound_tokenizer", damage)
    lines = [
        "  sound_tokenizer: missing: encoder.layers.1.norm.weight [6]",
        "  sound_tokenizer: unexpected: odd [6]",
        "  sound_tokenizer: odd kind: odd is int32",
    ]
    for with_decoder in (False, True):
        with pytest.raises(InputError) as caught:
            encoder_weights(folder, with_decoder=with_decoder)
        assert str(caught.value).splitlines()[1:] == lines


@pytest.mark.parametrize("layout", ["published", "converted"])
def test_to_safetensors_in_shards(layout, request, published, run, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "in_shards", functools.partial(in_shards, limit=200_000))
    folder = request.getfixturevalue(layout)("heads")
    assert run(folder, "--to-safetensors", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 3
    assert_equal(tensors(tmp_path / "out"), tensors(published("heads")))
    assert_equal(weights(tmp_path / "out"), weights(published("heads")))
    assert run("--inspect", tmp_path / "out")[1]["faults"] == []


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_stored_kinds_are_kept(stored, run, tmp_path):
    folder = write_checkpoint(tmp_path / "src", SMALL, cases.VAE, dtype=jnp.dtype(stored))
    assert run(folder, tmp_path / "dst", "--verify")[0] == 0
    assert run(tmp_path / "dst", "--to-safetensors", tmp_path / "back")[0] == 0
    assert_equal(tensors(tmp_path / "back"), tensors(folder))
    assert_equal(weights(tmp_path / "dst"), weights(folder))


def test_layers_of_different_kinds_keep_their_values(published, run, tmp_path):
    folder = shutil.copytree(published("small"), tmp_path / "src")
    mixed = {
        name: tensor.astype(ml_dtypes.bfloat16 if "layers.0." in name else tensor.dtype)
        for name, tensor in load_file(folder / "transformer" / FILE).items()
    }
    save_file(mixed, folder / "transformer" / FILE)
    assert run(folder, tmp_path / "dst", "--verify")[0] == 0
    assert_equal(weights(tmp_path / "dst"), weights(folder))


def test_bfloat16_but_for_the_timestep_embedding(published, run, tmp_path):
    dst = tmp_path / "dst"
    assert run(published("heads"), dst, "--dtype", "bfloat16", "--verify")[0] == 0
    for part in (*NETWORKS, "unused"):
        for path, (_, dtype) in array_store.contents(dst / "weights" / part).items():
            assert dtype == ("float32" if "timestep_embedding" in path else "bfloat16"), path
    assert_equal(weights(dst, dtype="bfloat16"), weights(published("heads"), dtype="bfloat16"))
    assert sum(file.stat().st_size for file in dst.rglob("weights/vae/**/d/*")) < 0.6 * sum(
        file.stat().st_size for file in (published("heads") / "vae").glob("*.safetensors")
    )


@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("family", ["small", "heads"])
def test_the_sound_tokenizer_stays_as_it_was_whatever_the_others_become(family, stored, published, run, tmp_path):
    folder = shutil.copytree(published(family), tmp_path / "src")
    in_sound_tokenizer(folder, lambda tensors: {name: tensor.astype(stored) for name, tensor in tensors.items()})
    assert run(folder, tmp_path / "dst", "--dtype", "bfloat16", "--verify")[0] == 0
    for src, back in [(tmp_path / "dst", "a"), (tmp_path / "dst", "b"), (folder, "c")]:
        assert run(src, "--to-safetensors", tmp_path / back, *["--dtype", "bfloat16"] * (back != "a"))[0] == 0
        assert_equal(tensors(tmp_path / back, "sound_tokenizer"), tensors(folder, "sound_tokenizer"))
        assert {tensor.dtype.name for tensor in tensors(tmp_path / back, "vae").values()} == {"bfloat16"}


def test_the_last_layer_of_the_text_tower_is_written_for_one_layer_too(published):
    """diffusers has no model without them: random_checkpoint should write every tensor that is published."""
    names = load_file(published("one layer") / "transformer" / FILE)
    expected = {name.replace("layers.2.", "layers.0.") for name in load_file(published("small") / "transformer" / FILE)}
    assert names.keys() == {name for name in expected if "layers.1." not in name}


# A part of it

PARTS = {"transformer": {"und", "gen", "unused"}, "vae": {"vae"}, "sound_tokenizer": {"sound_tokenizer"}}


@pytest.mark.parametrize("only", [["transformer"], ["vae"], ["sound_tokenizer"], ["vae", "transformer"]], ids=",".join)
def test_a_part_is_written_and_the_rest_missed(only, published, run, tmp_path):
    dst = tmp_path / "dst"
    assert run(published("heads"), dst, "--only", ",".join(only), "--verify")[0] == 0
    stores = set().union(*(PARTS[part] for part in only))
    assert {path.name for path in (dst / "weights").iterdir()} == set(json.loads((dst / MARK).read_text())["stores"]) == stores
    missing = [part for part in NETWORKS if part not in stores]
    if missing:
        with pytest.raises(
            InputError, match=rf"^{dst}: {len(missing)} faults? in the tensors(\n  (und|gen|vae): not in this folder.*)+$"
        ):
            weights(dst)
        code, answer, _ = run("--inspect", dst)
        assert (code, len(answer["faults"])) == (2, len(missing))
        assert run(dst, "--to-safetensors", tmp_path / "back")[0] == 2
        assert not (tmp_path / "back").exists()
    else:
        assert_equal(weights(dst), {name: w for name, w in weights(published("heads")).items() if "sound " not in name})


def test_a_folder_without_the_sound_tokenizer_makes_videos_and_refuses_sound(published, run, tmp_path):
    assert run(published("small"), tmp_path / "dst", "--only", "transformer,vae")[0] == 0
    assert run("--inspect", tmp_path / "dst")[1]["sound_tokenizer"] == "none"
    whole, without_sound = (
        Cosmos3Pipeline.from_pretrained(folder, progress=False) for folder in (published("small"), tmp_path / "dst")
    )
    np.testing.assert_array_equal(*(pipe(cases.PROMPT, **REQUEST).video for pipe in (whole, without_sound)))
    with pytest.raises(InputError, match=r"^enable_sound: this checkpoint has no sound tokenizer, .*leave it out"):
        without_sound(cases.PROMPT, **SOUND)


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("nonsense", "--only nonsense: parts are transformer, vae, sound_tokenizer"),
        ("vae,und", "--only vae,und: parts are transformer, vae, sound_tokenizer"),
        ("sound_tokenizer", "--only sound_tokenizer: there is none in "),
        ("", "--only"),
        (",", "--only"),
    ],
)
def test_a_part_that_is_none(only, words, published, run, tmp_path):
    code, _, said = run(published("silent"), tmp_path / "dst", "--only", only)
    assert code == 2
    assert said.startswith(f"error: {words}")
    assert ("parts are" in said) == (only != "sound_tokenizer")  # nothing else tells what to write there
    assert list(tmp_path.iterdir()) == []


# Verified


@pytest.mark.parametrize("store", ["und", "gen", "vae", "unused", "sound_tokenizer"])
def test_a_byte_that_changed_is_found_and_named(store, broken, published, run):
    file = max((broken / "weights" / store / "state").glob("ocdbt*/d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, _, said = run(published("small"), broken, "--verify")
    assert code == 2
    assert re.fullmatch(rf"error: {broken}: differs from .*/small in 1 of \d+ arrays\n  {store}: \S+\n", said)


def changed(name, change):
    return lambda arrays: arrays | {name: change(arrays[name])}


@pytest.mark.parametrize(
    ("store", "name", "change"),
    [
        ("gen", "vision.b_in", lambda x: np.nextafter(x, 9)),
        ("sound_tokenizer", "decoder.conv1.weight_g", lambda x: np.nextafter(x, 9)),
        ("sound_tokenizer", "decoder.conv1.weight_v", lambda x: x.astype(np.float16)),
        ("vae", "decoder.conv_in.bias", lambda x: -x),
        ("und", "last.k", lambda x: x.astype(ml_dtypes.bfloat16).astype(x.dtype)),
        ("gen", "layers.k", lambda x: x.astype(ml_dtypes.bfloat16)),
        ("unused", "norm.weight", lambda x: x[:-1]),
        ("unused", "lm_head.weight", lambda x: x + np.float32(np.nan)),
    ],
)
def test_a_value_that_changed_is_found_and_named(store, name, change, broken, published, run):
    rewrite(broken / "weights" / store, changed(name, change))
    code, _, said = run(published("small"), broken, "--verify")
    assert (code, said.splitlines()[1:]) == (2, [f"  {store}: {name}"])


@pytest.mark.parametrize(
    "change",
    [lambda arrays: arrays | {"stray": np.zeros(2, np.float32)}, lambda arrays: {"norm.weight": arrays["norm.weight"]}],
)
def test_an_array_more_or_less_is_found_and_named(change, broken, published, run):
    rewrite(broken / "weights" / "unused", change)
    code, _, said = run(published("small"), broken, "--verify")
    assert code == 2
    assert "unused: unexpected: stray" in said or "unused: lm_head.weight" in said


def test_another_checkpoint_is_not_equal(converted, run, tmp_path):
    other = write_checkpoint(tmp_path / "other", SMALL, cases.VAE, seed=1)
    code, _, said = run(other, converted("small"), "--verify")
    assert code == 2
    assert re.match(rf"error: {converted('small')}: differs from {other} in (\d+) of \1 arrays", said)


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--only", "vae"], ["--only", "nonsense"]])
def test_what_is_there_is_not_said_to_be_what_was_asked_for(options, published, converted, run):
    """DST is whole and float32: an answer to these questions is no."""
    code, _, said = run(published("small"), converted("small"), "--verify", *options)
    assert code == 2
    assert options[0] in said


def test_a_published_folder_is_not_verified(published, run):
    code, _, said = run(published("small"), published("small"), "--verify")
    assert (code, said) == (2, f"error: {published('small')}: not a folder that `python -m convert` wrote: no {MARK} there\n")


# Where it cannot be written


@pytest.mark.parametrize("to", [[], ["--to-safetensors"]], ids=["ours", "published"])
@pytest.mark.parametrize("place", ["there", "file", "no/folder", "file/below"])
def test_a_place_that_is_taken_or_nowhere(place, to, published, run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    code, _, said = run(published("small"), *to, tmp_path / place)
    assert code == 2
    assert re.match(
        rf"error: {tmp_path / place}: (is there already; delete it|there is no folder {(tmp_path / place).parent}$)", said, re.M
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "there"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["{src}"],
        ["{src}", "{dst}", "--to-safetensors", "{dst}"],
        ["{src}", "--inspect", "{src}"],
        ["{src}", "{dst}", "--dtype", "float16"],
        ["{src}", "{dst}", "--nonsense"],
    ],
    ids=" ".join,
)
def test_words_that_make_no_sense(words, published, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([word.format(src=published("small"), dst=tmp_path / "dst") for word in words])
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(published, run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    code, _, said = run(published("small"), tmp_path / "dst")
    assert code == 2
    assert re.fullmatch(rf"error: {tmp_path / 'dst'}: needs 0.0 GB, but there are 0.0 GB free\n", said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", [[], ["--to-safetensors"]], ids=["ours", "published"])
def test_a_disk_that_fills_on_the_way(to, published, run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_store.ocp.partial, "save", full)
    monkeypatch.setattr(safetensors_files, "save_file", full)
    code, _, said = run(published("small"), *to, tmp_path / "dst")
    assert code == 1
    assert re.fullmatch(rf"error: {tmp_path}/.*dst.*: cannot be written \(.*No space left on device\)\n", said)
    assert list(tmp_path.iterdir()) == []


def test_without_a_cpu_it_says_what_is_missing(published, tmp_path, monkeypatch, capsys):
    def none(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(conversion.jax, "local_devices", none)
    assert main([str(published("small")), str(tmp_path / "dst")]) == 2
    assert "JAX_PLATFORMS names no cpu" in capsys.readouterr().err


# Interrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk gone"), MemoryError(), ValueError("odd")], ids=repr)
@pytest.mark.parametrize("to", [[], ["--to-safetensors"]], ids=["ours", "published"])
def test_an_exception_in_the_middle_leaves_nothing(to, error, published, tmp_path, monkeypatch):
    read, count = conversion.Source.read, []

    def fail(self, store: str):
        for pair in read(self, store):
            count.append(store)
            if len(count) == 40:
                raise error
            yield pair

    words = [str(published("small")), *to, str(tmp_path / "dst")]
    with monkeypatch.context() as patch:
        patch.setattr(conversion.Source, "read", fail)
        if code := {OSError: RunError.exit_code, KeyboardInterrupt: StoppedError("").exit_code}.get(type(error)):
            assert main(words) == code
        else:
            with pytest.raises(type(error)):
                main(words)
    assert list(tmp_path.iterdir()) == []
    assert main(words) == 0


KILLED = """
import os, signal, sys
from cosmos3_jax import array_store
from cosmos3_jax import conversion
from convert.__main__ import main

def kill(self, store, read=conversion.Source.read, count=[]):
    for pair in read(self, store):
        count.append(store)
        if store == "vae" and len(count) > 60:
            os.kill(os.getpid(), signal.SIGKILL)
        yield pair

conversion.Source.read = kill
main(sys.argv[1:])
"""


@pytest.mark.parametrize("to", [[], ["--to-safetensors"]], ids=["ours", "published"])
def test_a_killed_conversion_leaves_nothing_that_looks_complete(to, published, run, tmp_path):
    words = [published("small"), *to, tmp_path / "dst"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "dst").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    with pytest.raises(InputError):
        weights(left)
    assert run(*words)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]
    assert_equal(weights(tmp_path / "dst"), weights(published("small")))


# Inspected


@pytest.mark.parametrize("layout", ["published", "converted"])
@pytest.mark.parametrize(
    ("family", "heads", "sound"),
    [
        ("silent", {"sound": False, "action": False}, "none"),
        ("edge", {"sound": True, "action": False}, f"decoder only, {len(DECODER)} tensors"),
        ("heads", {"sound": True, "action": True}, f"full, {len(DECODER) + len(ENCODER)} tensors"),
    ],
)
def test_what_a_folder_is(family, heads, sound, layout, request, run):
    folder = request.getfixturevalue(layout)(family)
    code, about, _ = run("--inspect", folder)
    assert code == 0
    assert (about["folder"], about["layout"], about["sampler"]) == (str(folder), layout, "UniPC")
    assert about["family"] == {"edge": "of Edge's kind"}.get(family, "tiny")
    assert about["heads"] == heads
    assert about["gigabytes_in_bfloat16"].keys() == {*NETWORKS, *(["sound"] if heads["sound"] else [])}
    assert about["sound_tokenizer"] == sound
    assert about["tensor_parallel"] == FAMILIES[family].tensor_parallel_sizes()
    assert about["faults"] == about["notes"] == []


def test_what_a_distilled_folder_is(run, tmp_path):
    folder = write_checkpoint(tmp_path / "src", cases.DISTILLED, cases.VAE, distilled=True)
    assert run(folder, tmp_path / "dst")[0] == 0
    for path in (folder, tmp_path / "dst"):
        about = run("--inspect", path)[1]
        assert about["sampler"] == "distilled, 4 steps at 1, 0.9375, 0.8333, 0.625"
        assert about["sound_tokenizer"] == "none"


def test_faults_and_notes_are_told_apart(published, run, tmp_path, capsys):
    folder = shutil.copytree(published("heads"), tmp_path / "src")
    kept = load_file(folder / "transformer" / FILE)
    del kept["proj_in.bias"], kept["norm.weight"]
    save_file(kept | {"stray": np.zeros(2, np.float32)}, folder / "transformer" / FILE)
    assert main(["--inspect", str(folder)]) == 2
    out = capsys.readouterr().out
    assert "faults  \n  transformer: missing: proj_in.bias [64]\n  transformer: unexpected: stray [2]\n" in out
    assert "notes  \n  transformer: missing: norm.weight [64] (not needed: of the text tower's output" in out


SOUND_FAULTS = {  # what is done to the tensors of the sound tokenizer, and what is said of it
    "missing": (
        without("decoder.conv1.weight_g"),
        f"missing: decoder.conv1.weight_g {list(DECODER['decoder.conv1.weight_g'])}",
    ),
    "misshapen": (
        lambda arrays: arrays | {"decoder.snake1.alpha": np.zeros((1, 4), np.float32)},
        "misshapen: decoder.snake1.alpha is [1, 4], expected [1, 4, 1]",
    ),
    "another axis": (  # a norm per output, where a transposed convolution has one per input
        lambda arrays: arrays | {"decoder.block.0.conv_t1.weight_g": np.ones((1, 32, 1), np.float32)},
        "misshapen: decoder.block.0.conv_t1.weight_g is [1, 32, 1], expected [64, 1, 1]",
    ),
    "unexpected": (
        lambda arrays: arrays | {"decoder.conv2.bias": np.zeros(2, np.float32)},
        "unexpected: decoder.conv2.bias [2]",
    ),
}


@pytest.mark.parametrize("fault", SOUND_FAULTS)
@pytest.mark.parametrize("layout", ["published", "converted"])
def test_faults_of_a_sound_tokenizer(layout, fault, request, run, tmp_path):
    change, words = SOUND_FAULTS[fault]
    folder = shutil.copytree(request.getfixturevalue(layout)("heads"), tmp_path / "src")
    if layout == "published":
        in_sound_tokenizer(folder, change)
    else:
        rewrite(folder / "weights" / "sound_tokenizer", change)
    code, about, _ = run("--inspect", folder)
    assert (code, about["faults"]) == (2, [f"sound_tokenizer: {words}"])
    assert about["sound_tokenizer"].startswith("full")
    for to in ([], ["--to-safetensors"]):
        code, _, said = run(folder, *to, tmp_path / "dst")
        assert (code, f"1 fault in the tensors\n  sound_tokenizer: {words}\n" in said) == (2, True)
        assert not (tmp_path / "dst").exists()


def test_inspecting_reads_no_weight(published, converted, run, monkeypatch):
    from cosmos3_jax.safetensors_files import Tensor

    folders = published("heads"), converted("heads")
    monkeypatch.setattr(Tensor, "view", lambda self: pytest.fail("a tensor was read"))
    monkeypatch.setattr(array_store, "read", lambda *_: pytest.fail("an array was read"))
    for folder in folders:
        assert run("--inspect", folder)[0] == 0


@pytest.mark.parametrize("tensor", [np.zeros(0, np.float32), np.ones(3, np.int64)], ids=["no values", "integers"])
def test_odd_tensors_of_a_sound_tokenizer(tensor, published, run, tmp_path):
    """Either all of it is kept, or a sentence says why not."""
    folder = shutil.copytree(published("small"), tmp_path / "src")
    in_sound_tokenizer(folder, lambda tensors: tensors | ENCODER | {"encoder.odd": tensor})
    code, _, said = run(folder, tmp_path / "dst")
    if code == 0:
        assert run(tmp_path / "dst", "--to-safetensors", tmp_path / "back")[0] == 0
        assert_equal(tensors(tmp_path / "back"), tensors(folder))
    else:
        assert (code, "encoder.odd" in said) == (2, True)


# Damaged


def remove(pattern: str):
    def damage(folder: Path) -> None:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut(pattern: str):
    return lambda folder: [path.write_bytes(path.read_bytes()[:100]) for path in folder.glob(pattern)]


def write(pattern: str, text: str):
    return lambda folder: [path.write_text(text) for path in folder.glob(pattern)]


def store(name: str, change):
    return lambda folder: rewrite(folder / "weights" / name, change)


DAMAGES = {  # what was done, and what the sentence names
    "no mark": (remove(MARK), ": no diffusion_pytorch_model.safetensors"),
    "mark no JSON": (write(MARK, "{"), f"{MARK}: not JSON"),
    "mark a list": (write(MARK, "[]"), f"{MARK}: a JSON object is expected"),
    "mark bytes": (lambda folder: (folder / MARK).write_bytes(b"\xff"), f"{MARK}: not JSON"),
    "format next": (
        lambda folder: edit_json(folder / MARK, format=FORMAT + 1),
        f"{MARK}: format {FORMAT + 1}, but this version",
    ),
    "format before": (
        lambda folder: edit_json(folder / MARK, format=FORMAT - 1),
        f"{MARK}: format {FORMAT - 1}, but this version reads {FORMAT}; convert it again",
    ),
    "format none": (lambda folder: edit_json(folder / MARK, format=None), f"{MARK}: format None, but"),
    "no weights": (remove("weights"), "weights/und: not an Orbax checkpoint"),
    "no store": (remove("weights/gen"), "weights/gen: not an Orbax checkpoint"),
    "store a file": (
        lambda folder: (remove("weights/gen")(folder), (folder / "weights/gen").touch()),
        "weights/gen: not an Orbax checkpoint",
    ),
    "store empty": (remove("weights/gen/*"), "weights/gen: not an Orbax checkpoint"),
    "no manifest": (remove("weights/gen/state/manifest.ocdbt"), "weights/gen: not an Orbax checkpoint"),
    "manifest cut": (cut("weights/gen/state/manifest.ocdbt"), "weights/gen: not an Orbax checkpoint"),
    "no metadata": (remove("weights/gen/state/_METADATA"), "weights/gen: not an Orbax checkpoint"),
    "metadata no JSON": (write("weights/gen/state/_METADATA", "{"), "weights/gen: not an Orbax checkpoint"),
    "no data": (remove("weights/gen/state/ocdbt*/d"), "weights/gen: not an Orbax checkpoint"),
    "data cut": (cut("weights/gen/state/ocdbt*/d/*"), "weights/gen: not an Orbax checkpoint"),
    "index cut": (cut("weights/gen/state/d/*"), "weights/gen: not an Orbax checkpoint"),
    "array missing": (store("gen", without("vision.b_in")), "gen: missing: vision.b_in [64]"),
    "array unknown": (store("gen", lambda a: a | {"stray": np.ones(3, np.float32)}), "gen: unexpected: stray [3]"),
    "array misshapen": (
        store("gen", changed("vision.b_in", lambda x: x[:-1])),
        "gen: misshapen: vision.b_in is [63], expected [64]",
    ),
    "array of numbers": (
        store("gen", changed("vision.b_in", lambda x: x.astype(np.int32))),
        "gen: odd kind: vision.b_in is int32",
    ),
    "no sound store": (remove("weights/sound_tokenizer"), "weights/sound_tokenizer: not an Orbax checkpoint"),
    "sound missing": (
        store("sound_tokenizer", without("decoder.conv1.bias")),
        "sound_tokenizer: missing: decoder.conv1.bias [64]",
    ),
    "sound of numbers": (
        store("sound_tokenizer", changed("decoder.conv1.weight_g", lambda x: x.astype(np.int32))),
        "sound_tokenizer: odd kind: decoder.conv1.weight_g is int32",
    ),
    "sound config gone": (remove("sound_tokenizer/config.json"), "sound_tokenizer/config.json: missing"),
    "config gone": (remove("transformer/config.json"), "transformer/config.json: missing"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore's futures, never awaited
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_gets_a_sentence(damage, broken, published, run, tmp_path):
    change, words = DAMAGES[damage]
    change(broken)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        weights(broken)
    assert len(str(error.value)) < 600
    assert "NoneType" not in str(error.value)
    code, _, said = run(broken, "--to-safetensors", tmp_path / "dst")
    assert (code, words in said) == (2, True)
    assert not (tmp_path / "dst").exists()


OF_SOUND = [damage for damage in DAMAGES if "sound" in damage]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
@pytest.mark.parametrize("damage", OF_SOUND)
def test_a_damaged_sound_tokenizer_stops_nobody_who_wants_no_sound(damage, broken):
    DAMAGES[damage][0](broken)
    assert "sound" not in Cosmos3Pipeline.from_pretrained(broken, sound=False, progress=False).residence.abstract


@pytest.mark.parametrize("linked", ["weights", "weights/gen"])
def test_weights_that_lie_elsewhere_are_not_followed(linked, broken, converted):
    remove(linked)(broken)
    (broken / linked).symlink_to(converted("small") / linked)
    with pytest.raises(InputError, match="leads out of its folder"):
        weights(broken)


@pytest.mark.parametrize("command", ["--inspect", "--verify", "--to-safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        remove("weights/unused"),
        store("unused", lambda arrays: arrays | {"stray": np.zeros(2, np.float32)}),
        lambda folder: edit_json(folder / MARK, stores=[]),
        lambda folder: edit_json(folder / MARK, stores=[["und"]]),
        lambda folder: edit_json(folder / MARK, stores=None),
        lambda folder: edit_json(folder / MARK, dtype="int3"),
    ],
    ids=["no unused", "unused stray", "no stores", "nested stores", "null stores", "odd dtype"],
)
def test_a_mark_that_does_not_fit_the_folder(damage, command, broken, published, run, tmp_path):
    """What the mark lists and what is there differ: a sentence, and nothing else is blamed for it."""
    damage(broken)
    words = {"--inspect": [command, broken], "--verify": [published("small"), broken, command]}
    code, _, said = run(*words.get(command, [broken, command, tmp_path / "dst"]))
    assert code == 2
    assert "--only" not in said


def test_a_folder_that_goes_away_between_prompts(broken):
    pipe = Cosmos3Pipeline.from_pretrained(broken, text_tower="drop", progress=False)
    shutil.rmtree(broken / "weights")
    with pytest.raises(InputError, match=r"weights/und: not an Orbax checkpoint"):
        pipe(cases.PROMPT, **REQUEST)


# In a process of its own


def test_the_command_line(published, broken, tmp_path):
    def command(*words) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "convert", *map(str, words)],
            cwd=Path(conversion.__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )

    done = command(published("small"), tmp_path / "dst")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["out"] == str(tmp_path / "dst")
    edit_json(broken / MARK, format=FORMAT + 1)
    refused = command(broken, tmp_path / "other")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "error: " in refused.stderr
    assert "Traceback" not in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


# In the reference


@pytest.mark.live
@pytest.mark.parametrize("family", ["small", "wide", "edge"])
def test_diffusers_reads_what_is_exported(family, published, converted, run, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import reference

    assert run(converted(family), "--to-safetensors", tmp_path / "back")[0] == 0
    case = cases.BASE | {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "enable_sound": True}
    original, exported = (reference.run(reference.load(folder), case) for folder in (published(family), tmp_path / "back"))
    assert {"video", "sound"} <= original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(exported[name], value)

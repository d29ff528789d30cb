"""A folder on disk: the same weights however it was written, and every fault in it by name."""

import dataclasses
import fnmatch
import json
import re
import shutil

import huggingface_hub
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from convert.random_checkpoint import write_checkpoint
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.checkpoint import Checkpoint, load, locate
from cosmos3_jax.config import TINY, TINY_FULL_SOUND, TINY_SOUND, TINY_VAE, UNIPC
from cosmos3_jax.errors import InputError
from cosmos3_jax.networks import abstract_networks, abstract_sound_encoder
from cosmos3_jax.published import unused_tensors
from cosmos3_jax.safetensors_files import Tensor
from cosmos3_jax.weights import by_path

CONFIG = dataclasses.replace(TINY, num_hidden_layers=2)
WITH_ACTIONS = dataclasses.replace(CONFIG, action_gen=True, action_dim=6)
SILENT = dataclasses.replace(CONFIG, sound_gen=False, sound_dim=None)
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("pristine"), CONFIG)


@pytest.fixture
def folder(pristine, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(pristine, tmp_path / "checkpoint")


def weights(folder, dtype: str = "float32", *, sound: bool = True) -> dict[str, np.ndarray]:
    """Every weight of the four networks, or of three without `sound`, by network and path."""
    checkpoint = Checkpoint.open(folder, sound=sound)
    networks = abstract_networks(checkpoint.transformer, checkpoint.vae, make_mesh(), dtype, checkpoint.sound).by_name()
    source = checkpoint.audited(networks)
    loaded = {part: load(source, part, network) for part, network in networks.items()}
    return {f"{part} {path}": np.asarray(w) for part, network in loaded.items() for path, w in by_path(network.weights).items()}


@pytest.fixture
def full(tmp_path):
    """A checkpoint to damage, whose sound tokenizer has an encoder."""
    return write_checkpoint(tmp_path / "full", CONFIG, sound=TINY_FULL_SOUND)


def encoder_weights(folder, *, with_decoder: bool = False) -> dict[str, np.ndarray]:
    """Every weight of the sound encoder by its path, audited alone or with the decoder."""
    checkpoint = Checkpoint.open(folder, sound_encoder=True)
    networks = {"sound_encoder": abstract_sound_encoder(checkpoint.sound.encoder, make_mesh())}
    if with_decoder:
        sound = abstract_networks(checkpoint.transformer, checkpoint.vae, make_mesh(), "float32", checkpoint.sound).sound
        networks["sound"] = sound
    encoder = load(checkpoint.audited(networks), "sound_encoder", networks["sound_encoder"])
    return {path: np.asarray(w) for path, w in by_path(encoder.weights).items()}


def edit(folder, part: str, change) -> None:
    """Rewrites the tensors of a part: `change` takes and returns them by name."""
    save_file(change(load_file(folder / part / FILE)), folder / part / FILE)


def edit_json(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# What is loaded


def test_shards_are_one_file(pristine, tmp_path):
    sharded = write_checkpoint(tmp_path, CONFIG, shards=3)
    assert len(list((sharded / "transformer").glob("*.safetensors"))) == 3
    assert_equal(weights(sharded), weights(pristine))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bfloat16_is_float32_rounded(pristine, folder, stored):
    """Whether the file is rounded, or what is read from it; the timestep embedder and the sound decoder stay float32."""
    for part in ("transformer", "vae"):
        edit(folder, part, lambda tensors: {name: tensor.astype(stored) for name, tensor in tensors.items()})
    expected = weights(pristine)
    found = weights(folder, "bfloat16")
    for name, value in found.items():
        float32, is_sound = "timestep_embedding" in name, name.startswith("sound ")
        assert value.dtype == (jnp.float32 if float32 or is_sound else jnp.bfloat16)
        if not is_sound and (stored == "bfloat16" or not float32):
            expected[name] = expected[name].astype(ml_dtypes.bfloat16)
    assert_equal(found, expected)


def test_every_tensor_becomes_one_weight(folder):
    """Tensors that are constant, each another number: a layer of a weight is one of them, and none is lost or doubled."""

    def number(tensors):
        return {name: np.full_like(tensor, i) for i, (name, tensor) in enumerate(tensors.items())}

    for part in ("transformer", "vae"):
        edit(folder, part, number)
    used = {part: load_file(folder / part / FILE) for part in ("transformer", "vae")}
    for name in unused_tensors(CONFIG):
        used["transformer"].pop(name, None)
    found = {"transformer": [], "vae": []}
    for name, value in weights(folder, sound=False).items():
        rows = [*value] if " layers." in name else [value]
        assert all(np.ptp(row) == 0 for row in rows), name
        found["vae" if name.startswith("vae") else "transformer"] += [row.flat[0] for row in rows]
    assert {part: sorted(values) for part, values in found.items()} == {
        part: sorted(tensor.flat[0] for tensor in tensors.values()) for part, tensors in used.items()
    }


def test_convolutions_are_turned(pristine):
    """Stored [out, in, time, height, width], used as [time, height, width, in, out]."""
    stored = load_file(pristine / "vae" / FILE)["encoder.conv_in.weight"]
    used = weights(pristine)["vae encoder.conv_in.weight"]
    np.testing.assert_array_equal(used, stored.transpose(2, 3, 4, 1, 0))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_weight_norm_is_folded(folder, stored):
    """What is stored as directions and lengths, [out, in, samples], is used as one weight, [samples, in, out].

    Lengths are of the first axis, which is the inputs' of a transposed convolution.
    """
    edit(folder, "sound_tokenizer", lambda tensors: {name: tensor.astype(stored) for name, tensor in tensors.items()})
    found = load_file(folder / "sound_tokenizer" / FILE)
    checked = 0
    for name, used in weights(folder).items():
        if name.startswith("sound ") and name.endswith(".weight"):
            v, g = (found[f"decoder.{name.removeprefix('sound ')}_{part}"].astype(np.float64) for part in "vg")
            expected = v * g / np.sqrt((v**2).sum(axis=(1, 2), keepdims=True))
            np.testing.assert_allclose(used, expected.transpose(2, 1, 0), rtol=1e-6)  # float32 rounding
            checked += 1
    assert checked == 2 + 5 * 7  # first and last; of each block its upsampling and two of each residual unit


def test_every_other_tensor_of_the_sound_decoder_becomes_one_weight(folder):
    def number(tensors):
        return {
            name: tensor if "weight_" in name else np.full_like(tensor, i) for i, (name, tensor) in enumerate(tensors.items())
        }

    edit(folder, "sound_tokenizer", number)
    stored = {f"sound {name.removeprefix('decoder.')}": x for name, x in load_file(folder / "sound_tokenizer" / FILE).items()}
    found = weights(folder)
    others = {name for name in stored if "weight_" not in name}
    assert others == {name for name in found if name.startswith("sound ") and not name.endswith("weight")}
    for name in others:
        np.testing.assert_array_equal(found[name], stored[name].reshape(-1), err_msg=name)


def test_action_tensors_are_passed_over(tmp_path):
    folder = write_checkpoint(tmp_path, WITH_ACTIONS)
    published = load_file(folder / "transformer" / FILE)
    assert len({name for name in published if "action" in name}) == 5
    loaded = weights(folder)
    edit(folder, "transformer", lambda tensors: {name: tensors[name] for name in tensors.keys() - unused_tensors(WITH_ACTIONS)})
    assert_equal(weights(folder), loaded)


def test_sound_heads_are_passed_over_where_they_are_not_asked_for(folder):
    heads = {name for name in load_file(folder / "transformer" / FILE) if "audio" in name}
    assert len(heads) == 5
    loaded = {name: value for name, value in weights(folder, sound=False).items() if not name.startswith("gen sound.")}
    edit_json(folder / "transformer" / "config.json", sound_gen=False, sound_dim=None)
    assert_equal(weights(folder, sound=False), loaded)
    edit(folder, "transformer", lambda tensors: {name: tensors[name] for name in tensors.keys() - heads})
    assert_equal(weights(folder, sound=False), loaded)


def test_the_sound_tokenizers_encoder_is_passed_over(folder):
    loaded = weights(folder)
    more = {"encoder.layers.0.weight_v": np.ones((3, 4, 1), np.float32), "encoder.out.bias": np.full(5, np.nan, np.float32)}
    edit(folder, "sound_tokenizer", lambda tensors: tensors | more)
    assert_equal(weights(folder), loaded)


# The sound encoder


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_the_sound_encoder_is_read(full, stored):
    """Of its convolutions, those between the blocks are stored as directions and lengths, the blocks' own are not."""
    edit(full, "sound_tokenizer", lambda tensors: {name: tensor.astype(stored) for name, tensor in tensors.items()})
    found, used = load_file(full / "sound_tokenizer" / FILE), encoder_weights(full, with_decoder=True)
    normed = 0
    for path, value in used.items():
        name = f"encoder.{path}".replace("dwconv", "dwconv.1")
        if name in found:
            expected = found[name].astype(np.float64)
        else:
            v, g = (found[f"{name}_{part}"].astype(np.float64) for part in "vg")
            expected, normed = v * g / np.sqrt((v**2).sum(axis=(1, 2), keepdims=True)), normed + 1
        if path.endswith((".alpha", ".beta")):
            expected = expected.reshape(-1)
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected.T.reshape(value.shape), rtol=1e-6, err_msg=path)  # float32 rounding
    assert normed == 5  # both ends, and a stride after each pair of blocks
    assert len(used) + normed == len([name for name in found if name.startswith("encoder.")])


def test_to_read_the_sound_encoder_no_decoder_is_needed(full):
    expected = encoder_weights(full)
    edit(full, "sound_tokenizer", lambda tensors: {name: x for name, x in tensors.items() if name.startswith("encoder.")})
    assert_equal(encoder_weights(full), expected)
    with pytest.raises(InputError, match=r"faults in the tensors\n  sound_tokenizer: missing: decoder\.block\.0"):
        encoder_weights(full, with_decoder=True)


def test_a_checkpoint_with_a_sound_encoder_generates_as_one_without(full, pristine):
    assert Checkpoint.open(full, sound=True).sound == TINY_SOUND
    assert_equal(weights(full), weights(pristine))


def test_faults_of_the_sound_encoder_are_told_at_once(full):
    def damage(tensors):
        tensors["encoder.stray"] = np.zeros((2, 3), np.float32)
        tensors["encoder.layers.3.weight_g"] = tensors["encoder.layers.3.weight_g"][:-1]
        del tensors["encoder.layers.1.norm.weight"]
        return tensors

    edit(full, "sound_tokenizer", damage)
    with pytest.raises(InputError) as caught:
        encoder_weights(full)
    assert str(caught.value).splitlines() == [
        f"{full}: 3 faults in the tensors",
        "  sound_tokenizer: missing: encoder.layers.1.norm.weight [6]",
        "  sound_tokenizer: unexpected: encoder.stray [2, 3]",
        "  sound_tokenizer: misshapen: encoder.layers.3.weight_g is [11, 1, 1], expected [12, 1, 1]",
    ]


def test_a_sound_tokenizer_without_an_encoder_says_so(full, pristine, tmp_path):
    """By its config or by its tensors; published ones leave it to their tensors."""
    rest = "no sound can be learned from; leave sound out$"
    with pytest.raises(InputError, match=f"^sound_tokenizer/config.json: encoder_enabled=False, so {rest}"):
        encoder_weights(pristine)
    edit(full, "sound_tokenizer", lambda tensors: {name: x for name, x in tensors.items() if name.startswith("decoder.")})
    for with_decoder in (False, True):
        with pytest.raises(InputError, match=f"^{full}: its sound tokenizer has no encoder, so {rest}"):
            encoder_weights(full, with_decoder=with_decoder)
    weights(full)
    silent = write_checkpoint(tmp_path / "silent", SILENT)
    with pytest.raises(InputError, match=f"^{silent}: there is no sound tokenizer, so {rest}"):
        encoder_weights(silent)


# What the folder says of itself


def test_the_configs_are_read_back(pristine):
    checkpoint = Checkpoint.open(str(pristine))
    assert (checkpoint.folder, checkpoint.transformer, checkpoint.vae) == (pristine, CONFIG, TINY_VAE)
    assert checkpoint.configs == (CONFIG, TINY_VAE, UNIPC, None)


def test_the_sound_tokenizer_is_read_if_asked_for(pristine):
    assert Checkpoint.open(pristine, sound=True).sound == TINY_SOUND
    assert Checkpoint.open(pristine, sound=True).configs == (CONFIG, TINY_VAE, UNIPC, TINY_SOUND)
    assert Checkpoint.open(pristine, sound=False).sound is None


def test_a_checkpoint_may_have_no_sound_tokenizer(folder, tmp_path):
    shutil.rmtree(folder / "sound_tokenizer")
    silent = write_checkpoint(tmp_path / "silent", SILENT)
    assert not (silent / "sound_tokenizer").exists()
    for each in (folder, silent):
        assert Checkpoint.open(each, sound=True).sound is None
        assert_equal(weights(each, sound=True), weights(each, sound=False))


@pytest.mark.parametrize("size", [4, 16])
def test_heads_and_tokenizer_have_one_kind_of_latent(folder, size):
    config = folder / "sound_tokenizer" / "config.json"
    edit_json(config, vocoder_input_dim=size)
    expected = f"{folder}: the transformer's sound_dim=8 is not the sound tokenizer's vocoder_input_dim={size}"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        Checkpoint.open(folder, sound=True)
    Checkpoint.open(folder, sound=False)
    edit_json(folder / "transformer" / "config.json", sound_gen=False, sound_dim=None)
    assert Checkpoint.open(folder, sound=True).sound.vocoder_input_dim == size  # there are no heads to fit to


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "autoencoder_v1"), ("snake_logscale", False), ("dec_strides", [2, 4]), ("hop_size", 1.5)]
)
def test_another_sound_tokenizer_is_refused_if_asked_for(folder, key, value):
    edit_json(folder / "sound_tokenizer" / "config.json", **{key: value})
    with pytest.raises(InputError, match=rf"^sound_tokenizer/config.json: .*{key}="):
        Checkpoint.open(folder, sound=True)
    assert Checkpoint.open(folder, sound=False).sound is None


def test_the_name_of_the_first_releases_is_accepted(folder):
    edit_json(folder / "model_index.json", _class_name="Cosmos3OmniDiffusersPipeline")
    Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["WanPipeline", None])
def test_another_pipeline_is_refused(folder, name):
    edit_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(InputError, match=rf"^{folder}: model_index.json is of {name!r}; expected 'Cosmos3OmniPipeline'$"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("asked", [True, False])
def test_the_system_prompt_is_the_checkpoints_choice(folder, asked):
    edit_json(folder / "model_index.json", default_use_system_prompt=asked)
    assert Checkpoint.open(folder).use_system_prompt == asked


def test_the_negative_prompt_is_the_checkpoints_json(folder):
    assert Checkpoint.open(folder).negative_prompt == ""
    (folder / "assets").mkdir()
    (folder / "assets" / "negative_prompt.json").write_text('{\n  "style": ["blurry",\n "café"]}', encoding="utf-8")
    assert Checkpoint.open(folder).negative_prompt == '{"style": ["blurry", "caf\\u00e9"]}'


# What is wrong with it

NEEDED = [
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "sound_tokenizer/config.json",
    f"transformer/{FILE}",
    f"vae/{FILE}",
    f"sound_tokenizer/{FILE}",
]
JSON = [name for name in NEEDED if name.endswith(".json")] + ["assets/negative_prompt.json", f"transformer/{FILE}.index.json"]


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    part, _, file = name.rpartition("/")
    with pytest.raises(InputError, match=rf"^{folder / part}(/|: no ){file}\b"):
        weights(folder)


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"], ids=["empty", "cut", "list", "bytes"])
def test_a_file_that_is_no_json_object(folder, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=rf"^{folder / name}: (not JSON|a JSON object is expected)"):
        weights(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {"proj_in.weight": 3}}], ids=str)
def test_an_index_without_files(folder, index):
    path = folder / "transformer" / f"{FILE}.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"^{path}: "):
        weights(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "sound_tokenizer"])
@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "4 bytes", "header cut", "last byte gone"])
def test_a_damaged_file(folder, part, keep):
    path = folder / part / FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"^{path}: not a safetensors file that can be read"):
        weights(folder)


def test_a_missing_shard(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG, shards=3)
    gone = folder / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    gone.unlink()
    with pytest.raises(InputError, match=rf"^{gone}: missing; is the checkpoint complete"):
        weights(folder)


def test_all_faults_at_once_before_anything_is_read(folder, monkeypatch):
    def damage(missing: str, misshapen: str):
        def change(tensors):
            tensors["stray"] = np.zeros((2, 3), np.float32)
            tensors[misshapen] = tensors[misshapen][:-1].copy()
            return {name: tensor for name, tensor in tensors.items() if name != missing}

        return change

    edit(folder, "transformer", damage(missing="layers.1.self_attn.to_k.weight", misshapen="proj_out.bias"))
    edit(folder, "vae", damage(missing="decoder.conv_in.bias", misshapen="encoder.conv_in.weight"))
    edit(folder, "sound_tokenizer", damage(missing="decoder.conv1.weight_g", misshapen="decoder.block.2.conv_t1.weight_g"))
    monkeypatch.setattr(Tensor, "view", lambda self: pytest.fail("a tensor was read"))
    with pytest.raises(InputError) as error:
        weights(folder)
    assert str(error.value).splitlines() == [
        f"{folder}: 9 faults in the tensors",
        "  sound_tokenizer: missing: decoder.conv1.weight_g [64, 1, 1]",
        "  sound_tokenizer: unexpected: stray [2, 3]",
        "  sound_tokenizer: misshapen: decoder.block.2.conv_t1.weight_g is [15, 1, 1], expected [16, 1, 1]",
        "  transformer: missing: layers.1.self_attn.to_k.weight [128, 64]",
        "  transformer: unexpected: stray [2, 3]",
        "  transformer: misshapen: proj_out.bias is [63], expected [64]",
        "  vae: missing: decoder.conv_in.bias [48]",
        "  vae: unexpected: stray [2, 3]",
        "  vae: misshapen: encoder.conv_in.weight is [7, 12, 3, 3, 3], expected [8, 12, 3, 3, 3]",
    ]


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "4 bytes", "header cut", "last byte gone"])
def test_a_damaged_sound_tokenizer_is_not_seen_without_sound(folder, keep):
    loaded, path = weights(folder, sound=False), folder / "sound_tokenizer" / FILE
    path.write_bytes(path.read_bytes()[:keep])
    (folder / "sound_tokenizer" / "config.json").unlink()
    assert_equal(weights(folder, sound=False), loaded)


def test_tensors_that_are_no_floats_are_named(folder):
    edit(folder, "sound_tokenizer", lambda tensors: tensors | {"decoder.conv1.bias": np.ones(64, np.int8)})
    with pytest.raises(InputError, match=r"sound_tokenizer: odd kind: decoder.conv1.bias is I8, expected F32, F16, BF16"):
        weights(folder)
    edit(folder, "vae", lambda tensors: tensors | {"decoder.conv_in.bias": np.ones(48, np.int8)})
    with pytest.raises(InputError, match=r"vae: odd kind: decoder.conv_in.bias is I8, expected F32, F16, BF16"):
        weights(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG, shards=2)
    first, second = sorted((folder / "transformer").glob("*.safetensors"))
    save_file(load_file(second) | {"proj_in.bias": np.zeros(64, np.float32)}, second)
    save_file(load_file(first) | {"proj_in.bias": np.zeros(64, np.float32)}, first)
    with pytest.raises(
        InputError, match=r"transformer: twice: proj_in\.bias is also in diffusion_pytorch_model-00002-of-00002\.safetensors"
    ):
        weights(folder)


# Where it is


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked Hugging Face"))


@pytest.mark.usefixtures("offline")
def test_paths_to_a_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in (folder, str(folder), ".", "../checkpoint", f"../{folder.name}/", "~/checkpoint"):
        assert locate(path).resolve() == folder


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", ["no", "./no", "../no", "/no/such/folder", "~/no", "a/b/c", "text.txt"])
def test_paths_to_nothing(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").touch()
    with pytest.raises(InputError, match=f"^{re.escape(path)}: there is no such folder$"):
        locate(path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", [".", "sub"])
def test_a_folder_that_is_no_checkpoint(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(InputError, match=f"^{re.escape(path)}: no model_index.json there; a checkpoint folder"):
        locate(path)


@pytest.mark.parametrize("error", [OSError("no route"), LocalEntryNotFoundError("offline")], ids=repr)
def test_a_repository_that_cannot_be_reached(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=rf"^nvidia/Cosmos3-Nano: neither a folder here nor .*\({error}\); .*`hf download"):
        locate("nvidia/Cosmos3-Nano")


@pytest.mark.parametrize("sound", [False, True], ids=["silent", "with_sound"])
def test_a_repository_is_downloaded_without_what_is_not_needed(folder, monkeypatch, sound):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.update({repo: options}) or str(folder)
    )
    assert Checkpoint.open("nvidia/Cosmos3-Nano", sound=sound).folder == folder
    patterns = asked["nvidia/Cosmos3-Nano"]["allow_patterns"]
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    of_sound = [name for name in files if name.startswith("sound_tokenizer/")]
    assert len(of_sound) == 2
    assert len(files) > 8
    elsewhere = ["README.md", "vision_encoder/model.safetensors", "assets/demo.mp4"]
    for name in [*files, "assets/negative_prompt.json", *elsewhere]:
        wanted = name not in elsewhere and (sound or name not in of_sound)
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns) == wanted, name

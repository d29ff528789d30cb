"""The published tensors, name by name: each is read in exactly its shape, or listed unused with a reason."""

import json
import math
from pathlib import Path

import pytest

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.config import NANO, PRESETS, TINY_VAE, WAN_VAE, SoundConfig
from cosmos3_jax.networks import abstract_networks, abstract_sound_encoder
from cosmos3_jax.published import file_shapes, names_of, unused_of_sound, unused_tensors
from cosmos3_jax.weights import audit, by_path

DATA = Path(__file__).parent / "data"
SOUND_TOKENIZERS = ("sound_tokenizer_full", "sound_tokenizer_decoder_only")


def published(name: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, (shape, _) in json.loads((DATA / "tensors" / f"{name}.json").read_text()).items()}


@pytest.fixture(scope="module", params=["nano", "super", "edge"])
def model(request):
    """(config, published shapes, [(network, the names of its weights in the file) of each tower])."""
    config = PRESETS[request.param]
    parts = abstract_networks(config, TINY_VAE, make_mesh(), "bfloat16").by_name()
    towers = [(parts[part], names_of(part, parts[part], config)) for part in ("und", "gen")]
    return config, published(f"transformer_{request.param}"), towers


@pytest.fixture(scope="module")
def vae():
    """(network, the names of its weights in the file)."""
    network = abstract_networks(NANO, WAN_VAE, make_mesh(), "bfloat16").vae
    return network, names_of("vae", network, NANO)


@pytest.fixture(scope="module")
def sound():
    """(network of the published config, the names of its weights in the file)."""
    config = SoundConfig.from_json(json.loads((DATA / "configs" / "nano_sound_tokenizer_config.json").read_text()))
    network = abstract_networks(NANO, TINY_VAE, make_mesh(), "bfloat16", config).by_name()["sound"]
    return network, names_of("sound", network, NANO)


@pytest.fixture(scope="module")
def encoder():
    """(sound encoder of the published config, the names of its weights in the file)."""
    json_ = json.loads((DATA / "configs" / "nano_sound_tokenizer_config.json").read_text())
    network = abstract_sound_encoder(SoundConfig.from_json(json_, encoder=True).encoder, make_mesh())
    return network, names_of("sound_encoder", network, NANO)


def test_every_tensor_of_the_transformer_is_read_or_has_a_reason(model):
    config, found, towers = model
    expected = file_shapes(*towers[0]) | file_shapes(*towers[1])
    unused = unused_tensors(config)
    assert audit(expected, found, unused) == []
    assert not expected.keys() & unused.keys()
    assert all(unused.values())


def test_every_tensor_of_the_vae_is_read(vae):
    assert audit(file_shapes(*vae), published("vae"), unused=()) == []


@pytest.mark.parametrize("name", SOUND_TOKENIZERS)
def test_every_tensor_of_the_sound_tokenizer_is_read_or_is_the_encoders(name, sound):
    found, expected = published(name), file_shapes(*sound)
    unused = unused_of_sound(found, ["sound"])
    assert audit(expected, found, unused) == []
    assert expected.keys() | set(unused) == found.keys()
    assert not expected.keys() & set(unused)
    assert bool(unused) == (name == "sound_tokenizer_full")


def test_every_tensor_of_the_sound_encoder_is_read(sound, encoder):
    found, expected = published("sound_tokenizer_full"), file_shapes(*encoder)
    assert audit(expected, found, unused_of_sound(found, ["sound_encoder"])) == []
    assert audit(file_shapes(*sound) | expected, found, unused_of_sound(found, ["sound", "sound_encoder"])) == []
    assert unused_of_sound(found, ["sound", "sound_encoder"]) == []
    assert not file_shapes(*sound).keys() & expected.keys()


def test_a_tensor_that_the_sound_encoder_lacks_is_told(encoder):
    found, expected = published("sound_tokenizer_full"), file_shapes(*encoder)
    unused = unused_of_sound(found, ["sound_encoder"])
    for tensor, shape in expected.items():
        assert audit(expected, {k: v for k, v in found.items() if k != tensor}, unused) == [f"missing: {tensor} {list(shape)}"]
        assert len(audit(expected, found | {tensor: (*shape[:-1], shape[-1] + 1)}, unused)) == 1
    stray = found | {"encoder.layers.11.weight": (3, 2)}
    assert audit(expected, stray, unused_of_sound(stray, ["sound_encoder"])) == ["unexpected: encoder.layers.11.weight [3, 2]"]


@pytest.mark.parametrize("name", SOUND_TOKENIZERS)
def test_a_tensor_that_the_sound_decoder_lacks_is_told(name, sound):
    found, expected = published(name), file_shapes(*sound)
    for tensor, shape in expected.items():
        assert audit(expected, {k: v for k, v in found.items() if k != tensor}, unused_of_sound(found, ["sound"])) == [
            f"missing: {tensor} {list(shape)}"
        ]
        longer = (shape[0] + 1, *shape[1:])
        assert audit(expected, found | {tensor: longer}, unused_of_sound(found, ["sound"])) == [
            f"misshapen: {tensor} is {list(longer)}, expected {list(shape)}"
        ]
    stray = found | {"decoder.block.5.snake1.alpha": (1, 320, 1)}
    assert audit(expected, stray, unused_of_sound(stray, ["sound"])) == ["unexpected: decoder.block.5.snake1.alpha [1, 320, 1]"]


def test_every_convolution_of_the_sound_decoder_has_a_direction_and_a_length(sound):
    network, names = sound
    for path, w in by_path(network.weights).items():
        norms = [name.rsplit("_", 1)[-1] for name in names[path]]
        assert norms == ["v", "g"] if len(w.file_shape) == 3 and w.file_shape[0] > 1 else len(norms) == 1
    magnitudes = {name: shape for name, shape in file_shapes(*sound).items() if name.endswith("_g")}
    assert magnitudes == {
        name: shape for name, shape in published("sound_tokenizer_decoder_only").items() if name in magnitudes
    }
    assert len(magnitudes) == 2 + 5 * 7  # first and last; of each block its upsampling and two of each residual unit


def test_no_tensor_is_read_twice(model, vae, sound, encoder):
    for towers in (model[2], [vae], [sound, encoder]):
        names = [name for _, table in towers for names in table.values() for name in names]
        assert len(names) == len(set(names))


def test_a_weight_holds_as_many_numbers_as_its_tensors(model, vae, sound, encoder):
    for network, names in [*model[2], vae, sound, encoder]:
        for path, w in by_path(network.weights).items():
            tensors = [name for name in names[path] if not name.endswith("_g")]  # the others are multiplied with these
            assert math.prod(w.shape) == len(tensors) * math.prod(w.file_shape), path


def test_layers_are_in_the_order_of_the_file(model):
    _, _, (_, (_, names)) = model
    assert names["layers.q"] == [f"layers.{i}.self_attn.add_q_proj.weight" for i in range(len(names["layers.q"]))]


def test_the_last_text_layer_gives_keys_and_values_alone(model):
    config, _, ((_, names), _) = model
    last = [name for read in names.values() for name in read if name.startswith(f"layers.{config.num_hidden_layers - 1}.")]
    assert {name.split(".")[-2] for name in last} <= {"input_layernorm", "to_k", "to_v", "norm_k", "k_norm_und_for_gen"}


def test_no_name_is_listed_unused_for_nothing():
    # Nano has every head and every kind of tensor but Edge's one norm.
    assert unused_tensors(NANO).keys() <= published("transformer_nano").keys()

"""The published tensors, name by name: each is read in exactly its shape, or listed unused with a reason."""

import json
import math
from pathlib import Path

import pytest

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.config import NANO, PRESETS, TINY_VAE, WAN_VAE
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.published import file_shapes, names_of, unused_tensors
from cosmos3_jax.weights import audit, by_path

FOLDER = Path(__file__).parent / "data" / "tensors"


def published(name: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, (shape, _) in json.loads((FOLDER / f"{name}.json").read_text()).items()}


@pytest.fixture(scope="module", params=["nano", "super", "edge"])
def model(request):
    """(config, published shapes, [(network, the names of its weights in the file) of each tower])."""
    config = PRESETS[request.param]
    und, gen, _ = abstract_networks(config, TINY_VAE, make_mesh(), "bfloat16")
    towers = [(network, names_of(part, network, config)) for part, network in (("und", und), ("gen", gen))]
    return config, published(f"transformer_{request.param}"), towers


@pytest.fixture(scope="module")
def vae():
    """(network, the names of its weights in the file)."""
    network = abstract_networks(NANO, WAN_VAE, make_mesh(), "bfloat16").vae
    return network, names_of("vae", network, NANO)


def test_every_tensor_of_the_transformer_is_read_or_has_a_reason(model):
    config, found, towers = model
    expected = file_shapes(*towers[0]) | file_shapes(*towers[1])
    unused = unused_tensors(config)
    assert audit(expected, found, unused) == []
    assert not expected.keys() & unused.keys()
    assert all(unused.values())


def test_every_tensor_of_the_vae_is_read(vae):
    assert audit(file_shapes(*vae), published("vae"), unused=()) == []


def test_no_tensor_is_read_twice(model, vae):
    for towers in (model[2], [vae]):
        names = [name for _, table in towers for names in table.values() for name in names]
        assert len(names) == len(set(names))


def test_a_weight_holds_as_many_numbers_as_its_tensors(model, vae):
    for network, names in [*model[2], vae]:
        for path, w in by_path(network.weights).items():
            assert math.prod(w.shape) == len(names[path]) * math.prod(w.file_shape), path


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

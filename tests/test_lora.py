"""Adapters: which weights have them, that they add what they should wherever they are computed, and can be trained."""

import dataclasses
import functools
import re
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metrics import drawn, errors, random

from cosmos3_jax import InputError, lora, make_mesh, models, positions
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.latents import Latents
from cosmos3_jax.lora import Adapted, Adapter, abstract_adapters, adapted, merged, modules, random_adapters
from cosmos3_jax.models.layers import Rotary
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.pipeline import prefill, velocity
from cosmos3_jax.quantization import Quantized, quantize, quantized
from cosmos3_jax.weights import Network, by_path, product_of_value

SOURCES = [file.read_text() for file in Path(models.__path__[0]).glob("*.py")]
PRODUCTS = sorted({letters for source in SOURCES for letters in re.findall(r'product\(\s*"(.+?)"', source)})
SIZES = {"B": 2, "G": 7, "Q": 7, "S": 7, "D": 96, "N": 8, "K": 8, "H": 16, "F": 160, "R": 3}
MESHES = [(1, 1), (2, 4)]
ALL = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_q", "to_k", "to_v", "to_out", "up_proj", "down_proj")


def networks(family: str = "wide", cfg: int = 1, tp: int = 1, dtype: str = "float32") -> dict[str, Network]:
    """Both towers, abstract."""
    parts = abstract_networks(cases.FAMILIES[family], cases.VAE, make_mesh(cfg, tp), dtype).by_name()
    return {part: parts[part] for part in ("und", "gen")}


def trained(abstract: dict, seed: int = 0) -> dict:
    """Random values for a and b both, the same on every mesh."""

    def draw(path, shape):
        x = random(*shape.shape, seed=seed + sum(map(ord, jax.tree_util.keystr(path)))) * 0.05
        return jax.device_put(x, shape.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def change(adapter: Adapter) -> np.ndarray:
    """What it adds to its weight, in float64."""
    a, b = (np.asarray(x, np.float64) for x in (adapter.a, adapter.b))
    count = len(adapter.inputs)
    rows = a.shape[-count:]
    flat = np.matmul(b.reshape(*a.shape[: -count - 1], -1, adapter.rank), a.reshape(*a.shape[:-count], -1))
    return adapter.scale * flat.reshape(*b.shape[:-1], *rows)


class Request:
    """One prompt of each branch and some latents, through both towers on a mesh."""

    def __init__(self, config: TransformerConfig, cfg: int = 1, tp: int = 1):
        self.mesh, self.shape = make_mesh(cfg, tp), (2, 4, 6)
        self.length_B, self.ids_BS = np.array([9, 4], np.int32), np.arange(32, dtype=np.int32).reshape(2, 16)
        both = positions.layout(config, self.length_B, 16, self.shape, 24.0)
        self.text, self.generated = (Rotary(*each) for each in both)
        self.x = Latents(random(*self.shape, config.latent_channel))

    def velocity(self, parts: dict[str, Network]) -> jax.Array:
        """Traceable."""
        prefix = prefill(parts["und"], self.ids_BS, self.length_B, self.text)
        return velocity((parts["gen"], self.generated, prefix), self.x, np.float32(700), np.zeros(2, bool)).video

    def __call__(self, parts: dict[str, Network]) -> np.ndarray:
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(self.velocity)(parts))


# Which weights


def expected_modules(family: str) -> dict[str, dict[str, list[str]]]:
    """What diffusers calls the projections, of every layer."""
    config = cases.FAMILIES[family]
    layers, gate = range(config.num_hidden_layers), ["gate"] if config.hidden_act == "silu" else []
    gen = {"q": "self_attn.add_q_proj", "k": "self_attn.add_k_proj", "v": "self_attn.add_v_proj", "o": "self_attn.to_add_out"}
    gen |= {f"mlp.{name}": f"mlp_moe_gen.{name}_proj" for name in (*gate, "up", "down")}
    und = {"q": "self_attn.to_q", "keys_values.k": "self_attn.to_k", "keys_values.v": "self_attn.to_v", "o": "self_attn.to_out"}
    und |= {f"mlp.{name}": f"mlp.{name}_proj" for name in (*gate, "up", "down")}
    last = {f"last.{name}": [f"layers.{layers[-1]}.self_attn.to_{name}"] for name in ("k", "v")}
    return {
        "und": {f"layers.{path}": [f"layers.{i}.{name}" for i in layers[:-1]] for path, name in und.items()} | last,
        "gen": {f"layers.{path}": [f"layers.{i}.{name}" for i in layers] for path, name in gen.items()},
    }


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_the_projections_of_the_layers_can_have_adapters(family):
    found = {part: modules(part, network, cases.FAMILIES[family]) for part, network in networks(family).items()}
    assert found == expected_modules(family)


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (2, 2)])
def test_shapes_and_places_are_those_of_the_weight(family, cfg, tp):
    """With R for what is on the other side, which is never divided."""
    parts = networks(family, cfg, tp)
    for part, found in abstract_adapters(parts, cases.FAMILIES[family], 3, 6, ALL).items():
        weights = by_path(parts[part].weights)
        for path, adapter in found.items():
            w, count = weights[path], len(adapter.inputs)
            spec = w.get_value().sharding.spec
            stacked = w.shape[: len(w.shape) - len(w.dims)]
            assert adapter.a.shape == (*stacked, 3, *w.shape[-count:])
            assert adapter.b.shape == (*w.shape[:-count], 3)
            assert np.prod(w.shape[-count:]) == w.file_shape[-1]
            assert tuple(adapter.a.sharding.spec) == (*[None] * (len(stacked) + 1), *spec[-count:])
            assert tuple(adapter.b.sharding.spec) == (*spec[:-count], None)
            assert (adapter.scale, adapter.rank, adapter.a.dtype, adapter.b.dtype) == (2.0, 3, jnp.float32, jnp.float32)


CHOSEN = {
    ("add_q_proj",): {("gen", "layers.q")},
    ("self_attn.add_q_proj", "to_add_out"): {("gen", "layers.q"), ("gen", "layers.o")},
    ("to_out",): {("und", "layers.o")},
    ("to_k",): {("und", "layers.keys_values.k"), ("und", "last.k")},
    ("layers.4.self_attn.to_k",): {("und", "last.k")},
    ("mlp_moe_gen.up_proj",): {("gen", "layers.mlp.up")},
    ("up_proj",): {("gen", "layers.mlp.up"), ("und", "layers.mlp.up")},
    lora.TARGETS: {("gen", f"layers.{name}") for name in "qkvo"},
}


@pytest.mark.parametrize("targets", CHOSEN, ids=str)
def test_targets_are_names_or_their_ends(targets):
    found = abstract_adapters(networks(), cases.FAMILIES["wide"], 3, 6, targets)
    assert {(part, path) for part, adapters in found.items() for path in adapters} == CHOSEN[targets]
    assert found.keys() == {part for part, _ in CHOSEN[targets]}


WRONG = [
    ({"rank": 0}, "rank=0: a whole number of at least 1 is expected"),
    ({"rank": 1.5}, "rank=1.5: a whole number of at least 1 is expected"),
    ({"rank": True}, "rank=True: a whole number of at least 1 is expected"),
    ({"alpha": float("nan")}, "alpha=nan: a number from -1000000 to 1000000 is expected"),
    ({"alpha": 10**400}, "alpha=1000.*: a number from -1000000 to 1000000 is expected"),
    ({"alpha": "8"}, "alpha='8': a number from -1000000 to 1000000 is expected"),
    ({"targets": "to_q"}, r"targets='to_q': a list of modules is expected, such as \['add_q_proj', .*\]"),
    ({"targets": ()}, r"targets=\(\): a list of modules is expected, .*"),
    *(
        (
            {"targets": ("to_q", name)},
            rf"targets: '{name}' is no projection in all layers of a tower; there are .*, self_attn.to_v",
        )
        for name in ("q_proj", "o_q", "proj_in", "layers.0.self_attn.to_q", "layers", "norm", "linear_1", "lm_head", "")
    ),
]


@pytest.mark.parametrize(("asked", "sentence"), WRONG, ids=str)
def test_what_cannot_be_is_refused(asked, sentence):
    with pytest.raises(InputError) as error:
        abstract_adapters(networks(), cases.FAMILIES["wide"], **{"rank": 4, "alpha": 8} | asked)
    assert re.fullmatch(sentence, str(error.value))


def test_edge_has_no_gates():
    with pytest.raises(InputError, match="'gate_proj' is no projection"):
        abstract_adapters(networks("edge"), cases.FAMILIES["edge"], 4, 8, ("gate_proj",))


def test_a_text_tower_of_one_layer_has_but_keys_and_values():
    config = dataclasses.replace(cases.FAMILIES["small"], num_hidden_layers=1)
    parts = abstract_networks(config, cases.VAE, make_mesh(), "float32").by_name()
    assert list(abstract_adapters(parts, config, 4, 8, ("to_k", "to_v"))["und"]) == ["last.k", "last.v"]
    with pytest.raises(InputError, match="'to_q' is no projection"):
        abstract_adapters(parts, config, 4, 8, ("to_q",))


@pytest.mark.parametrize("function", [adapted, merged])
def test_adapters_of_the_other_tower_are_refused(function):
    parts = networks("small")
    adapters = abstract_adapters(parts, cases.FAMILIES["small"], 4, 8, ("to_k",))["und"]
    with pytest.raises(InputError, match=r"^adapters: last.k, layers.keys_values.k are no weights of this network; is it the"):
        function(parts["gen"], adapters)


# The start of a training


def test_a_start_is_that_of_peft():
    """b is zero; a uniform within the root of 1 over the inputs, another for each layer, weight and key."""
    start = random_adapters(abstract_adapters(networks(), cases.FAMILIES["wide"], 8, 8, ALL), jax.random.key(0))
    other = random_adapters(abstract_adapters(networks(), cases.FAMILIES["wide"], 8, 8, ALL), jax.random.key(1))
    seen = []
    for part in start:
        for path, adapter in start[part].items():
            bound = np.prod(adapter.a.shape[-len(adapter.inputs) :]) ** -0.5
            a = np.asarray(adapter.a) / bound
            assert 0.98 < np.abs(a).max() <= 1
            assert abs(a.std() - 3**-0.5) < 0.02  # of a uniform number in [-1, 1]
            assert not np.asarray(adapter.b).any()
            assert (a != np.asarray(other[part][path].a) / bound).mean() > 0.99
            seen += [layer.flat[0] for layer in (a if path.startswith("layers") else a[None])]
    assert len(set(seen)) == len(seen)


def test_a_start_is_the_same_on_every_mesh():
    starts = [abstract_adapters(networks("wide", *mesh), cases.FAMILIES["wide"], 4, 8, ALL) for mesh in MESHES]
    made = [random_adapters(start, jax.random.key(3)) for start in starts]
    for x, y, shape in zip(*map(jax.tree.leaves, (*made, starts[1])), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert (y.sharding, y.dtype) == (shape.sharding, shape.dtype)


# One product


def operands(letters: str) -> tuple[jax.Array, jax.Array, Adapter]:
    left, right, result = re.split(",|->", letters)
    inputs = "".join(letter for letter in right if letter not in result)
    shapes = [left, right, f"R{inputs}", right.removesuffix(inputs) + "R"]
    x, w, a, b = (random(*(SIZES[letter] for letter in dims), seed=seed) for seed, dims in enumerate(shapes))
    return jnp.asarray(x), jnp.asarray(w), Adapter(jnp.asarray(a), jnp.asarray(b), 0.7, inputs)


@pytest.mark.parametrize("letters", PRODUCTS)
@pytest.mark.parametrize(("dtype", "step"), [("float32", 2**-24), ("bfloat16", 2**-8)])
def test_a_product_is_that_of_the_sum(letters, dtype, step):
    x, w, adapter = operands(letters)
    x, w = x.astype(dtype), w.astype(dtype)
    y = product_of_value(letters, x, Adapted(w, adapter))
    assert y.dtype == dtype
    expected = np.einsum(letters, np.asarray(x, np.float64), np.asarray(w, np.float64) + change(adapter))
    # Of each sum the rounding of its terms, which a root of their number makes smaller than that of its size.
    assert errors(np.asarray(y, np.float64), expected)[0] < 8 * step


@pytest.mark.parametrize("letters", PRODUCTS)
def test_fp8_is_kept_apart(letters):
    """The base is FP8, the adapter beside it is not."""
    x, w, adapter = operands(letters)
    q = quantize(w, tuple(range(w.ndim - len(adapter.inputs), w.ndim)))
    both, alone = (product_of_value(letters, x, value) for value in (Adapted(q, adapter), q))
    expected = np.einsum(letters, np.asarray(x, np.float64), change(adapter))
    assert errors(np.asarray(both - alone, np.float64), expected)[1] < 1e-5


# The towers


@pytest.mark.parametrize("family", ["wide", "edge"])
@pytest.mark.parametrize("how", [adapted, merged])
def test_a_start_changes_nothing(how, family):
    """Bit for bit: what is added is zero."""
    config, parts = cases.FAMILIES[family], networks(family)
    request, plain = Request(config), {part: drawn(network) for part, network in parts.items()}
    expected = request(plain)
    start = random_adapters(abstract_adapters(parts, config, 4, 8, ALL), jax.random.key(0))
    np.testing.assert_array_equal(request({part: how(plain[part], start[part]) for part in plain}), expected)


@pytest.mark.parametrize("family", ["wide", "edge"])
@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_merged_is_adapted(family, cfg, tp):
    """To float32's rounding; on every mesh the same, scanned over the layers, with every kind of projection at once."""
    if family == "edge" and tp > 2:
        tp = 2  # it has two key/value heads
    config, parts = cases.FAMILIES[family], networks(family, cfg, tp)
    request, adapters = Request(config, cfg, tp), trained(abstract_adapters(parts, config, 4, 6, ALL))
    plain = {part: drawn(network) for part, network in parts.items()}
    before = request(plain)
    beside = request({part: adapted(plain[part], adapters[part]) for part in plain})
    added = request({part: merged(plain[part], adapters[part]) for part in plain})
    assert errors(added, beside)[1] < 2e-5  # as far as two meshes are apart
    assert errors(beside, before)[0] > 0.05
    if (cfg, tp) != (1, 1):
        one = networks(family)
        alone = trained(abstract_adapters(one, config, 4, 6, ALL))
        there = Request(config)({part: adapted(drawn(one[part]), alone[part]) for part in one})
        assert errors(beside, there)[1] < 2e-5


def test_adapters_add():
    """One on another's base, and one after the other merged; with the scale that is asked for."""
    config, parts = cases.FAMILIES["wide"], networks()
    request = Request(config)
    one = trained(abstract_adapters(parts, config, 4, 6, ("add_q_proj", "to_k", "up_proj")), seed=1)
    two = trained(abstract_adapters(parts, config, 2, 3, ("add_q_proj", "to_k")), seed=2)
    plain = {part: drawn(network) for part, network in parts.items()}
    beside = request({part: adapted(adapted(plain[part], one[part]), two[part]) for part in plain})
    alone = request({part: adapted(plain[part], one[part]) for part in plain})
    values = {path: np.asarray(w.get_value(), np.float64) for path, w in by_path(plain["gen"].weights).items()}
    added = {part: merged(merged(plain[part], one[part]), two[part]) for part in plain}
    assert errors(request(added), beside)[1] < 2e-5
    assert errors(alone, beside)[0] > 0.02
    expected = values["layers.q"] + change(one["gen"]["layers.q"]) + change(two["gen"]["layers.q"])
    np.testing.assert_allclose(np.asarray(by_path(added["gen"].weights)["layers.q"].get_value()), expected, rtol=0, atol=1e-6)


def test_an_fp8_tower_can_have_adapters():
    config, parts = cases.FAMILIES["wide"], networks()
    request, adapters = Request(config), trained(abstract_adapters(parts, config, 4, 6))
    und, base = drawn(parts["und"]), quantized(drawn(parts["gen"]))
    with_adapters = adapted(base, adapters["gen"])
    beside, alone = (request({"und": und, "gen": gen}) for gen in (with_adapters, base))
    exact = request({"und": und, "gen": merged(drawn(parts["gen"]), adapters["gen"])})
    assert isinstance(by_path(with_adapters.weights)["layers.q"].get_value().base, Quantized)
    assert errors(beside, exact)[0] < 0.1 < errors(alone, exact)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_merging_rounds_once_and_gives_up_one_weight_after_the_other(cfg, tp, dtype, monkeypatch):
    config, parts = cases.FAMILIES["wide"], networks("wide", cfg, tp, dtype)
    adapters = trained(abstract_adapters(parts, config, 4, 6, ALL))
    plain = {part: drawn(network) for part, network in parts.items()}
    for part, network in plain.items():
        before = {path: w.get_value() for path, w in by_path(network.weights).items()}
        values = {path: np.asarray(x) for path, x in before.items()}
        given_up, left = [before[path] for path in adapters[part]], []
        with monkeypatch.context() as patch:
            patch.setattr(lora, "is_stacked", functools.partial(note, given_up, left, lora.is_stacked))
            after = {path: w.get_value() for path, w in by_path(merged(network, adapters[part], 0.5).weights).items()}
        assert left == list(range(len(given_up)))  # before each is added to, those before it are gone
        for path, x in after.items():
            if path not in adapters[part]:
                assert x is before[path]
                continue
            assert before[path].is_deleted()
            assert (x.dtype, x.sharding) == (jnp.dtype(dtype), by_path(parts[part].weights)[path].get_value().sharding)
            exact = values[path].astype(np.float64) + 0.5 * change(adapters[part][path])
            step = 2.0 ** -(24 if dtype == "float32" else 8)  # half of the distance between neighbours, relative
            limit = step * np.abs(exact) + 2.0**-23 * np.abs(exact).max()  # that one rounding, and those of float32 before it
            assert (np.abs(np.asarray(x).astype(np.float64) - exact) <= limit).all()


def note(arrays: list[jax.Array], counted: list[int], stacked, w):
    """In the place of `is_stacked`: counts how many arrays are gone."""
    counted.append(sum(x.is_deleted() for x in arrays))
    return stacked(w)


# Training


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_gradients_reach_the_adapters(cfg, tp):
    """All of them, of each layer; and where b is zero, b alone. The weights are not differentiated."""
    config, parts = cases.FAMILIES["wide"], networks("wide", cfg, tp)
    request, plain = Request(config, cfg, tp), {part: drawn(network) for part, network in parts.items()}
    abstract = abstract_adapters(parts, config, 4, 6, ALL)

    def loss(adapters):
        return jnp.mean(jnp.square(request.velocity({part: adapted(plain[part], adapters[part]) for part in plain})))

    with jax.set_mesh(request.mesh):
        gradient = jax.jit(jax.grad(loss))
        at_start, later = gradient(random_adapters(abstract, jax.random.key(0))), gradient(trained(abstract))
    assert jax.tree.structure(later) == jax.tree.structure(abstract)
    for part, found in later.items():
        for path, adapter in found.items():
            for side in (adapter.a, adapter.b):
                axes = tuple(range(1, side.ndim)) if path.startswith("layers") else None
                assert np.abs(np.asarray(side)).max(axis=axes).all(), (part, path)
            assert not np.asarray(at_start[part][path].a).any()
            assert np.asarray(at_start[part][path].b).any()

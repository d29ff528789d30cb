"""What must not grow unseen, in numbers that no busy machine can blur: programs compiled, products, convolutions, copies."""

import collections
import dataclasses
import math
import re
from typing import Any

import cases
import jax
import pytest
from flax import nnx

from cosmos3_jax import make_mesh
from cosmos3_jax.cost import operations
from cosmos3_jax.estimate import Job, autoencoders, towers
from cosmos3_jax.models.layers import SCORE_ROWS
from cosmos3_jax.models.vae import Conv, SpatialConv
from cosmos3_jax.networks import Networks, abstract_networks
from cosmos3_jax.request import Request, resolve
from cosmos3_jax.weights import by_path, is_stacked

FAMILY = dataclasses.replace(cases.FAMILIES["wide"], hidden_size=104, intermediate_size=296)  # no activation has as many values
REQUEST = Request("", num_frames=9, height=64, width=96)
MESHES = [(1, 1), (2, 1), (1, 2), (2, 4), (1, 8)]


def networks(cfg: int, tp: int) -> Networks:
    return abstract_networks(FAMILY, cases.VAE, make_mesh(cfg, tp), "float32")


def program(name: str, cfg: int, tp: int) -> Any:
    """One of the programs of a request without sound."""
    job = Job(FAMILY, cases.VAE, resolve(REQUEST, FAMILY, cases.VAE), "float32", text_tokens=128)
    made = [make(job, networks(cfg, tp), make_mesh(cfg, tp)) for make in (towers, autoencoders)]
    return next(each for each in [*made[0], *made[1]] if each.name == name)


def primitives(jaxpr: Any, times: int = 1) -> collections.Counter:
    """How often each primitive runs on one CPU."""
    counted: collections.Counter = collections.Counter()
    for equation in jaxpr.eqns:
        counted[equation.primitive.name] += times
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        if equation.primitive.name == "cond":  # of `platform_dependent`: there is no other
            assert equation.params["branches_platforms"] == (("cpu",), None)
            inner = [equation.params["branches"][0].jaxpr]
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for each in inner:
            if hasattr(each, "eqns"):
                counted += primitives(each, times * length)
    return counted


def test_a_request_compiles_four_programs_and_the_next_none(folders, compilations):
    from cosmos3_jax import Cosmos3Pipeline

    pipe = Cosmos3Pipeline.from_pretrained(folders("wide"), progress=False)
    jax.clear_caches()  # of what other tests have compiled
    compilations.clear()
    settings = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 3, "progress": False}
    pipe("A red ball.", **settings)
    assert len(compilations) == 4  # prefill; the first state; a step; decode
    pipe("Something else, at another length and guidance.", **settings | {"guidance_scale": 2.0, "num_inference_steps": 4})
    assert len(compilations) == 4


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_products_of_a_step(cfg, tp):
    counted = primitives(program("step", cfg, tp).traced.jaxpr)
    queries, groups = 3 * 2 * 3, FAMILY.num_attention_heads // FAMILY.num_key_value_heads
    heads = 2 // cfg * FAMILY.num_key_value_heads // tp  # key/value heads of all branches on one device
    attention = 2 * heads * math.ceil(queries * groups / SCORE_ROWS)  # scores and mix, of each head's chunks
    of_a_layer = 7 + attention  # q, k, v, o, gate, up, down
    ends = 4  # in, out, and two for the timestep
    assert counted["dot_general"] == FAMILY.num_hidden_layers * of_a_layer + ends
    assert counted["conv_general_dilated"] == 0


@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (1, 2)])
def test_convolutions_of_a_decode(cfg, tp):
    # A device alone takes three for one frame, four for two, and four for a picture twice as large. Where the picture is
    # divided each is one convolution, and one exchange of borders.
    counted = primitives(program("decode", cfg, tp).traced.jaxpr)
    decoder = networks(1, 1).vae.merge().decoder
    lone = sum(causal(part) for part in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]))  # frames at a time
    paired = causal(decoder) - lone
    doubled = sum(isinstance(module, SpatialConv) for _, module in decoder.iter_modules())
    assert (lone, paired, doubled) == (11, 19, 3)
    first, later = lone + paired, 2  # two latent frames come after the first, which sees no other
    each, quarters = (3 * lone + 4 * paired, 4) if tp == 1 else (lone + paired, 1)
    assert counted["conv_general_dilated"] == first + later * each + (1 + later) * quarters * doubled


def causal(part: nnx.Module) -> int:
    """How many 3x3x3 convolutions there are."""
    modules = [module for _, module in part.iter_modules()]
    return sum(isinstance(module, Conv) and module.weight.shape[:3] == (3, 3, 3) for module in modules)


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_a_step_copies_each_weight_once(cfg, tp):
    # Out of its stack, which a scan has to do; no other layout of it is made, and never of a whole stack.
    gen, made = networks(cfg, tp).gen, program("step", cfg, tp)
    with jax.set_mesh(made.mesh):
        hlo = made.traced.lower().compile().as_text()
    matrices, wholes = collections.Counter(), set()
    for w in by_path(gen.weights).values():
        if is_stacked(w) and len(w.dims) > 1:
            shape = w.get_value().sharding.shard_shape(w.shape)
            matrices[math.prod(shape[1:])] += 1
            wholes.add(math.prod(shape))
    written = collections.Counter()
    for operation in operations(hlo):
        inside = operation.computation.startswith(("fused_computation", "wrapped_"))  # of a fusion: nothing is written there
        if operation.kind in ("copy", "transpose", "fusion", "dynamic-slice") and not inside:
            written[_values(operation.shape)] += operation.count
    assert not wholes & written.keys()
    assert {values: written[values] for values in matrices} == {
        values: FAMILY.num_hidden_layers * count for values, count in matrices.items()
    }


def _values(shape: str) -> int:
    """How many there are in "f32[2,3]"; 0 of a tuple."""
    match = re.fullmatch(r"\w+\[([\d,]*)\]", shape)
    return math.prod(int(size) for size in match[1].split(",") if size) if match else 0

"""What is read off a program is what was written: collectives and their bytes on eight devices, FLOPs counted by hand."""

import functools
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.cost import Operation, collectives, flops
from cosmos3_jax.latents import Latents
from cosmos3_jax.models.layers import SCORE_ROWS, Rotary
from cosmos3_jax.models.transformer import Prefix
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.pipeline import velocity

MESH = make_mesh(tp=8)
WHOLE = P()
RING = [(i, (i + 1) % 8) for i in range(8)]
on_all = functools.partial(jax.shard_map, mesh=MESH, check_vma=False)


def divided(*sizes: int, by: P = WHOLE, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """An abstract array on the eight devices; WHOLE is a copy on each."""
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(MESH, by))


def read(function, *arguments, result: P = WHOLE) -> list[Operation]:
    """The collectives of `function`, compiled for eight devices, its result placed as `result`."""
    program = jax.jit(function, out_shardings=jax.NamedSharding(MESH, result))
    return collectives(program.lower(*arguments).compile().as_text())


def layer(x, w):
    """One layer of an MLP whose hidden units are divided: each device has a part of every sum."""
    y = jnp.tanh(x @ w[0]) @ w[1].T
    return jax.lax.with_sharding_constraint(y, jax.NamedSharding(MESH, WHOLE)), None


def layers(x, ws):
    return jax.lax.scan(layer, x, ws)[0]


X, WEIGHTS = divided(16, 24), divided(5, 2, 24, 64, by=P(None, None, None, "tp"))


# Collectives


@pytest.mark.parametrize(
    ("program", "arguments", "result", "expected"),
    [
        (jnp.matmul, [divided(16, 64, by=P(None, "tp")), divided(64, 32, by=P("tp"))], WHOLE, ("all-reduce", 4 * 16 * 32)),
        (jnp.negative, [divided(16, 24, by=P("tp"))], WHOLE, ("all-gather", 4 * 16 * 24)),
        (
            on_all(lambda x: jax.lax.ppermute(x, "tp", RING), in_specs=P("tp"), out_specs=P("tp")),
            [divided(16, 24, by=P("tp"))],
            P("tp"),
            ("collective-permute", 4 * 2 * 24),
        ),
        (
            on_all(lambda x: jax.lax.psum_scatter(x, "tp", tiled=True), in_specs=WHOLE, out_specs=P("tp")),
            [divided(16, 24)],
            P("tp"),
            ("reduce-scatter", 4 * 2 * 24),
        ),
        (  # eight results of [2, 3], one from each device: HLO numbers them in comments, which are no shapes
            on_all(lambda x: jax.lax.all_to_all(x, "tp", 1, 0, tiled=True), in_specs=P("tp"), out_specs=P(None, "tp")),
            [divided(16, 24, by=P("tp"))],
            P(None, "tp"),
            ("all-to-all", 4 * 8 * 2 * 3),
        ),
    ],
    ids=["all-reduce", "all-gather", "collective-permute", "reduce-scatter", "all-to-all"],
)
def test_each_kind_is_found_with_its_bytes(program, arguments, result, expected):
    (found,) = read(program, *arguments, result=result)
    assert (found.kind, found.nbytes, found.count) == (*expected, 1)


def test_a_program_without_any():
    # Divided in, divided out: every device doubles its own part.
    assert read(lambda x: 2 * x, divided(16, 24, by=P("tp")), result=P("tp")) == []


def test_a_loop_counts_as_often_as_it_runs():
    (found,) = read(layers, X, WEIGHTS)
    assert (found.kind, found.shape, found.count) == ("all-reduce", "f32[16,24]", 5)
    assert found.nbytes == 5 * 4 * 16 * 24


def test_nested_loops_multiply():
    def thrice(x, ws):
        return jax.lax.scan(lambda x, _: (layers(x, ws), None), x, length=3)[0]

    (found,) = read(thrice, X, WEIGHTS)
    assert found.count == 3 * 5


def test_what_stands_outside_of_a_loop_counts_once():
    before, inside = sorted(read(lambda x, ws: layers(layer(x, ws[0])[0], ws[1:]), X, WEIGHTS), key=lambda found: found.count)
    assert (before.count, inside.count) == (1, 4)
    assert before.computation != inside.computation


def test_two_loops_are_told_apart():
    # The same body, five times and twice: XLA keeps a computation for each.
    found = read(lambda x, ws: layers(jnp.sin(layers(x, ws)), ws[:2]), X, WEIGHTS)
    assert sorted(each.count for each in found) == [2, 5]


def test_a_combined_collective_counts_all_its_parts():
    both = on_all(lambda x, y: jax.lax.psum((x, y), "tp"), in_specs=P("tp"), out_specs=WHOLE)
    (found,) = read(both, divided(16, 24, by=P("tp")), divided(8, 3, by=P("tp")))
    assert found.shape.startswith("(")  # one operation, a tuple of results
    assert found.nbytes == 4 * (2 * 24 + 1 * 3)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("int8", 1), ("bool", 1)])
def test_bytes_of_each_dtype(dtype, size):
    (found,) = read(jnp.copy, divided(16, 24, by=P("tp"), dtype=dtype))
    assert found.nbytes == size * 16 * 24


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [
        ("bf16[16,24]", 2 * 16 * 24),  # CPUs gather it as float32, so no program here has it
        ("f8e4m3fn[16,24]", 16 * 24),  # the first number is the width
        ("s4[16,24]", 16 * 24 // 2),
        ("f32[]", 4),
        ("f32[0,24]", 0),
        ("(bf16[2,3], pred[5])", 2 * 6 + 5),
    ],
)
def test_bytes_of_shapes_that_cpus_do_not_send(shape, nbytes):
    assert Operation("all-gather", shape, 3, "main").nbytes == 3 * nbytes


# FLOPs


def count(function, *shapes) -> int:
    return flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr)


def convolution(**settings):
    settings = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | settings
    return lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, **settings)


def thrice(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]


PRODUCTS = {
    "matrices": (lambda x, w: x @ w, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
    "a vector": (lambda x, w: x @ w, [(5,), (5, 7)], 2 * 5 * 7),
    "none": (lambda x, w: jnp.tanh(x) + w.sum(), [(3, 5), (5, 7)], 0),  # elementwise, and sums: not counted
    "scores": (lambda q, k: jnp.einsum("bqnh,bmnh->bnqm", q, k), [(2, 3, 4, 5), (2, 6, 4, 5)], 2 * 2 * 4 * 3 * 6 * 5),
    "heads": (lambda x, w: jnp.einsum("bqd,nhd->bqnh", x, w), [(2, 3, 5), (4, 6, 5)], 2 * 2 * 3 * 5 * 4 * 6),
    "heads together": (lambda x, w: jnp.einsum("bqnh,dnh->bqd", x, w), [(2, 3, 4, 6), (5, 4, 6)], 2 * 2 * 3 * 5 * 4 * 6),
    "convolution": (convolution(), [(2, 8, 10, 3), (3, 3, 3, 7)], 2 * 2 * 8 * 10 * 7 * 9 * 3),  # borders as if all were picture
    "stride": (convolution(window_strides=(2, 2)), [(2, 8, 10, 3), (3, 3, 3, 7)], 2 * 2 * 4 * 5 * 7 * 9 * 3),
    "no padding": (convolution(padding="VALID"), [(2, 8, 10, 3), (3, 3, 3, 7)], 2 * 2 * 6 * 8 * 7 * 9 * 3),
    "groups": (  # 3 of 6 channels
        convolution(feature_group_count=2),
        [(2, 8, 10, 6), (3, 3, 3, 8)],
        2 * 2 * 8 * 10 * 8 * 9 * 3,
    ),
    "channels first": (
        convolution(dimension_numbers=("NCHW", "OIHW", "NCHW")),
        [(2, 3, 8, 10), (7, 3, 3, 3)],
        2 * 2 * 8 * 10 * 7 * 9 * 3,
    ),
    "scan": (thrice, [(3, 5), (5, 5)], 3 * 2 * 3 * 5 * 5),
    "two scans": (lambda x, w: thrice(thrice(x, w), w) @ w, [(3, 5), (5, 5)], (3 + 3 + 1) * 2 * 3 * 5 * 5),
    "nested scans": (
        lambda x, w: jax.lax.scan(lambda x, _: (thrice(x, w), None), x, length=4)[0],
        [(3, 5), (5, 5)],
        12 * 2 * 3 * 5 * 5,
    ),
    "nested jit": (lambda x, w: jax.jit(jax.jit(jnp.matmul))(x, w) @ w, [(3, 5), (5, 5)], 2 * 2 * 3 * 5 * 5),
    "checkpoint": (lambda x, w: jax.checkpoint(jnp.matmul)(x, w), [(3, 5), (5, 5)], 2 * 3 * 5 * 5),
}


@pytest.mark.parametrize(("function", "shapes", "expected"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_counted(function, shapes, expected):
    assert count(function, *shapes) == expected


@pytest.mark.parametrize(
    ("by", "out"),
    [
        ((P("tp"), WHOLE), P("tp")),  # rows
        ((WHOLE, P(None, "tp")), P(None, "tp")),  # columns
        ((P(None, "tp"), P("tp")), WHOLE),  # the contracted axis: each device has a part of every sum
    ],
    ids=["rows", "columns", "contracted"],
)
def test_divided_by_hand_or_not_a_product_counts_the_same(by, out):
    def product(x, w):
        return jax.lax.psum(x @ w, "tp") if out == WHOLE else x @ w

    assert count(on_all(product, in_specs=by, out_specs=out), (16, 24), (24, 32)) == count(jnp.matmul, (16, 24), (24, 32))


def test_what_all_devices_repeat_counts_for_each():
    # They do spend it: eight times the whole product.
    repeated = on_all(jnp.matmul, in_specs=WHOLE, out_specs=WHOLE)
    assert count(repeated, (16, 24), (24, 32)) == 8 * 2 * 16 * 24 * 32


@pytest.mark.parametrize("family", ["small", "wide", "edge"])
@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("sound", [0, 5])
def test_a_step_of_the_model_by_hand(family, cfg, tp, sound):
    config = cases.FAMILIES[family]
    B, S, t, h, w = 2, 40, 3, 13, 16  # rows are odd: 7 x 8 patches in each frame
    patches = t * 7 * 8
    G = patches + sound
    L, D, F, N, K, H, C, E, A = (config.sizes[letter] for letter in "LDFNKHCEA")
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    mesh = make_mesh(cfg, tp)
    keys = shape((L, B, S, K, H))
    prefix = Prefix(keys, keys, jax.ShapeDtypeStruct((B,), jnp.int32))
    gen = abstract_networks(config, cases.VAE, mesh, "float32").gen
    with jax.set_mesh(mesh):
        rotary = Rotary(shape((B, G, H // 2)), shape((B, G, H // 2)))
        latents = Latents(shape((t, h, w, config.latent_channel)), shape((sound, A)) if sound else None)
        arguments = (gen, rotary, prefix), latents, 700.0, np.zeros(t, bool)
        counted = flops(jax.make_jaxpr(velocity)(*arguments).jaxpr)

    chunks = math.ceil(G * N / K / SCORE_ROWS)
    padded_queries = math.ceil(G / chunks) * chunks  # the last chunk is computed whole
    matrices = 2 if config.hidden_act == "relu2" else 3  # of the MLP
    of_a_token = 2 * D * (N * H + 2 * K * H) + 2 * D * N * H + matrices * 2 * D * F  # q, k, v; back together; MLP
    scores_and_mix = 2 * (2 * padded_queries * (G + S) * N * H)
    timestep = 2 * E * D + 2 * D * D
    heads = (1 + B) * 2 * D * (patches * C + sound * A)  # in, once for all branches; out, for each
    assert counted == L * B * (G * of_a_token + scores_and_mix) + timestep + heads

"""Weights: what one declaration says about shape, file, sharding and start; and the audit of a file."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.config import SUPER, TINY
from cosmos3_jax.weights import audit, by_path, is_stacked, map_weights, plain, random_weights, split, stack, vector, weight

MESH = AbstractMesh((2, 4), ("cfg", "tp"))  # eight devices that need not exist


class Layer(nnx.Module):
    """Weights of every kind but a convolution; k has the shape of q."""

    def __init__(self):
        self.q = weight(TINY, "NHD")
        self.k = weight(TINY, "KHD")
        self.o = weight(TINY, "DNH", inputs="NH")
        self.scale = vector(TINY, "H", mean=1.0)
        self.b = vector(TINY, "D")
        self.time = weight(TINY, "DE", float32=True)


class Modules(nnx.Module):
    """A stack of layers, a weight of its own, a convolution."""

    def __init__(self):
        self.layers = stack(3, Layer())
        self.up = weight(TINY, "FD")
        self.kernel = plain((9, 4, 6), file_shape=(6, 4, 3, 3), mean=2.0, std=0.5)


def draw(seed: int) -> dict[str, np.ndarray]:
    weights = random_weights(split(Modules(), make_mesh(), jnp.float32).weights, seed)
    return {path: np.asarray(w[...]) for path, w in by_path(weights).items()}


@pytest.fixture(scope="module")
def drawn():
    """The weights of seed 0."""
    return draw(0)


@pytest.mark.parametrize(
    ("config", "dims", "inputs", "shape", "file_shape"),
    [
        (TINY, "NHD", "", (8, 16, 64), (128, 64)),
        (TINY, "DNH", "NH", (64, 8, 16), (64, 128)),
        (TINY, "FD", "", (160, 64), (160, 64)),
        (SUPER, "NHD", "", (64, 128, 5120), (8192, 5120)),
        (SUPER, "DNH", "NH", (5120, 64, 128), (5120, 8192)),
        (SUPER, "CD", "", (192, 5120), (192, 5120)),
    ],
)
def test_a_matrix_is_a_reshaped_view_of_its_file(config, dims, inputs, shape, file_shape):
    w = weight(config, dims, inputs=inputs)
    assert (w.shape, w.file_shape) == (shape, file_shape)
    assert w.std == file_shape[1] ** -0.5  # outputs of inputs with variance 1 have variance 1


def test_vectors_and_convolutions():
    assert vector(TINY, "F").shape == vector(TINY, "F").file_shape == (160,)
    kernel = plain((9, 4, 6), file_shape=(6, 4, 3, 3))
    assert (kernel.shape, kernel.file_shape, kernel.dims) == ((9, 4, 6), (6, 4, 3, 3), "")


def test_a_stack_has_one_more_axis_and_the_files_of_one_layer():
    one, three = (by_path(nnx.split(module)[1]) for module in (Layer(), stack(3, Layer())))
    assert one.keys() == three.keys()
    for path in one:
        assert three[path].shape == (3, *one[path].shape)
        assert three[path].file_shape == one[path].file_shape
        assert is_stacked(three[path])
        assert not is_stacked(one[path])


def test_split_places_by_letters_in_the_dtype():
    placed = {path: w.get_value() for path, w in by_path(split(Modules(), MESH, jnp.bfloat16).weights).items()}
    assert {path: shape.sharding.spec for path, shape in placed.items()} == {
        "layers.q": P(None, "tp", None, None),
        "layers.k": P(None, "tp", None, None),
        "layers.o": P(None, None, "tp", None),
        "layers.scale": P(None, None),
        "layers.b": P(None, None),
        "layers.time": P(None, None, None),
        "up": P("tp", None),
        "kernel": P(),
    }
    assert {path for path, shape in placed.items() if shape.dtype == jnp.float32} == {"layers.time"}
    assert placed["layers.q"].sharding.shard_shape(placed["layers.q"].shape) == (3, 2, 16, 64)


def test_map_weights_changes_values_alone():
    tree = split(Modules(), MESH, jnp.float32).weights
    paths = by_path(map_weights(lambda path, w: path, tree))
    assert {path: w.get_value() for path, w in paths.items()} == {path: path for path in by_path(tree)}
    assert [w.dims for w in paths.values()] == [w.dims for w in by_path(tree).values()]


def test_weights_that_nobody_holds_are_gone_at_once():
    """Looking at them, or making others of them, leaves nothing that Python's collector of cycles would have to find."""
    gc.collect()
    gc.disable()
    try:
        tree = random_weights(split(Modules(), make_mesh(), jnp.float32).weights)
        array = weakref.ref(by_path(tree)["layers.q"].get_value())
        other = map_weights(lambda _, w: w.get_value(), tree)
        assert array() is not None
        del tree, other
        assert array() is None
    finally:
        gc.enable()


def test_random_weights_depend_on_the_seed_alone(drawn):
    again, other = draw(0), draw(1)
    for path in drawn:
        np.testing.assert_array_equal(drawn[path], again[path])
        assert (drawn[path] == other[path]).all() == (path in ("layers.scale", "layers.b"))  # these are not drawn


def test_no_two_random_weights_are_alike(drawn):
    matrices = [*drawn["layers.q"], *drawn["layers.k"]]
    correlation = np.corrcoef([matrix.ravel() for matrix in matrices])
    np.testing.assert_allclose(correlation, np.eye(6), atol=5 * matrices[0].size ** -0.5)  # five standard errors


def test_random_weights_have_the_declared_mean_and_deviation(drawn):
    declared = {"q": (0, 64**-0.5), "o": (0, 128**-0.5), "scale": (1, 0), "b": (0, 0)}
    declared = {f"layers.{name}": value for name, value in declared.items()} | {"kernel": (2, 0.5)}
    for path, (mean, std) in declared.items():
        size = drawn[path].size
        np.testing.assert_allclose(drawn[path].mean(), mean, atol=5 * std / size**0.5)  # five standard errors
        np.testing.assert_allclose(drawn[path].std(), std, rtol=5 / (2 * size) ** 0.5)


def test_audit_names_every_misfit_at_once():
    expected = {"a": (1,), "b": (2, 3), "c": (4,), "d": (5,), "e": (6,)}
    found = {"a": (1,), "b": (3, 2), "c": (4, 1), "y": (7,), "z": (8,), "left": (9,)}
    assert audit(expected, found, unused={"left", "gone"}) == [
        "missing: d [5]",
        "missing: e [6]",
        "unexpected: y [7]",
        "unexpected: z [8]",
        "misshapen: b is [3, 2], expected [2, 3]",
        "misshapen: c is [4, 1], expected [4]",
    ]
    assert audit(expected, expected, unused=()) == []

"""Weights, declared once: shape, sharding, random init and file layout all follow from one line in a network.

A module here is abstract: its `Weight`s hold `jax.ShapeDtypeStruct`s. `split` turns it into a `Network`, a graph and a tree of
shapes placed on a mesh; a checkpoint (checkpoint.py) or `random_weights` fills that tree with arrays, and inside a jitted
function `network.merge()` is the module again. No path and no tensor name of a file is known here.
"""

import functools
import math
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding

from cosmos3_jax.axes import sharding
from cosmos3_jax.config import TransformerConfig


class Weight(nnx.Param):
    """A parameter that knows its letters.

    Metadata: `dims`, the letters ("" for the VAE's, which are whole everywhere); `file_shape`, the shape of one tensor of it
    in a published file; `std` and `mean` of its random init; `float32`, whether it stays float32 whatever the others' dtype.
    """


@struct.dataclass
class Network:
    """A module as jit takes it: the graph is static, the weights are data."""

    graph: nnx.GraphDef = struct.field(pytree_node=False)
    weights: nnx.State

    def merge(self) -> Any:
        """The module, to be called."""
        return nnx.merge(self.graph, self.weights)


def weight(config: TransformerConfig, dims: str, *, inputs: str = "", float32: bool = False) -> Weight:
    """A matrix in the files' own order, outputs first; `inputs` are its trailing letters (the last one, if not given).

    In a file the outputs are one axis and the inputs another: "NHD" is stored [N*H, D], so that loading is a reshape.
    """
    shape = tuple(config.sizes[letter] for letter in dims)
    fan_in = math.prod(config.sizes[letter] for letter in inputs or dims[-1])
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    file_shape = (math.prod(shape) // fan_in, fan_in)
    return Weight(value, dims=dims, file_shape=file_shape, mean=0.0, std=fan_in**-0.5, float32=float32)


def vector(config: TransformerConfig, dim: str, *, mean: float = 0.0, float32: bool = False) -> Weight:
    """A bias (mean 0) or the scale of a norm (mean 1)."""
    shape = (config.sizes[dim],)
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Weight(value, dims=dim, file_shape=shape, mean=mean, std=0.0, float32=float32)


def plain(
    shape: tuple[int, ...], *, file_shape: tuple[int, ...], mean: float = 0.0, std: float = 0.0, float32: bool = False
) -> Weight:
    """A weight without letters (a convolution of a decoder), whole on every device, laid out otherwise than in the file."""
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Weight(value, dims="", file_shape=file_shape, mean=mean, std=std, float32=float32)


def input_dims(w: Weight) -> str:
    """The trailing letters of a matrix that are its inputs, one axis in the file: "NH" of "DNH"."""
    count = next(n for n in range(1, len(w.dims)) if math.prod(w.shape[-n:]) == w.file_shape[-1])
    return w.dims[-count:]


def product(letters: str, x: jax.Array, w: Weight) -> jax.Array:
    """`jnp.einsum(letters, x, w)` in the dtype of `x`.

    In `letters`, such as "BGD,NHD->BGNH", what is contracted comes last in both, and the result is what is left of either.
    """
    return product_of_value(letters, x, w.get_value())


def product_of_value(letters: str, x: jax.Array, value: Any) -> jax.Array:
    """`product` with a weight's value: an array, or what has a method `product(letters, x)` of its own."""
    is_array = isinstance(value, jax.Array | np.ndarray)
    return jnp.einsum(letters, x, value) if is_array else value.product(letters, x)


def map_weights(function: Callable[[str, Weight], Any], tree: nnx.State) -> nnx.State:
    """`tree` with each Weight's value replaced by `function(path, weight)`; a path reads "layers.mlp.up"."""
    flat = [(path, w.replace(function(_dotted(path), w))) for path, w in _flat(tree)]
    return nnx.from_flat_state(flat)


def by_path(tree: nnx.State) -> dict[str, Weight]:
    """The weights by their place in the network."""
    return {_dotted(path): w for path, w in _flat(tree)}


def some(network: Network, wanted: Callable[[str], bool]) -> Network:
    """Those weights of a network whose paths are wanted; the others are needed too for it to be merged."""
    flat = [(path, w) for path, w in _flat(network.weights) if wanted(_dotted(path))]
    return Network(network.graph, nnx.from_flat_state(flat))


def _flat(tree: nnx.State) -> list[tuple[tuple, Weight]]:
    """The weights and their paths, in the order of these.

    As `nnx.to_flat_state`, which leaves a cycle of references behind: weights would stay until Python looks for those.
    """
    nested: list[tuple[tuple, Any]] = [((), tree)]
    flat: list[tuple[tuple, Weight]] = []
    while nested:
        path, value = nested.pop()
        if isinstance(value, Mapping):
            nested += [((*path, name), inner) for name, inner in value.items()]
        else:
            flat.append((path, value))
    return sorted(flat, key=lambda pair: pair[0])


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def nbytes(network: Network) -> int:
    """The bytes of all weights, each counted once, on however many devices it is."""
    return sum(math.prod(w.shape) * w.dtype.itemsize for w in by_path(network.weights).values())


def nbytes_on_device(network: Network) -> int:
    """The bytes of all weights on one device."""
    arrays = jax.tree.leaves(network.weights)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


def stack(length: int, module: nnx.Module) -> nnx.Module:
    """`length` copies of `module` in one: every weight gets a leading L. For `lax.scan`; calling it makes no sense."""
    graph, tree = nnx.split(module)
    stacked = map_weights(lambda _, w: jax.ShapeDtypeStruct((length, *w.shape), w.dtype), tree)
    return nnx.merge(graph, stacked)


def is_stacked(w: Weight) -> bool:
    """Whether this weight holds one tensor for each layer, along its first axis."""
    return bool(w.dims) and len(w.shape) > len(w.dims)


def split(module: nnx.Module, mesh: Mesh, dtype: Any) -> Network:
    """An abstract module as a network: weights are shapes in `dtype`, placed on `mesh` by their letters."""
    graph, tree = nnx.split(module)

    def place(_: str, w: Weight) -> jax.ShapeDtypeStruct:
        dims = "L" + w.dims if is_stacked(w) else w.dims
        return jax.ShapeDtypeStruct(w.shape, jnp.float32 if w.float32 else dtype, sharding=sharding(mesh, dims))

    return Network(graph, map_weights(place, tree))


def random_weights(tree: nnx.State, seed: int = 0) -> nnx.State:
    """Arrays for an abstract `tree`, drawn on the devices where they will live."""
    weights = by_path(tree)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(weights))  # "rbg": XLA's own generator compiles fastest

    def draw(key: jax.Array, w: Weight) -> jax.Array:
        return _drawing(is_stacked(w), w.shape, w.dtype, w.get_value().sharding)(key, w.mean, w.std)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each shape has a program to be compiled
        values = dict(zip(weights, pool.map(draw, keys, weights.values()), strict=True))
    return map_weights(lambda path, _: values[path], tree)


@functools.cache
def _drawing(stacked: bool, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Callable[..., jax.Array]:
    """(key, mean, std) -> a weight: one program for all that are alike."""

    def normal(key: jax.Array, mean: float, std: float, shape: tuple[int, ...] = shape) -> jax.Array:
        return (mean + std * jax.random.normal(key, shape)).astype(dtype)

    def layers(key: jax.Array, mean: float, std: float) -> jax.Array:  # beside all, their float32 numbers would not fit
        return jax.lax.map(lambda k: normal(k, mean, std, shape[1:]), jax.random.split(key, shape[0]))

    return jax.jit(layers if stacked else normal, out_shardings=sharding)


Index = tuple[slice, ...]


def place_weight(w: Weight, fill: Callable[[np.ndarray, Index], None]) -> jax.Array:
    """An array for an abstract weight: `fill(buffer, index)` writes that part of it, for one after the other.

    Devices that hold the same part are given the same buffer, and only one is there at a time (CPUs keep it as theirs).
    """
    sharding = w.get_value().sharding
    index_of = sharding.addressable_devices_indices_map(w.shape)
    parts: dict[Any, list[jax.Device]] = {}
    for device, index in index_of.items():
        parts.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    placed: dict[jax.Device, jax.Array] = {}
    for devices in parts.values():
        buffer = _buffer(sharding.shard_shape(w.shape), w.dtype)
        fill(buffer, index_of[devices[0]])
        placed |= {device: jax.device_put(buffer, device) for device in devices}
        jax.block_until_ready(list(placed.values()))
    return jax.make_array_from_single_device_arrays(w.shape, sharding, [placed[device] for device in index_of])


def _buffer(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Host memory, not yet written, at an address that XLA's CPU devices take over as it is instead of copying."""
    nbytes, alignment = math.prod(shape) * np.dtype(dtype).itemsize, 64
    memory = np.empty(nbytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Writes `source` into `target`, cast to its dtype."""
    if target.dtype == source.dtype:  # as integers: numpy moves those as they are, and bfloat16 one by one
        kind = f"u{target.itemsize}"
        target, source = target.view(kind), source.view(kind)
    np.copyto(target, source, casting="unsafe")


def audit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], unused: Collection[str]) -> list[str]:
    """Every missing, unexpected and misshapen tensor, a line each; none if all is well.

    `expected` and `found` are shapes by name; `unused` names may be there or not.
    """
    missing = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    unexpected = [f"unexpected: {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys() - set(unused))]
    misshapen = [
        f"misshapen: {name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if tuple(found.get(name, shape)) != tuple(shape)
    ]
    return missing + unexpected + misshapen

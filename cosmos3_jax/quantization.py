"""FP8 matrix products: weights and activations in e4m3, with a scale for each output channel and each token.

An e4m3 number has three bits of mantissa, and 448 is the largest; so every row of a weight and every token is first divided by
what makes its largest value 448, and the products are multiplied by both scales. Weights take half the memory of bfloat16, and
GPUs from Hopper on multiply twice as fast. They want the contracted axis last in both operands, as it is in ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from cosmos3_jax.weights import Network, Weight, input_dims, is_stacked, map_weights

E4M3 = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(E4M3).max)
SMALLEST = LARGEST * float(jnp.finfo(jnp.float32).tiny)  # of a row that can be scaled: below, the scale would become zero


@struct.dataclass
class Quantized:
    """The value of a weight: `values` times `scale`, which has no contracted axes."""

    values: Any  # e4m3
    scale: Any  # float32

    def product(self, letters: str, x: jax.Array) -> jax.Array:
        """`weights.product`, in FP8."""
        left, result = letters.split(",")[0], letters.split("->")[1]
        tokens = quantize(x, tuple(axis for axis, letter in enumerate(left) if letter not in result))
        y = jnp.einsum(letters, tokens.values, self.values, preferred_element_type=x.dtype).astype(jnp.float32)
        scale = tokens.scale.reshape(*tokens.scale.shape, *[1] * self.scale.ndim)
        return (y * scale * self.scale).astype(x.dtype)


def quantize(x: jax.Array, axes: int | tuple[int, ...]) -> Quantized:
    """`x` with one scale for all that is contracted, along `axes`."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=True)
    scale = jnp.where(largest > SMALLEST, largest / LARGEST, 1)
    return Quantized((x.astype(jnp.float32) / scale).astype(E4M3), jnp.squeeze(scale, axes))


def quantized(network: Network) -> Network:
    """A network whose layers' matrices are FP8: of arrays, which are given up one by one, or of shapes."""
    return Network(network.graph, map_weights(_quantized, network.weights))


def _quantized(_: str, w: Weight) -> Any:
    value = w.get_value()
    if not is_stacked(w) or len(w.dims) == 1:
        return value
    ndim, placement = len(w.shape), value.sharding
    axes = tuple(range(ndim - len(input_dims(w)), ndim))
    outputs = [axis for axis in range(ndim) if axis not in axes]
    spec = PartitionSpec(*(placement.spec[axis] for axis in outputs))
    both = Quantized(placement, NamedSharding(placement.mesh, spec))
    if isinstance(value, jax.ShapeDtypeStruct):
        scale = jax.ShapeDtypeStruct([w.shape[axis] for axis in outputs], jnp.float32, sharding=both.scale)
        return Quantized(jax.ShapeDtypeStruct(w.shape, E4M3, sharding=placement), scale)
    result = jax.jit(quantize, static_argnums=1, out_shardings=both)(value, axes)
    jax.block_until_ready(result)
    value.delete()  # so that no more than one weight is there twice
    return result

"""LoRA: a matrix W of a tower's layers as W + scale B A, where A has few rows and B few columns.

Adapters are values of their own, by the path of the weight that they are for: random ones that a training starts from, or those
of a file (lora_files.py). `adapted` computes with them beside the weights, so that they can be trained; `merged` adds them to
the weights, so that generation costs no more than without. Reference: arXiv 2106.09685; peft 0.21, tuners/lora/layer.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from cosmos3_jax.axes import sharding
from cosmos3_jax.checks import real, whole
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.errors import InputError, shown
from cosmos3_jax.published import names_of
from cosmos3_jax.weights import Network, Weight, by_path, input_dims, is_stacked, map_weights, product_of_value

TOWERS = ("und", "gen")
MOST = 1_000_000  # of an alpha or a scale
TARGETS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # the attention of the generating tower
TEXT_TARGETS = ("to_q", "to_k", "to_v", "to_out")  # that of the text tower


@struct.dataclass
class Adapter:
    """What is added to a matrix: `scale` times `b` times `a`. Of stacked layers a and b have the L of the weight in front."""

    a: Any  # [(L,) R, inputs...]
    b: Any  # [(L,) outputs..., R]
    scale: float = struct.field(pytree_node=False)  # alpha / R
    inputs: str = struct.field(pytree_node=False)  # their letters: "D", or "NH"

    @property
    def rank(self) -> int:
        """R."""
        return self.b.shape[-1]


Adapters = Mapping[str, Adapter]
"""Those of one network, by the path of the weight."""


@struct.dataclass
class Adapted:
    """The value of a weight: `base`, an array or any such value, and an adapter beside it."""

    base: Any
    adapter: Adapter

    def product(self, letters: str, x: jax.Array) -> jax.Array:
        """`weights.product`, in the dtype of `x`; no matrix as large as the weight is made."""
        (left, right, result), inputs = letters.replace("->", ",").split(","), self.adapter.inputs
        kept, outputs = left.removesuffix(inputs), right.removesuffix(inputs)
        hidden = jnp.einsum(f"{left},R{inputs}->{kept}R", x, self.adapter.a.astype(x.dtype))
        change = jnp.einsum(f"{kept}R,{outputs}R->{result}", hidden, self.adapter.b.astype(x.dtype))
        return product_of_value(letters, x, self.base) + self.adapter.scale * change


def modules(part: str, tower: Network, config: TransformerConfig) -> dict[str, list[str]]:
    """The matrices of a tower's layers, "und" or "gen", by path: of each layer its module, as diffusers calls it.

    Only they can have adapters. The text tower's last layer has but keys and values.
    """
    names = names_of(part, tower, config)
    matrices = [path for path, w in by_path(tower.weights).items() if path.startswith(("layers.", "last.")) and len(w.dims) > 1]
    return {path: [name.removesuffix(".weight") for name in names[path]] for path in matrices}


def abstract_adapters(
    networks: Mapping[str, Network], config: TransformerConfig, rank: int, alpha: float, targets: Sequence[str] = TARGETS
) -> dict[str, dict[str, Adapter]]:
    """Adapters with float32 shapes for a and b, placed as the weights of abstract networks ("und", "gen"), by part and path.

    `targets` are modules as peft's `target_modules` has them, a name or its end after a dot, here always of all layers of a
    tower: "to_q", "mlp_moe_gen.up_proj", "up_proj" (of both towers). Parts without any are left out.
    Raises InputError for a rank or an alpha that is none, and for targets that are no such modules.
    """
    rank, alpha = whole("rank", rank, 1), number("alpha", alpha)
    if isinstance(targets, str) or not targets:
        raise InputError(f"targets={shown(targets)}: a list of modules is expected, such as {list(TARGETS)}")
    known = {part: modules(part, networks[part], config) for part in TOWERS if part in networks}
    weights = {part: by_path(networks[part].weights) for part in known}
    found: dict[str, dict[str, Adapter]] = {}
    for target in targets:
        chosen = [(part, path) for part in known for path, names in known[part].items() if _is_meant(target, names)]
        if not chosen:
            ends = sorted({name.split(".", 2)[2] for names in known.values() for listed in names.values() for name in listed})
            raise InputError(f"targets: {shown(target)} is no projection in all layers of a tower; there are {', '.join(ends)}")
        for part, path in chosen:
            found.setdefault(part, {})[path] = abstract_adapter(weights[part][path], rank, alpha / rank)
    return found


def number(name: str, value: Any) -> float:
    """An alpha or a scale. Raises InputError for what can be none."""
    return real(name, value, -MOST, MOST)


def _is_meant(target: str, names: Sequence[str]) -> bool:
    return bool(names) and all(name == target or name.endswith(f".{target}") for name in names)


def abstract_adapter(w: Weight, rank: int, scale: float) -> Adapter:
    """Shapes for the adapter of one weight: inputs and outputs divided over the mesh as the weight's are, R never."""
    stacked, inputs = "L" if is_stacked(w) else "", input_dims(w)
    sizes = dict(zip(stacked + w.dims, w.shape, strict=True)) | {"R": rank}

    def shape(dims: str) -> jax.ShapeDtypeStruct:
        placement = sharding(w.get_value().sharding.mesh, dims)
        return jax.ShapeDtypeStruct([sizes[letter] for letter in dims], jnp.float32, sharding=placement)

    return Adapter(shape(f"{stacked}R{inputs}"), shape(stacked + w.dims.removesuffix(inputs) + "R"), scale, inputs)


def random_adapters(abstract: Any, key: jax.Array) -> Any:
    """Arrays for a tree of abstract adapters, as peft starts: b is zero, so that nothing is changed yet.

    a is uniform within the root of 1 over the inputs (torch's kaiming_uniform with a=sqrt(5)). The same on every mesh.
    """
    listed, tree = jax.tree.flatten(abstract, is_leaf=lambda x: isinstance(x, Adapter))

    def draw(key: jax.Array) -> list[Adapter]:
        return [_draw(key, adapter) for key, adapter in zip(jax.random.split(key, len(listed)), listed, strict=True)]

    placements = jax.tree.map(lambda x: x.sharding, listed)
    return jax.tree.unflatten(tree, jax.jit(draw, out_shardings=placements)(key))


def _draw(key: jax.Array, adapter: Adapter) -> Adapter:
    bound = math.prod(adapter.a.shape[-len(adapter.inputs) :]) ** -0.5
    a = jax.random.uniform(key, adapter.a.shape, adapter.a.dtype, -bound, bound)
    return Adapter(a, jnp.zeros(adapter.b.shape, adapter.b.dtype), adapter.scale, adapter.inputs)


def adapted(network: Network, adapters: Adapters) -> Network:
    """The network with adapters beside its weights, be these arrays, FP8, or adapted already: then both count.

    Nothing is copied. Gradients reach whatever was differentiated: the adapters, if they were an argument.
    """
    _check(network, adapters)

    def value(path: str, w: Weight) -> Any:
        return Adapted(w.get_value(), adapters[path]) if path in adapters else w.get_value()

    return Network(network.graph, map_weights(value, network.weights))


def merged(network: Network, adapters: Adapters, scale: float = 1.0) -> Network:
    """The network with `scale` times the adapters added to its weights: computed in float32, and rounded once to their dtype.

    Weights that change are given up, one by one, so that no more than one is there twice; the others stay as they are.
    """
    _check(network, adapters)

    def value(path: str, w: Weight) -> Any:
        old = w.get_value()
        if path not in adapters:
            return old
        adapter = adapters[path]
        add = jax.jit(_sum, static_argnames=("dims", "inputs", "stacked"), out_shardings=old.sharding)
        factor = adapter.scale * scale
        new = add(old, adapter.a, adapter.b, factor, dims=w.dims, inputs=adapter.inputs, stacked=is_stacked(w))
        jax.block_until_ready(new)
        old.delete()
        return new

    return Network(network.graph, map_weights(value, network.weights))


def _sum(w: jax.Array, a: jax.Array, b: jax.Array, factor: Any, *, dims: str, inputs: str, stacked: bool) -> jax.Array:
    letters = f"{dims.removesuffix(inputs)}R,R{inputs}->{dims}"

    def add(each: tuple[jax.Array, ...]) -> jax.Array:
        w, a, b = each
        change = jnp.einsum(letters, b.astype(jnp.float32), a.astype(jnp.float32), precision="highest")  # no TF32, 10 bits
        return (w.astype(jnp.float32) + factor * change).astype(w.dtype)

    return jax.lax.map(add, (w, a, b)) if stacked else add((w, a, b))  # the float32 numbers of a layer at a time


def _check(network: Network, adapters: Adapters) -> None:
    """Raises InputError for adapters of what the network does not have."""
    if strange := sorted(adapters.keys() - by_path(network.weights).keys()):
        raise InputError(f"adapters: {', '.join(strange)} are no weights of this network; is it the other tower?")

"""What is trained: whole towers, or low-rank adapters of them; float32, whatever dtype is computed in.

Trained values are a plain tree, {"gen": {"layers.q": array, …}}, which optax and Orbax take as it is; `networks` makes of them,
and of what is frozen, the networks that run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from cosmos3_jax.weights import Network, by_path, map_weights

Values = dict[str, dict[str, Any]]
"""Part ("und", "gen") and path in its network -> what is trained there."""


class Trained(Protocol):
    """What is trained, as `update` and the files of a run need it. Hashable: a compiled step belongs to one."""

    def networks(self, values: Values, frozen: Mapping[str, Network]) -> dict[str, Network]:
        """Both towers, in the dtype that is computed in. Inside jit: `values` have gradients, `frozen` are data."""


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """Every weight of some towers."""

    graphs: Mapping[str, Network]  # abstract networks of these towers
    dtype: Any  # that is computed in

    def networks(self, values: Values, frozen: Mapping[str, Network]) -> dict[str, Network]:
        made = {}
        for part, network in self.graphs.items():

            def value(path: str, w: Any, of: dict[str, Any] = values[part]) -> jax.Array:
                return of[path].astype(jnp.float32 if w.float32 else self.dtype)

            made[part] = Network(network.graph, map_weights(value, network.weights))
        return {**frozen, **made}


def values_of(networks: Mapping[str, Network]) -> Values:
    """The weights of networks, to begin with."""
    return {part: {path: w.get_value() for path, w in by_path(network.weights).items()} for part, network in networks.items()}

"""What is trained: whole towers, or low-rank adapters of them; float32, whatever dtype is computed in.

Trained values are a plain tree, {"gen": {"layers.q": array, …}}, which optax and Orbax take as it is; `networks` makes of them,
and of what is frozen, the networks that run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from cosmos3_jax.lora import Adapter, adapted
from cosmos3_jax.weights import Network, by_path, map_weights

Values = dict[str, dict[str, Any]]
"""Part ("und", "gen") and path in its network -> what is trained there: an array, or of an adapter both, by "a" and "b"."""


class Trained(Protocol):
    """What is trained, as `update` and the files of a run need it."""

    def networks(self, values: Values, frozen: Mapping[str, Network]) -> dict[str, Network]:
        """Both towers, in the dtype that is computed in. Inside jit: `values` have gradients, `frozen` are data."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """The weights of some towers: all that there are values for."""

    abstract: Mapping[str, Network]  # these towers
    dtype: Any  # that is computed in

    def networks(self, values: Values, frozen: Mapping[str, Network]) -> dict[str, Network]:
        made = {}
        for part, network in self.abstract.items():
            fixed = by_path(frozen[part].weights)

            def value(path: str, w: Any, of: dict[str, Any] = values[part], fixed: Any = fixed) -> jax.Array:
                return of[path].astype(jnp.float32 if w.float32 else self.dtype) if path in of else fixed[path].get_value()

            made[part] = Network(network.graph, map_weights(value, network.weights))
        return {**frozen, **made}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Low-rank adapters of some weights of some towers, which stay as they are."""

    abstract: Mapping[str, Mapping[str, Adapter]]

    def networks(self, values: Values, frozen: Mapping[str, Network]) -> dict[str, Network]:
        made = {part: adapted(frozen[part], adapters) for part, adapters in self.adapters(values).items()}
        return {**frozen, **made}

    def adapters(self, values: Values) -> dict[str, dict[str, Adapter]]:
        """The adapters with these values, by part and path."""

        def adapter(part: str, path: str) -> Adapter:
            return dataclasses.replace(self.abstract[part][path], **values[part][path])

        return {part: {path: adapter(part, path) for path in of} for part, of in values.items()}

    @staticmethod
    def values(adapters: Mapping[str, Mapping[str, Adapter]]) -> Values:
        """What of adapters is trained."""
        return {part: {path: {"a": x.a, "b": x.b} for path, x in of.items()} for part, of in adapters.items()}


def values_of(networks: Mapping[str, Network]) -> Values:
    """The weights of networks, to begin with."""
    return {part: {path: w.get_value() for path, w in by_path(network.weights).items()} for part, network in networks.items()}

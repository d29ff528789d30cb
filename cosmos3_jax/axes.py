"""The letters: what every dimension is called, and which mesh axis it is divided over.

Arrays end in their shape, one letter a dimension (`k_LBSKH`), and a weight is declared by its letters (`"NHD"`). The
whole sharding policy of the transformer is the table `MESH_AXIS`: a letter that is not in it is whole on every device.
Pixels and latents are not lettered here; they use lower-case t h w c.

    B  CFG branch: row 0 conditional, row 1 unconditional (one row when guidance is off)
    S  text tokens of a prompt, padded to its bucket         L  layers
    G  generated tokens (vision, then sound, then action)    D  model width
    Q  queries of an attention: S or G                       N  query heads
    M  keys of an attention: G + S                           K  key/value heads
    C  channels of one latent patch                          H  head dimension
    E  frequencies of the timestep embedding                 F  width of the MLP
    V  vocabulary
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cosmos3_jax.config import InputError

MESH_AXIS = {"B": "cfg", "N": "tp", "K": "tp", "F": "tp"}


def make_mesh(cfg: int = 1, tp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh `("cfg", "tp")` over the first cfg x tp of `devices` (all that JAX sees, if not given).

    cfg is outermost: with cfg=2 the first half of the devices holds the conditional branch. Raises InputError where
    the mesh does not fit the devices.
    """
    present = list(jax.devices() if devices is None else devices)
    if cfg not in (1, 2):
        raise InputError(f"cfg={cfg}: guidance has two branches; use cfg=1 or cfg=2")
    if tp < 1:
        raise InputError(f"tp={tp}: tensor parallelism needs at least one device; use tp=1 or more")
    if cfg * tp > len(present):
        fits = min(cfg, len(present))
        raise InputError(
            f"cfg={cfg} x tp={tp} needs {cfg * tp} devices, but there are {len(present)}; "
            f"cfg={fits} x tp={len(present) // fits} would fit"
        )
    grid = np.array(present[: cfg * tp]).reshape(cfg, tp)
    return Mesh(grid, ("cfg", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))


def spec(dims: str) -> PartitionSpec:
    """How an array with these letters is divided: `spec("NHD")` is `P("tp", None, None)`."""
    return PartitionSpec(*(MESH_AXIS.get(letter) for letter in dims))


def sharding(mesh: Mesh, dims: str) -> NamedSharding:
    """The placement on `mesh` of an array with these letters; `""` is whole on every device."""
    return NamedSharding(mesh, spec(dims))


def inside_mesh() -> bool:
    """Whether the code being traced runs under `jax.set_mesh`; layers called alone, as in tests, do not."""
    return not jax.sharding.get_abstract_mesh().empty


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """`x`, divided by its letters over the current mesh; `x` itself outside a mesh."""
    return jax.lax.with_sharding_constraint(x, spec(dims)) if inside_mesh() else x

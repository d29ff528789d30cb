"""The letters: what every dimension is called, and which mesh axis it is divided over.

Arrays end in their shape, one letter a dimension (`k_LBSKH`), and a weight is declared by its letters (`"NHD"`). The
whole sharding policy is the table `MESH_AXIS`: a letter that is not in it is whole on every device.

    B  CFG branch: row 0 conditional, row 1 unconditional (one row when guidance is off); in training, a clip
    S  text tokens of a prompt, padded to its bucket         L  layers
    G  generated tokens (vision, then sound)    D  model width
    Q  queries of an attention: S or G                       N  query heads
    M  keys of an attention: G + S                           K  key/value heads
    C  channels of one latent patch                          H  head dimension
    E  frequencies of the timestep embedding                 F  width of the MLP
    V  vocabulary                                            A  channels of one sound latent
    R  rank of an adapter (lora.py)

Pixels and latents use lower-case t h w c (frames, rows, columns, channels), sound latents s c, and sound n c (n samples). Rows
and columns are divided while a video is decoded, by the same devices in another arrangement (`picture_mesh`).
"""

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cosmos3_jax.errors import InputError, first_line, shown

MESH_AXIS = {"B": "cfg", "N": "tp", "K": "tp", "F": "tp", "h": "h", "w": "w"}


def make_mesh(cfg: int = 1, tp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh `("cfg", "tp")` over the first cfg x tp of `devices` (all that JAX sees, if not given).

    cfg is outermost: with cfg=2 the first half of the devices holds the conditional branch. Raises InputError where
    the mesh does not fit the devices.
    """
    present = _devices() if devices is None else list(devices)
    if not present:
        raise InputError("devices: at least one is expected")
    if not isinstance(cfg, numbers.Integral) or cfg not in (1, 2):
        raise InputError(f"cfg={shown(cfg)}: guidance has two branches; use cfg=1 or cfg=2")
    if not isinstance(tp, numbers.Integral) or tp < 1:
        raise InputError(f"tp={shown(tp)}: tensor parallelism needs at least one device; use tp=1 or more")
    used = present[: cfg * tp]
    if len(used) < cfg * tp:
        fits = min(cfg, len(present))
        tp_that_fits = 2 ** int(math.log2(len(present) // fits))  # the published numbers of heads are powers of two
        raise InputError(
            f"cfg={cfg} x tp={tp} needs {cfg * tp} devices, but there are {len(present)}; --cfg {fits} --tp {tp_that_fits} fits"
        )
    if idle := _processes(present) - _processes(used):
        raise InputError(
            f"cfg={cfg} x tp={tp} takes {len(used)} of {len(present)} devices and leaves process {min(idle)} without one; "
            "take more of them, or start fewer processes"
        )
    return _mesh(np.array(used).reshape(cfg, tp), ("cfg", "tp"))


def picture_mesh(mesh: Mesh, h: int, w: int) -> Mesh:
    """The devices of `mesh`, in the same order, as a mesh `("h", "w")` that divides h rows and w columns.

    Of all arrangements, the one that pads h and w least to divide evenly; of these, the one with the shortest borders.
    """
    count = mesh.size

    def cost(rows: int) -> tuple[int, int]:
        columns = count // rows
        return padded(h, rows) * padded(w, columns), (rows - 1) * w + (columns - 1) * h

    rows = min((rows for rows in range(1, count + 1) if count % rows == 0), key=cost)
    return _mesh(mesh.devices.reshape(rows, count // rows), ("h", "w"))


def padded(size: int, parts: int) -> int:
    """`size` with what it lacks to divide into `parts`; at least 3, if it is divided at all."""
    if parts > 1:
        size = max(size, 3)  # 2 rows over 2 devices: XLA's partitioner gets a 3x3 convolution wrong (as of jax 0.12)
    return -(-size // parts) * parts


def _devices() -> list[jax.Device]:
    """All that JAX sees. Raises InputError where there are none, as where JAX_PLATFORMS asks for others than there are."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: cuda without a GPU (as of jax 0.10)
        if not (asked := jax.config.jax_platforms):  # type: ignore[attr-defined]
            raise InputError(f"JAX finds no devices: {first_line(error)}") from error
        raise InputError(
            f"JAX_PLATFORMS={asked}: JAX finds no such devices ({first_line(error)}); unset it, or mend the driver"
        ) from error


def _processes(devices: Sequence[jax.Device]) -> set[int]:
    return {getattr(device, "process_index", 0) for device in devices}


def _mesh(devices: np.ndarray, names: tuple[str, ...]) -> Mesh:
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def spec(dims: str, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array with these letters is divided over `mesh`: `spec("NHD", mesh)` is `P("tp", None, None)`.

    A letter whose axis the mesh does not have, and any other sign ("."), is whole.
    """
    axes = (MESH_AXIS.get(letter) for letter in dims)
    return PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in axes))


def sharding(mesh: Mesh, dims: str) -> NamedSharding:
    """The placement on `mesh` of an array with these letters; `""` is whole on every device."""
    return NamedSharding(mesh, spec(dims, mesh))


def place(mesh: Mesh, tree: Any) -> Any:
    """Host arrays, whole on every device of `mesh`. Every process must give the same: nobody checks, nobody sends."""

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding(mesh, ""), lambda index: x[index])

    return jax.tree.map(put, tree)


def current_mesh() -> AbstractMesh | None:
    """The mesh under which the code being traced runs (`jax.set_mesh`); none for layers called alone, as in tests."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """`x`, divided by its letters over the current mesh (`""`: whole everywhere); `x` itself outside a mesh."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(dims, mesh))


def agreed(x: jax.Array) -> jax.Array:
    """The largest of what the devices of the current mesh have for `x`, for all: a decision on it is the same everywhere."""
    mesh = current_mesh()
    if mesh is None:
        return x
    largest = functools.partial(jax.lax.pmax, axis_name=mesh.axis_names)
    return jax.shard_map(largest, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)(x)

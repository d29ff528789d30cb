"""Letters and meshes: which device gets which part, and what a mesh that does not fit is told."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from cosmos3_jax.axes import constrain, current_mesh, make_mesh, padded, picture_mesh, place, sharding, spec
from cosmos3_jax.errors import InputError


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ("", P()),
        ("D", P(None)),
        ("NHD", P("tp", None, None)),
        ("DNH", P(None, "tp", None)),
        ("LBSKH", P(None, "cfg", None, "tp", None)),
        ("DF", P(None, "tp")),
        ("VD", P(None, None)),
    ],
)
def test_letters_say_how_an_array_is_divided(dims, expected):
    assert spec(dims, AbstractMesh((2, 4), ("cfg", "tp"))) == expected


def test_a_letter_is_whole_where_the_mesh_has_no_such_axis():
    assert spec("thwc", AbstractMesh((2, 4), ("cfg", "tp"))) == P(None, None, None, None)
    assert spec("thwc", AbstractMesh((2, 4), ("h", "w"))) == P(None, "h", "w", None)
    assert spec("BSN", AbstractMesh((2, 4), ("h", "w"))) == P(None, None, None)


def test_each_device_holds_its_heads_of_its_branch():
    mesh = AbstractMesh((2, 4), ("cfg", "tp"))
    assert sharding(mesh, "BSKH").shard_shape((2, 128, 8, 64)) == (1, 128, 2, 64)
    assert sharding(mesh, "").shard_shape((2, 128, 8, 64)) == (2, 128, 8, 64)


def test_cfg_is_outermost():
    # A mesh only arranges its devices: numbers stand in for those that this machine does not have.
    mesh = make_mesh(cfg=2, tp=3, devices=range(8))
    assert mesh.axis_names == ("cfg", "tp")
    np.testing.assert_array_equal(mesh.devices, [[0, 1, 2], [3, 4, 5]])


def test_one_device_is_the_default():
    assert make_mesh().devices.tolist() == [[jax.devices()[0]]]


@pytest.mark.parametrize(
    ("cfg", "tp", "count", "message"),
    [
        (3, 1, 8, "cfg=3: guidance has two branches; use cfg=1 or cfg=2"),
        (0, 1, 8, "cfg=0: guidance has two branches; use cfg=1 or cfg=2"),
        (1, 0, 8, "tp=0: tensor parallelism needs at least one device; use tp=1 or more"),
        (2.0, 1, 8, "cfg=2.0: guidance has two branches; use cfg=1 or cfg=2"),
        (1, "2", 8, "tp='2': tensor parallelism needs at least one device; use tp=1 or more"),
        (2, 8, 8, "cfg=2 x tp=8 needs 16 devices, but there are 8; --cfg 2 --tp 4 fits"),
        (1, 4, 3, "cfg=1 x tp=4 needs 4 devices, but there are 3; --cfg 1 --tp 2 fits"),
        (2, 1, 1, "cfg=2 x tp=1 needs 2 devices, but there are 1; --cfg 1 --tp 1 fits"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(cfg, tp, count, message):
    with pytest.raises(InputError) as error:
        make_mesh(cfg, tp, devices=range(count))
    assert str(error.value) == message


@pytest.mark.parametrize("raised", [RuntimeError("Unable to initialize backend 'cuda'"), AssertionError()])
def test_devices_that_jax_cannot_find_are_told(monkeypatch, raised):
    monkeypatch.setattr(jax, "devices", lambda: (_ for _ in ()).throw(raised))
    with pytest.raises(InputError, match=r"JAX_PLATFORMS=cpu: JAX finds no such devices \(.+\); unset it, or mend the driver"):
        make_mesh()


def test_no_devices_at_all_are_told(monkeypatch):
    def fails():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    before = jax.config.jax_platforms
    monkeypatch.setattr(jax, "devices", fails)
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(InputError, match=r"^JAX finds no devices: Unable to initialize backend 'cuda'$"):
            make_mesh()
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("h", "w", "count", "expected"),
    [
        (45, 80, 1, (1, 1)),
        (45, 80, 8, (1, 8)),  # 720p: ten columns each, nothing padded
        (80, 45, 8, (8, 1)),
        (30, 52, 8, (2, 4)),  # 480p: no other way pads nothing
        (12, 20, 8, (2, 4)),
        (45, 45, 8, (1, 8)),  # all pad: 45 x 48 is the least
        (16, 16, 8, (2, 4)),  # none pads: 2 x 4 has the shortest borders
        (2, 2, 8, (2, 4)),
        (45, 80, 6, (3, 2)),
    ],
)
def test_a_picture_is_divided_where_it_pads_least(h, w, count, expected):
    devices = np.arange(count)
    mesh = picture_mesh(make_mesh(tp=count, devices=devices), h, w)
    assert tuple(mesh.shape.items()) == tuple(zip("hw", expected, strict=True))
    np.testing.assert_array_equal(mesh.devices.reshape(-1), devices)  # another order would move the weights


@pytest.mark.parametrize(
    ("size", "parts", "expected"),
    [(45, 8, 48), (80, 8, 80), (1, 1, 1), (2, 1, 2), (2, 2, 4), (3, 3, 3), (1, 4, 4)],
)
def test_padded(size, parts, expected):
    assert padded(size, parts) == expected


def test_constrain_needs_no_mesh():
    x = jnp.ones((2, 3, 4))
    assert constrain(x, "BSD") is x
    assert current_mesh() is None


def test_constrain_divides_inside_a_mesh():
    x = jnp.ones((2, 3, 4))
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        assert current_mesh() == mesh.abstract_mesh
        (constraint,) = jax.jit(lambda x: constrain(x, "BSN")).trace(x).jaxpr.eqns
    assert constraint.params["sharding"].spec == P("cfg", None, "tp")


@pytest.mark.parametrize(("cfg", "tp", "idle"), [(1, 4, 1), (2, 2, 1), (1, 1, 1), (1, 8, 2)])
def test_every_process_takes_part(cfg, tp, idle):
    # One without a device of the mesh would have no part of any array, and end in the middle with an error of JAX's.
    devices = [types.SimpleNamespace(process_index=i // 4) for i in range(4 * idle + 4)]
    with pytest.raises(InputError) as error:
        make_mesh(cfg, tp, devices)
    assert str(error.value) == (
        f"cfg={cfg} x tp={tp} takes {cfg * tp} of {len(devices)} devices and leaves process {idle} without one; "
        "take more of them, or start fewer processes"
    )


def test_what_is_placed_is_whole_on_every_device():
    mesh = make_mesh(cfg=2, tp=4)
    tree = np.arange(6, dtype=np.float32).reshape(2, 3), {"flags": np.array([True, False]), "one": np.array(7, np.int32)}
    placed = place(mesh, tree)
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    for there, here in zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True):
        assert there.dtype == here.dtype
        assert {shard.device for shard in there.addressable_shards} == set(mesh.devices.flat)
        for shard in there.addressable_shards:
            np.testing.assert_array_equal(shard.data, here)

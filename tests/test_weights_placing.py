"""Placing a weight: each part is written once, and lies on the devices that hold it, whatever the mesh."""

import gc
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cosmos3_jax import weights
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.config import TINY
from cosmos3_jax.weights import by_path, place_weight, plain, split, stack, vector, weight

MESHES = [(1, 1), (1, 2), (2, 1), (2, 4), (1, 8)]


class Layer(nnx.Module):
    """Divided by rows, divided by columns, whole, and one that stays float32."""

    def __init__(self):
        self.q = weight(TINY, "NHD")
        self.down = weight(TINY, "DF")
        self.scale = vector(TINY, "D")
        self.time = weight(TINY, "DE", float32=True)


class Modules(nnx.Module):
    """Weights of every kind: stacked, of no layers at all, of one layer, a convolution and a number."""

    def __init__(self):
        self.layers = stack(3, Layer())
        self.none = stack(0, Layer())
        self.last = Layer()
        self.kernel = plain((9, 4, 6), file_shape=(6, 4, 3, 3))
        self.number = plain((), file_shape=())


PATHS = sorted(by_path(nnx.split(Modules())[1]))


def abstract(path: str, cfg: int, tp: int, dtype: str = "float32") -> weights.Weight:
    return by_path(split(Modules(), make_mesh(cfg, tp), jnp.dtype(dtype)).weights)[path]


def numbered(w: weights.Weight) -> np.ndarray:
    """An array that differs everywhere, exact in bf16 up to 256 and rounded after that."""
    return np.arange(math.prod(w.shape), dtype=np.float32).reshape(w.shape)


def placed(w: weights.Weight) -> tuple[jax.Array, list]:
    """`numbered(w)` on the devices, and the indices that were asked for, in order."""
    asked = []

    def fill(buffer: np.ndarray, index: tuple[slice, ...]) -> None:
        asked.append(index)
        np.copyto(buffer, numbered(w)[index], casting="unsafe")

    return place_weight(w, fill), asked


def pointers(array: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_the_array_is_what_was_written(cfg, tp, dtype, path):
    w = abstract(path, cfg, tp, dtype)
    array, _ = placed(w)
    assert (array.shape, array.dtype, array.sharding) == (w.shape, w.dtype, w.get_value().sharding)
    assert array.dtype == ("float32" if path.endswith("time") else dtype)
    np.testing.assert_array_equal(np.asarray(array), numbered(w).astype(array.dtype))
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), numbered(w).astype(array.dtype)[shard.index])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_each_part_is_written_once_and_lies_once_in_memory(cfg, tp, path):
    """Not once for each device: CPUs that hold the same part share the buffer that was filled."""
    w = abstract(path, cfg, tp)
    array, asked = placed(w)
    divided = path.rpartition(".")[2] in ("q", "down")
    assert len(asked) == len({str(index) for index in asked}) == (tp if divided else 1)
    if array.size:
        assert len(set(pointers(array))) == len(asked)
        by_part = {
            (str(shard.index), pointer) for shard, pointer in zip(array.addressable_shards, pointers(array), strict=True)
        }
        assert len(by_part) == len(asked)


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_cpus_keep_the_buffer_as_it_was_filled(cfg, tp):
    addresses = []
    array = place_weight(abstract("layers.q", cfg, tp), lambda buffer, _: addresses.append(buffer.ctypes.data))
    assert set(pointers(array)) == set(addresses)
    assert all(address % 64 == 0 for address in addresses)


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
@pytest.mark.parametrize("path", ["layers.q", "last.down", "kernel"])
def test_one_buffer_at_a_time_where_devices_copy(cfg, tp, path, monkeypatch):
    """As on GPUs, whose memory is elsewhere: here the buffers lie where XLA cannot take them over."""
    memories, alive = [], []

    def misaligned(shape: tuple[int, ...], dtype) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = np.empty(nbytes + 128, np.uint8)
        memories.append(weakref.ref(memory))
        start = -memory.ctypes.data % 64 + 4
        return memory[start : start + nbytes].view(dtype).reshape(shape)

    monkeypatch.setattr(weights, "_buffer", misaligned)
    w = abstract(path, cfg, tp)

    def fill(buffer: np.ndarray, index: tuple[slice, ...]) -> None:
        gc.collect()
        alive.append(sum(memory() is not None for memory in memories))
        np.copyto(buffer, numbered(w)[index])

    array = place_weight(w, fill)
    np.testing.assert_array_equal(np.asarray(array), numbered(w))
    assert max(alive) == 1
    assert len(alive) == (1 if path == "kernel" else tp)


def test_what_fill_raises_comes_through():
    def fill(buffer: np.ndarray, index: tuple[slice, ...]) -> None:
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        place_weight(abstract("layers.q", 2, 4), fill)

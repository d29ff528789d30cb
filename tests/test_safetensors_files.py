"""Tensors are what was written, in however many files, from whatever place in them; and letting go of them changes nothing."""

import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cosmos3_jax import safetensors_files
from cosmos3_jax.errors import InputError
from cosmos3_jax.safetensors_files import DTYPES, INDEX, STEM, TensorFolder, in_shards, write_tensors

FILE = f"{STEM}.safetensors"
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (5, 3), (2, 3, 4, 5), (70_000,)]  # the last is larger than a page


def random_tensors(*dtypes) -> dict[str, np.ndarray]:
    """A tensor of every shape in every dtype."""
    random = np.random.RandomState(0)
    return {f"{np.dtype(d).name}.{shape}": random.standard_normal(shape).astype(d) for d in dtypes for shape in SHAPES}


def assert_same(folder, expected: dict[str, np.ndarray]) -> None:
    """Bit for bit, so that NaN is equal to itself."""
    opened = TensorFolder(folder)
    assert opened.problems == []
    assert opened.shapes() == {name: tensor.shape for name, tensor in expected.items()}
    for name, tensor in expected.items():
        view = opened.tensors[name].view()
        assert (view.dtype, view.shape, view.nbytes) == (tensor.dtype, tensor.shape, opened.tensors[name].nbytes)
        assert view.tobytes() == tensor.tobytes(), name


def split(tensors: dict[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    return [dict(list(tensors.items())[i::count]) for i in range(count)]


# Written and read


@pytest.mark.parametrize("dtypes", [*([dtype] for dtype in KINDS.values()), [*KINDS.values()]], ids=[*KINDS, "all"])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_what_is_written_is_read(tmp_path, dtypes, shards):
    tensors = random_tensors(*dtypes)
    write_tensors(tmp_path / "new", split(tensors, shards))
    assert_same(tmp_path / "new", tensors)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    if shards == 1:
        assert names == [FILE]
    else:
        assert names == [*(f"{STEM}-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)), INDEX]


@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_written_has_the_permissions_of_new_files(tmp_path, shards):
    (tmp_path / "new").touch()
    write_tensors(tmp_path, split(random_tensors(np.float32), shards))
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("shards", [1, 3])
def test_the_library_reads_what_is_written(tmp_path, shards):
    """And finds each tensor where the index says it is, and as many bytes."""
    tensors = random_tensors(*KINDS.values())
    write_tensors(tmp_path, split(tensors, shards))
    found = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    merged = {name: tensor for file in found.values() for name, tensor in file.items()}
    assert {name: tensor.tobytes() for name, tensor in merged.items()} == {name: t.tobytes() for name, t in tensors.items()}
    if shards > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, inside in found.items() for name in inside}
        assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}


@pytest.mark.parametrize("value", [np.nan, -0.0, np.inf, 1e-45], ids=str)
def test_odd_numbers_stay_as_they_are(tmp_path, value):
    tensors = {kind: np.full(3, value, np.float32).astype(dtype) for kind, dtype in KINDS.items()}
    write_tensors(tmp_path, [tensors])
    assert_same(tmp_path, tensors)


@pytest.mark.parametrize(
    "turn",
    [np.transpose, lambda x: x[::2], lambda x: x[:, ::-1], lambda x: np.broadcast_to(x[:1], x.shape)],
    ids=["transposed", "every second", "backwards", "repeated"],
)
def test_views_are_written_as_their_values(tmp_path, turn):
    tensor = turn(np.arange(24, dtype=np.float32).reshape(4, 6))
    write_tensors(tmp_path, [{"a": tensor}])
    assert_same(tmp_path, {"a": np.ascontiguousarray(tensor)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", range(1, 8))
def test_tensors_at_any_byte_of_a_file(tmp_path, kind, padding):
    """The format asks nothing of where the bytes begin: here by an odd length of the header."""
    tensor = np.arange(1, 6).astype(KINDS[kind])
    entry = {"a": {"dtype": kind, "shape": [5], "data_offsets": [0, tensor.nbytes]}}
    header = json.dumps(entry).encode() + b" " * padding
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header + tensor.tobytes())
    view = TensorFolder(tmp_path).tensors["a"].view()
    np.testing.assert_array_equal(view, tensor)
    np.testing.assert_array_equal(view.astype(np.float64) + 1, tensor.astype(np.float64) + 1)


def test_tensors_behind_odd_bytes_of_another(tmp_path):
    """A tensor of bytes before one of floats: the folder is told of, but what can be read is read."""
    save_file({"a": np.ones(3, np.int8), "b": np.arange(4, dtype=np.float32)}, tmp_path / FILE)
    opened = TensorFolder(tmp_path)
    assert opened.problems == ["odd kind: a is I8, expected F32, F16, BF16"]
    np.testing.assert_array_equal(opened.tensors["b"].view(), np.arange(4))


def test_a_tensor_cannot_be_written_to(tmp_path):
    write_tensors(tmp_path, [{"a": np.zeros(3, np.float32)}])
    view = TensorFolder(tmp_path).tensors["a"].view()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


# Let go


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_was_let_go_is_read_again(tmp_path, kind):
    """Its own views, old and new, and the neighbours' that share a page with it."""
    shapes = {"a": (3,), "b": (70_001,), "c": (5,), "d": (0,), "e": (4096,), "f": ()}
    tensors = {name: np.arange(math.prod(shape), dtype=np.float32).reshape(shape) % 251 for name, shape in shapes.items()}
    tensors = {name: tensor.astype(KINDS[kind]) for name, tensor in tensors.items()}
    write_tensors(tmp_path, [tensors])
    opened = TensorFolder(tmp_path)
    views = {name: tensor.view() for name, tensor in opened.tensors.items()}
    for name in [*shapes, *shapes]:
        opened.tensors[name].release()
        for other, tensor in tensors.items():
            assert views[other].tobytes() == opened.tensors[other].view().tobytes() == tensor.tobytes(), (name, other)


def resident(address: int) -> int:
    """Kilobytes of the mapping at an address that the system counts as this process's."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(span[1], 16) <= address < int(span[2], 16)
        elif found and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


def test_letting_go_gives_memory_back(tmp_path):
    """Opening reads no tensor, touching reads it, release gives it back."""
    tensor = np.ones(1 << 23, np.float32)  # 32 MiB; a system reads up to some MiB ahead
    write_tensors(tmp_path, [{"a": tensor}])
    opened = TensorFolder(tmp_path).tensors["a"]
    view = opened.view()
    address = view.ctypes.data
    assert resident(address) < 8 << 10
    assert view.sum() == tensor.size
    assert resident(address) > 30 << 10
    opened.release()
    assert resident(address) < 1 << 10
    assert view.sum() == tensor.size


# In shards


@pytest.mark.parametrize("limit", [1, 8, 12, 20, 10**9])
@pytest.mark.parametrize("sizes", [[], [2], [1, 1, 1, 1], [3, 1, 9, 0, 2, 2], [0, 0]], ids=str)
def test_shards_hold_everything_in_order_and_no_more_than_they_may(sizes, limit):
    tensors = [(str(i), np.zeros(size, np.float32)) for i, size in enumerate(sizes)]
    shards = list(in_shards(iter(tensors), limit))
    assert [name for shard in shards for name in shard] == [name for name, _ in tensors]
    nbytes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert all(n <= limit or len([t for t in shard.values() if t.size]) == 1 for n, shard in zip(nbytes, shards, strict=True))
    full = zip(nbytes, shards[1:], strict=False)
    assert all(n + next(iter(shard.values())).nbytes > limit for n, shard in full), "a shard that had room for the next tensor"


def test_no_tensors_are_a_folder_too(tmp_path):
    write_tensors(tmp_path, in_shards([]))
    assert_same(tmp_path, {})


def test_tensors_are_written_as_they_come(tmp_path):
    """A shard is on the disk before the next is made: memory need not hold two."""

    def shards():
        for i in range(3):
            assert len(list(tmp_path.glob("*.safetensors"))) == i
            yield {str(i): np.zeros(2, np.float32)}

    write_tensors(tmp_path, shards())
    assert TensorFolder(tmp_path).shapes() == {"0": (2,), "1": (2,), "2": (2,)}


def test_a_place_that_cannot_be_written_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device\nmore")

    monkeypatch.setattr(safetensors_files, "save_file", full)
    with pytest.raises(OSError, match=r"^No space left on device$"):
        write_tensors(tmp_path, [{"a": np.zeros(2, np.float32)}])


def test_the_kinds_are_those_of_the_format(tmp_path):
    for kind, dtype in DTYPES.items():
        save_file({"a": np.zeros(2, dtype)}, tmp_path / FILE)
        assert TensorFolder(tmp_path).tensors["a"].kind == kind


def test_problems_are_all_told_at_once(tmp_path):
    write_tensors(tmp_path, [{"a": np.zeros(2, np.float32)}, {"b": np.zeros(2, np.int32)}])
    first, second = (f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2))
    index = {"metadata": {"total_size": 3}, "weight_map": {"a": second, "c": first, "b": second}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert TensorFolder(tmp_path).problems == [
        f"index: c is not in {first}",
        f"index: a in {first} is not listed",
        f"index: a is not in {second}",
        "odd kind: b is I32, expected F32, F16, BF16",
        "index: total_size is 3, the tensors have 16 bytes",
    ]


@pytest.mark.parametrize("size", [None, ...], ids=str)
def test_an_index_need_not_tell_the_size(tmp_path, size):
    tensors = random_tensors(np.float32)
    write_tensors(tmp_path, split(tensors, 2))
    index = json.loads((tmp_path / INDEX).read_text())
    index["metadata"] = {} if size is ... else size
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert_same(tmp_path, tensors)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_tensors(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"^{tmp_path / name}: .*is the checkpoint complete\?$"):
        TensorFolder(tmp_path / name)

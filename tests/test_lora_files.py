"""Files of adapters: ours, diffusers' and peft's mean the same; what is wrong is said; and a video is made with them."""

import contextlib
import io
import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import cases
import jax
import ml_dtypes
import numpy as np
import pytest
from metrics import errors, random
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cosmos3_jax import Cosmos3Pipeline, InputError, RunError, dry_run, generate, make_mesh, networks, pipeline
from cosmos3_jax.conversion import convert
from cosmos3_jax.flags import file_and_scale
from cosmos3_jax.lora import Adapter, abstract_adapters
from cosmos3_jax.lora_files import CONFIG, METADATA, NAMES, check_loras, open_loras, read_adapters, write_adapters
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.weights import Network

SMALL = cases.FAMILIES["small"]  # three layers
GEN, UND = ("add_q_proj", "to_add_out", "mlp_moe_gen.down_proj"), ("to_q", "to_k", "to_out", "mlp.up_proj")
Q = "layers.1.self_attn.add_q_proj"
REQUEST = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "seed": 3, "progress": False}


def abstract(family: str = "small", cfg: int = 1, tp: int = 1) -> dict[str, Network]:
    return abstract_networks(cases.FAMILIES[family], cases.VAE, make_mesh(cfg, tp), "float32").by_name()


def trained(parts: dict[str, Network], family: str = "small", rank: int = 4, alpha: float = 6, targets=GEN + UND) -> dict:
    """Random adapters, the same on every mesh."""

    def draw(path, shape):
        x = random(*shape.shape, seed=sum(map(ord, jax.tree_util.keystr(path)))) * 0.1
        return jax.device_put(x, shape.sharding)

    shapes = abstract_adapters(parts, cases.FAMILIES[family], rank, alpha, targets)
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture
def written(tmp_path):
    """`written(**trained's words)`: a file."""

    def write(name: str = "a.safetensors", **how) -> Path:
        parts = abstract()
        write_adapters(tmp_path / name, trained(parts, **how), parts, SMALL)
        return tmp_path / name

    return write


def read(*asked, parts: dict[str, Network] | None = None, family: str = "small") -> dict[str, dict[str, Adapter]]:
    """The sum of files, by part and path."""
    parts, config = parts or abstract(family), cases.FAMILIES[family]
    loras = open_loras(asked)
    check_loras(loras, parts, config)
    return {part: found for part in parts if (found := read_adapters(loras, part, parts[part], config))}


def changes(adapters: dict[str, dict[str, Adapter]]) -> dict[str, np.ndarray]:
    """What is added to each weight, [(L,) outputs, inputs], in float64."""
    found = {}
    for part in adapters.values():
        for path, adapter in part.items():
            count = len(adapter.inputs)
            a, b = (np.asarray(x, np.float64) for x in (adapter.a, adapter.b))
            flat = a.reshape(*a.shape[:-count], -1)
            found[path] = adapter.scale * b.reshape(*flat.shape[:-2], -1, adapter.rank) @ flat
    return found


def assert_alike(one: dict, other: dict, factor: float = 1) -> None:
    one, other = changes(one), changes(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_allclose(one[path], factor * other[path], rtol=0, atol=2.0**-22 * np.abs(one[path]).max())


def contents(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(file, "numpy") as opened:
        return load_file(file), opened.metadata()


def rewrite(file: Path, change, metadata: dict | None = None) -> Path:
    """A file with its tensors changed in place by `change`, and other metadata if there are any."""
    tensors, before = contents(file)
    change(tensors)
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata=before if metadata is None else metadata)
    return file


def configured(file: Path, where: str, **settings) -> Path:
    """A file of plain names with peft's config in the metadata, as diffusers has it, or beside it."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"} | ({METADATA: json.dumps(settings)} if where == "metadata" else {}))
    if where == "beside":
        (file.parent / CONFIG).write_text(json.dumps(settings))
    return file


# There and back


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (2, 2)])
def test_what_is_written_is_read(family, cfg, tp, tmp_path):
    """Bit for bit, where it was."""
    parts = abstract(family, cfg, tp)
    made = trained(parts, family)
    write_adapters(tmp_path / "a.safetensors", made, parts, cases.FAMILIES[family])
    found = read(tmp_path / "a.safetensors", parts=parts, family=family)
    assert jax.tree.structure(found) == jax.tree.structure(made)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.sharding == y.sharding


def test_the_names_and_the_metadata(written):
    tensors, metadata = contents(written(targets=("add_q_proj", "to_k")))
    modules = [f"layers.{i}.self_attn.{name}" for name in ("add_q_proj", "to_k") for i in range(3)]
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"transformer.{module}.lora_{half}.weight": shape
        for module in modules
        for half, shape in (("A", (4, 64)), ("B", (128, 4)))
    }
    settings = json.loads(metadata.pop(METADATA))
    assert metadata == {"format": "pt"}
    assert settings == {
        "transformer.r": 4,
        "transformer.lora_alpha": 6.0,
        "transformer.target_modules": sorted(modules),
        "transformer.rank_pattern": {},
        "transformer.alpha_pattern": {},
    }


def test_ranks_and_alphas_that_differ_are_patterns(tmp_path):
    parts = abstract()
    made = trained(parts, targets=("to_q",)) | trained(parts, rank=3, alpha=5, targets=("add_q_proj",))
    write_adapters(tmp_path / "a.safetensors", made, parts, SMALL)
    settings = json.loads(contents(tmp_path / "a.safetensors")[1][METADATA])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 6)
    assert settings["transformer.rank_pattern"] == {f"layers.{i}.self_attn.add_q_proj": 3 for i in range(3)}
    assert settings["transformer.alpha_pattern"] == {f"layers.{i}.self_attn.add_q_proj": 5 for i in range(3)}
    assert_alike(read(tmp_path / "a.safetensors"), made)


@pytest.mark.parametrize("before", ["", "transformer.", "base_model.model.", "base_model.model.transformer."])
@pytest.mark.parametrize(("a", "b"), [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_names_of_others(written, before, a, b):
    expected = read(file := written())

    def rename(tensors):
        for name in list(tensors):
            other = name.replace("transformer.", before, 1).replace("lora_A", a).replace("lora_B", b)
            tensors[other] = tensors.pop(name)

    assert_alike(read(rewrite(file, rename)), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_other_dtypes_are_read(written, dtype):
    file = written()
    tensors, metadata = contents(file)
    rounded = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_file({name: tensor.astype(np.float32) for name, tensor in rounded.items()}, file, metadata=metadata)
    expected = read(file)
    save_file(rounded, file, metadata=metadata)
    assert_alike(read(file), expected)


# How much of it


@pytest.mark.parametrize("where", ["metadata", "beside"])
@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"r": 4, "lora_alpha": 6.5, "use_rslora": True}, 3.25),
        ({"r": 4}, 2),  # LoraConfig's own alpha is 8
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"add_q_proj": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_q": 1, r"layers\.\d+.*add_q_proj": 3}}, 0.75),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {f"^layers.{i}.self_attn.add_q_proj": 2 for i in range(3)}}, 0.5),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"q_proj": 2, "self_attn": 2, "layers": 2}}, 1.5),  # parts of names
        ({"r": 9, "lora_alpha": 6, "rank_pattern": {"add_q_proj": 4}}, 1.5),
        ({"transformer.r": 4, "transformer.lora_alpha": 6}, 1.5),
        ({"r": 4, "lora_alpha": 6, "bias": "none", "use_dora": False, "init_lora_weights": "gaussian"}, 1.5),
    ],
    ids=str,
)
def test_the_config_has_alpha(written, where, settings, scale):
    if where == "beside" and "transformer.r" in settings:
        settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    file = written(alpha=4, targets=("add_q_proj",))
    expected = read(file)
    assert_alike(read(configured(file, where, **settings)), expected, scale)


def test_without_a_config_alpha_is_the_rank(written):
    expected = read(file := written(alpha=4))
    assert_alike(read(configured(file, "nowhere")), expected)


@pytest.mark.parametrize("alpha", [np.float32(3), np.array([3], np.float16)], ids=str)
def test_alpha_of_a_module_counts_for_it(written, alpha):
    file = written(alpha=4, targets=("add_q_proj",))
    expected = changes(read(file))["layers.q"]
    found = changes(read(rewrite(file, lambda tensors: tensors.update({f"transformer.{Q}.alpha": np.asarray(alpha)}))))
    np.testing.assert_allclose(found["layers.q"], expected * np.array([1, 0.75, 1])[:, None, None], atol=1e-7)


def test_ranks_of_layers_may_differ_and_layers_be_left_out(written):
    """The largest is that of all, filled up with zeros; and each has its own scale."""
    file = written(alpha=4, targets=("add_q_proj", "to_k"))
    whole = changes(read(file))
    tensors = load_file(file)
    a, b = (tensors[f"transformer.{Q}.lora_{half}.weight"] for half in "AB")

    def cut(tensors):
        tensors[f"transformer.{Q}.lora_A.weight"], tensors[f"transformer.{Q}.lora_B.weight"] = a[:3], b[:, :3]
        for half in "AB":
            del tensors[f"transformer.layers.0.self_attn.add_q_proj.lora_{half}.weight"]
            del tensors[f"transformer.layers.1.self_attn.to_k.lora_{half}.weight"]

    settings = {"r": 4, "lora_alpha": 4, "rank_pattern": {Q: 3}, "alpha_pattern": {Q: 6}}
    found = changes(read(configured(rewrite(file, cut), "metadata", **settings)))
    expected = np.stack([np.zeros_like(whole["layers.q"][0]), 2.0 * b[:, :3] @ a[:3], whole["layers.q"][2]])
    np.testing.assert_allclose(found["layers.q"], expected, atol=1e-7)
    np.testing.assert_allclose(
        found["layers.keys_values.k"], whole["layers.keys_values.k"] * np.array([[[1]], [[0]]]), atol=1e-7
    )
    np.testing.assert_allclose(found["last.k"], whole["last.k"], atol=1e-7)


def test_files_add_with_their_scales(written):
    one, two = (
        written(targets=("add_q_proj", "to_q")),
        written("b.safetensors", rank=2, alpha=1, targets=("add_q_proj", "to_k")),
    )
    first, second = changes(read(one)), changes(read(two))
    found = changes(read((one, 0.5), [str(two), -2]))
    assert found.keys() == {"layers.q", "layers.keys_values.k", "last.k"}  # of both towers
    gen = changes({"gen": read((one, 0.5), (two, -2))["gen"]})["layers.q"]
    both = [changes({"gen": read(file)["gen"]})["layers.q"] for file in (one, two)]
    np.testing.assert_allclose(gen, 0.5 * both[0] - 2 * both[1], atol=1e-7)
    np.testing.assert_allclose(found["last.k"], -2 * second["last.k"], atol=1e-7)
    assert first.keys() == {"layers.q"}


def test_the_text_towers_last_layer_has_but_keys_and_values(written, caplog):
    """What others have trained of it has no effect, and that is said."""
    expected = read(file := written())
    dead = "transformer.layers.2.mlp.up_proj"
    rewrite(file, lambda tensors: tensors.update({f"{dead}.lora_{half}.weight": np.ones((4, 4), np.float32) for half in "AB"}))
    with caplog.at_level(logging.INFO):
        assert_alike(read(file), expected)
    assert caplog.messages == ["a.safetensors: without effect, for nothing reads the last text layer's output: " + dead[12:]]


# What is wrong


def put(**tensors):
    """A change: more or other tensors, of the module Q where nothing is before `lora_A` and the like."""
    own = re.compile("lora_[AB].weight|alpha")
    return lambda there: there.update(
        {f"transformer.{Q}.{name}" if own.fullmatch(name) else name: x for name, x in tensors.items()}
    )


def drop(*names):
    return lambda there: [there.pop(f"transformer.{Q}.{name}") for name in names]


F32, B32 = np.zeros((4, 64), np.float32), np.zeros((128, 4), np.float32)
FAULTS = {
    "no B": (drop("lora_B.weight"), [f"missing: {Q}.lora_B.weight"]),
    "no A": (drop("lora_A.weight"), [f"missing: {Q}.lora_A.weight"]),
    "alpha alone": (
        put(**{"transformer.layers.0.self_attn.add_k_proj.alpha": np.float32(1).reshape(1)}),
        [f"missing: layers.0.self_attn.add_k_proj.lora_{half}.weight" for half in "AB"],
    ),
    "inputs": (put(**{"lora_A.weight": F32[:, :60]}), [f"misshapen: {Q}.lora_A.weight is [4, 60], expected [4, 64]"]),
    "outputs": (put(**{"lora_B.weight": B32[:60]}), [f"misshapen: {Q}.lora_B.weight is [60, 4], expected [128, 4]"]),
    "unlike ranks": (put(**{"lora_B.weight": B32[:, :3]}), [f"misshapen: {Q}.lora_B.weight is [128, 3], expected [128, 4]"]),
    "a convolution": (
        put(**{"lora_A.weight": F32[..., None]}),
        [f"misshapen: {Q}.lora_A.weight is [4, 64, 1], expected [4, 64]"],
    ),
    "no rank": (
        put(**{"lora_A.weight": F32[:0], "lora_B.weight": B32[:, :0]}),
        [
            f"misshapen: {Q}.lora_A.weight is [0, 64], expected [R, 64]",
            f"misshapen: {Q}.lora_B.weight is [128, 0], expected [128, R]",
        ],
    ),
    "another rank": (
        put(**{"lora_A.weight": F32[:2], "lora_B.weight": B32[:, :2]}),
        [f"rank: {Q} has 2, in the config it is 4"],
    ),
    "no layer of this": (
        put(**{f"transformer.layers.3.self_attn.add_q_proj.lora_{half}.weight": x for half, x in (("A", F32), ("B", B32))}),
        ["unexpected: layers.3.self_attn.add_q_proj is no projection in the layers of this checkpoint"],
    ),
    "no projection": (
        put(**{f"proj_in.lora_{half}.weight": x for half, x in (("A", F32), ("B", B32))}),
        ["unexpected: proj_in is no projection in the layers of this checkpoint"],
    ),
    "no adapter": (put(**{"transformer.proj_in.weight": F32}), ["unexpected: transformer.proj_in.weight [4, 64]"]),
    "twice": (put(**{f"{Q}.lora_A.weight": F32}), [f"twice: {Q} also as transformer.{Q}.lora_A.weight"]),
    "odd kind": (
        put(**{"lora_A.weight": F32.astype(np.int32)}),
        [f"odd kind: transformer.{Q}.lora_A.weight is I32, expected F32, F16, BF16"],
    ),
    "alpha is none": (
        put(alpha=np.array(np.nan, np.float32)),
        [f"alpha: {Q}.alpha [] is nan, expected one number from -1000000 to 1000000"],
    ),
    "alphas": (
        put(alpha=np.ones(2, np.float32)),
        [f"alpha: {Q}.alpha [2] is nan, expected one number from -1000000 to 1000000"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said(written, fault):
    change, lines = FAULTS[fault]
    file = rewrite(written(targets=("add_q_proj",)), change)
    with pytest.raises(InputError) as error:
        read(file)
    assert str(error.value).split("\n  ") == [f"{file}: {len(lines)} fault{'s' if len(lines) > 1 else ''}", *lines]


def test_all_that_is_wrong_is_said_at_once(written):
    def break_it(tensors):
        drop("lora_B.weight")(tensors)
        put(**{"proj_in.weight": F32, "transformer.layers.0.self_attn.add_q_proj.lora_A.weight": F32[:, :1]})(tensors)

    with pytest.raises(InputError, match=r"(?s)^.*: 3 faults\n  unexpected: .*\n  misshapen: .*\n  missing: [^\n]*$"):
        read(rewrite(written(targets=("add_q_proj",)), break_it))


@pytest.mark.parametrize("tensors", [{}, {f"layers.2.self_attn.to_q.lora_{half}.weight": F32 for half in "AB"}], ids=len)
def test_a_file_without_effect_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"1 fault\n  missing: there is no lora_A and lora_B of any layer$"):
        read(tmp_path / "a.safetensors")


def test_another_family_is_refused(written):
    with pytest.raises(InputError, match=r"a.safetensors: \d\d faults\n  misshapen: layers.0.mlp.up_proj.lora_A.weight is "):
        read(written(), family="wide")


PLAIN = "; only plain LoRA can be added to the weights; train without it, or merge it with peft and load what that gives"
OTHER_TENSORS = {
    f"{Q}.lora_magnitude_vector": "DoRA",
    f"{Q}.lora_magnitude_vector.weight": "DoRA",
    f"{Q}.dora_scale": "DoRA",
    f"{Q}.lora_B.bias": "a bias",
    "proj_in.bias": "a bias",
    f"{Q}.lokr_w1": "LoKr",
    f"{Q}.hada_w1_a": "LoHa",
    "embed_tokens.lora_embedding_A": "an embedding's adapter",
}


@pytest.mark.parametrize("name", OTHER_TENSORS)
def test_what_is_more_than_lora_is_refused(written, name):
    file = rewrite(written(), put(**{name: F32}))
    with pytest.raises(InputError) as error:
        open_loras([file])
    assert str(error.value) == f"{file}: {name!a} is {OTHER_TENSORS[name]}{PLAIN}"


OTHER_SETTINGS = {
    "use_dora=True": {"use_dora": True},
    "lora_bias=True": {"lora_bias": True},
    r"modules_to_save=\['proj_in'\]": {"modules_to_save": ["proj_in"]},
    r"layer_replication=\[\[0, 2\]\]": {"layer_replication": [[0, 2]]},
    "peft_type='LOKR', bias='none', init_lora_weights=True": {"peft_type": "LOKR"},
    "peft_type='LORA', bias='all', init_lora_weights=True": {"bias": "all"},
    "peft_type='LORA', bias='none', init_lora_weights='pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
}


@pytest.mark.parametrize("where", ["metadata", "beside"])
@pytest.mark.parametrize("sentence", OTHER_SETTINGS)
def test_settings_that_are_more_than_lora_are_refused(written, where, sentence):
    file = configured(written(), where, r=4, lora_alpha=6, **OTHER_SETTINGS[sentence])
    place = rf"{file}: {METADATA}" if where == "metadata" else str(file.parent / CONFIG)
    with pytest.raises(InputError, match=f"^{place}: {sentence}{PLAIN}$"):
        open_loras([file])


BAD_CONFIGS = {
    "not JSON": ("{", "a JSON object is expected .*"),
    "a list": ("[]", "a JSON object is expected .*"),
    "twice": ('{"r": 4, "r": 4}', r"a JSON object is expected \(a key comes twice\)"),
    "deep": ("[" * 100_000, "a JSON object is expected .*"),
    "no rank": ('{"r": "4"}', "r='4': a number from .*"),
    "no alpha": ('{"lora_alpha": NaN}', "lora_alpha=nan: a number from .*"),
    "a long alpha": ('{"lora_alpha": 1%s}' % ("0" * 400), "lora_alpha=1000.*: a number from .*"),
    "no patterns": ('{"rank_pattern": [4]}', r"rank_pattern=\[4\]: an object is expected"),
    "no number": ('{"alpha_pattern": {"to_q": null}}', "alpha_pattern: 'to_q'=None: a number from .*"),
    "no pattern": (
        '{"alpha_pattern": {"(": 1}}',
        r"alpha_pattern: '\(' is no regular expression with at most 2 repetitions",
    ),
    "flags": ('{"rank_pattern": {"(?i)TO_Q": 1}}', r"rank_pattern: .* is no regular expression with at most 2 repetitions"),
    "nested": ('{"rank_pattern": {"(a+)+$": 1}}', r"rank_pattern: .* is no regular expression with at most 2 repetitions"),
    "many": ('{"rank_pattern": {".*.*.*.*.*=": 1}}', r"rank_pattern: .* is no regular expression with at most 2 .*"),
    "long": ('{"rank_pattern": {"%s": 1}}' % ("a" * 300), r"rank_pattern: .* is no regular expression with at most 2 .*"),
}


@pytest.mark.usefixtures("ten_seconds")
@pytest.mark.parametrize("bad", BAD_CONFIGS)
def test_a_config_that_is_none_is_refused(written, bad):
    text, sentence = BAD_CONFIGS[bad]
    file = rewrite(written(), lambda _: None, {METADATA: text})
    with pytest.raises(InputError) as error:
        open_loras([file])
    assert re.fullmatch(f"{file}: {METADATA}: {sentence}", str(error.value))


@pytest.fixture
def place(tmp_path, monkeypatch, written):
    """The working folder, with files and folders of every kind."""
    monkeypatch.chdir(tmp_path)
    written()
    for name, files in {
        "one": NAMES[:1],
        "peft": NAMES[1:2],
        "run": NAMES[2:],
        "both": NAMES,
        "none": ["a.safetensors"],
        "pickle": ["a.bin"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy("a.safetensors", tmp_path / name / file)
    (tmp_path / "no.safetensors").write_bytes(b"no header")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    return tmp_path


BAD_ITEMS = [
    (
        "a.safetensors",
        r"lora='a.safetensors': a list is expected, such as .*",
    ),
    (None, "lora=None: a list is expected, .*"),
    ([0.5], r'lora: 0.5: "FILE" or \("FILE", scale\) is expected'),
    ([("a.safetensors", 1, 2)], r'lora: \(.*, 1, 2\): "FILE" or \("FILE", scale\) is expected'),
    ([("a.safetensors", "1")], "lora: scale of a.safetensors='1': a number from -1000000 to 1000000 is expected"),
    ([("a.safetensors", float("inf"))], "lora: scale of a.safetensors=inf: a number from .*"),
    ([("a.safetensors", True)], "lora: scale of a.safetensors=True: a number from .*"),
    (["b.safetensors"], "lora: b.safetensors: there is no such file"),
    (["a\0b"], "lora: .*"),
    (["a" * 5000], "lora: .*: cannot be read .*"),
    (["both"], f"lora: both: {' and '.join(NAMES)} there; give the file itself"),
    (["none"], f"lora: none: none of {', '.join(NAMES)} there; give the file itself"),
    (["pickle/a.bin"], "lora: pickle/a.bin: pickle files are never opened; save it as safetensors"),
    (["no.safetensors"], "no.safetensors: not a safetensors file that can be read .*"),
    (["cut.safetensors"], "cut.safetensors: not a safetensors file that can be read .*"),
]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("asked", "sentence"), BAD_ITEMS, ids=lambda each: str(each)[:30])
def test_what_is_no_list_of_files_is_refused(asked, sentence):
    with pytest.raises(InputError) as error:
        open_loras(asked)
    assert re.fullmatch(sentence, str(error.value))


@pytest.mark.usefixtures("place")
def test_a_folder_of_any_kind_will_do():
    found = open_loras(["one", Path("peft"), "run", ("a.safetensors", np.float32(0.5))])
    assert [(lora.file.name, lora.scale) for lora in found] == [*((name, 1) for name in NAMES), ("a.safetensors", 0.5)]
    assert len({lora.sha256 for lora in found}) == 1


def test_a_config_beside_a_file_is_part_of_what_it_is(written):
    plain, found = written(), []
    for where in ("metadata", "plain"):  # one has its config in itself, and needs none
        tensors = load_file(plain)
        save_file(tensors, plain, metadata={METADATA: json.dumps({"lora_alpha": 1})} if where == "metadata" else None)
        for alpha in (1, 2):
            (plain.parent / CONFIG).write_text(json.dumps({"lora_alpha": alpha}))
            found.append(open_loras([plain])[0].identity)
    assert found[0] == found[1]
    assert found[2]["sha256"] == found[3]["sha256"]
    assert found[2]["config_sha256"] != found[3]["config_sha256"]


@pytest.mark.parametrize("where", ["no/a.safetensors", "a\0b", "x" * 300])
def test_a_file_that_cannot_be_written(tmp_path, where):
    parts = abstract()
    with pytest.raises(RunError, match=r"(?s): cannot be written \("):
        write_adapters(tmp_path / where, trained(parts), parts, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"a.safetensors: there are no adapters to be written$"):
        write_adapters(tmp_path / "a.safetensors", {}, abstract(), SMALL)


# A video


def opened(folder: Path, *asked, **how) -> Cosmos3Pipeline:
    return Cosmos3Pipeline.from_pretrained(folder, lora=list(asked), progress=False, **how)


def latents(pipe: Cosmos3Pipeline) -> np.ndarray:
    return pipe(cases.PROMPT, output_type="latent", **REQUEST).video


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory) -> Path:
    parts, file = abstract(), tmp_path_factory.mktemp("lora") / "style:1.safetensors"
    write_adapters(file, trained(parts), parts, SMALL)
    return file


@pytest.fixture(scope="module")
def expected(folders, lora_file) -> np.ndarray:
    return latents(opened(folders("small"), lora_file))


def test_a_lora_is_seen(expected, folders, lora_file, pipes):
    plain = latents(pipes("small"))
    assert errors(expected, plain)[0] > 0.05
    np.testing.assert_array_equal(latents(opened(folders("small"), (lora_file, 0))), plain)
    assert errors(latents(opened(folders("small"), (lora_file, 0.5), (lora_file, 0.5))), expected)[1] < 5e-5
    assert errors(latents(opened(folders("small"), (lora_file, 0.5))), expected)[0] > 0.02


@pytest.mark.parametrize(("cfg", "tp"), [(1, 2), (2, 4)])
def test_a_lora_on_a_mesh(expected, folders, lora_file, cfg, tp):
    assert errors(latents(opened(folders("small"), lora_file, mesh=make_mesh(cfg, tp))), expected)[1] < 5e-5


@pytest.mark.parametrize("text_tower", ["drop", "host"])
def test_a_lora_comes_back_with_the_weights(expected, folders, lora_file, text_tower, monkeypatch, compilations):
    """Short of memory, so that both towers leave; when they are read again, nothing is compiled anew."""
    monkeypatch.setattr(networks, "device_memory", lambda mesh: 1)
    pipe = opened(folders("small"), lora_file, text_tower=text_tower)
    for again in (False, True):
        compilations.clear()
        np.testing.assert_array_equal(latents(pipe), expected)
        assert not (again and compilations)


def test_a_lora_on_a_converted_folder(expected, folders, lora_file, tmp_path):
    convert(folders("small"), tmp_path / "converted")
    np.testing.assert_array_equal(latents(opened(tmp_path / "converted", lora_file)), expected)


def test_a_lora_is_there_before_fp8(expected, folders, lora_file):
    found = latents(opened(folders("small"), lora_file, quantize="fp8"))
    alone = latents(opened(folders("small"), quantize="fp8"))
    assert errors(found, expected)[0] < 0.5 * errors(alone, expected)[0]


@pytest.mark.parametrize("family", ["wide", "edge"])
def test_what_does_not_fit_is_refused_before_reading(family, folders, lora_file, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match=r"style:1.safetensors: \d+ faults\n  "):
        opened(folders(family), lora_file)


def test_a_result_tells_its_loras(folders, lora_file):
    metadata = opened(folders("small"), lora_file, (str(lora_file), 0.5))(cases.PROMPT, **REQUEST).metadata
    (one, half), sha256 = metadata["lora"], open_loras([lora_file])[0].sha256
    assert one == {"file": "style:1.safetensors", "sha256": sha256, "scale": 1.0}
    assert half == one | {"scale": 0.5}
    assert re.fullmatch("[0-9a-f]{64}", sha256)


# The command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        (r"C:\a.safetensors", (r"C:\a.safetensors", 1.0)),
        (r"C:\a.safetensors:2", (r"C:\a.safetensors", 2.0)),
        ("a:b:c", ("a:b:c", 1.0)),
        ("a:1:2", ("a:1", 2.0)),
        ("a:", ("a:", 1.0)),
        ("", ("", 1.0)),
    ],
)
def test_a_scale_is_a_number_after_the_last_colon(text, expected):
    assert file_and_scale(text) == expected


def run(*flags) -> dict:
    """The JSON of the last line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert generate.main(["--num-frames", "1", "--height", "32", "--width", "32", "--steps", "1", *map(str, flags)]) == 0
    return json.loads(out.getvalue().splitlines()[-1])


def test_the_command_line(folders, lora_file, tmp_path, monkeypatch):
    asked = ["--checkpoint", folders("small"), "--prompt", "waves", "--out", tmp_path / "a.png"]
    told = run(*asked, "--lora", lora_file, "--lora", f"{lora_file}:0.5")
    assert [(each["file"], each["scale"]) for each in told["lora"]] == [(lora_file.name, 1.0), (lora_file.name, 0.5)]
    with_lora = (tmp_path / "a.png").read_bytes()
    assert "lora" not in run(*asked)
    assert (tmp_path / "a.png").read_bytes() != with_lora
    monkeypatch.setattr(dry_run, "MESHES", ())  # but the one that is asked for
    assert "chosen" in run("--dry-run", "--lora", "not looked at")


def test_many_requests(folders, lora_file, tmp_path, written):
    """They are made anew if a LoRA or its scale changes, and not otherwise."""
    (tmp_path / "a.jsonl").write_text('{"name": "a", "prompt": "waves"}\n')
    asked = ["--checkpoint", folders("small"), "--requests", tmp_path / "a.jsonl", "--out-dir", tmp_path / "out"]
    other = written(alpha=3)
    for flags, made in [
        ((), True),
        (("--lora", lora_file), True),
        (("--lora", lora_file), False),
        (("--lora", f"{lora_file}:0.5"), True),
        (("--lora", other), True),
        (("--lora", other), False),
    ]:
        assert run(*asked, *flags)["done"] == (["a"] if made else []), flags


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert generate.main(["--lora", str(tmp_path / "a.safetensors:0.5"), "--out", str(tmp_path / "a.mp4")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: lora: {tmp_path / 'a.safetensors'}: there is no such file"


# The reference

CASE = cases.BASE | {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}


@pytest.fixture
def theirs(folders):
    """The reference's pipeline, and a function that runs CASE."""
    for name in ("torch", "diffusers", "peft"):
        pytest.importorskip(name)
    import reference

    return lambda family: reference.load(folders(family)), lambda pipe: reference.run(pipe, CASE)["latents"]


def our_latents(folder: Path, *asked, **how) -> np.ndarray:
    return opened(folder, *asked, dtype="float32", **how)(**CASE, output_type="latent", progress=False).video


@pytest.mark.live
@pytest.mark.parametrize(("family", "targets"), [("small", GEN), ("wide", UND), ("edge", (*GEN, "to_k", "up_proj"))])
def test_diffusers_reads_what_is_written(family, targets, theirs, folders, tmp_path):
    """With its alpha, and the same latents; within the tolerance of test_pipeline.py."""
    load, run = theirs
    parts, file, pipe = abstract(family), tmp_path / "a.safetensors", load(family)
    write_adapters(file, trained(parts, family, rank=4, alpha=6, targets=targets), parts, cases.FAMILIES[family])
    before = run(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pipe.transformer.load_lora_adapter(file, prefix="transformer", use_safetensors=True)
    (config,) = pipe.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 6)
    assert config.target_modules == set(json.loads(contents(file)[1][METADATA])["transformer.target_modules"])
    expected = run(pipe)
    assert errors(our_latents(folders(family), file), expected)[1] < 5e-5
    assert errors(expected, before)[0] > 0.02


@pytest.mark.live
def test_diffusers_reads_alpha_only_if_told_that_it_is_safetensors(theirs, tmp_path):
    """As `write_adapters` and the README say."""
    load, _ = theirs
    parts, file, pipe = abstract(), tmp_path / "a.safetensors", load("small")
    write_adapters(file, trained(parts, targets=GEN), parts, SMALL)
    pipe.transformer.load_lora_adapter(file, prefix="transformer")
    (config,) = pipe.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 4)


PATTERNS = {
    "gen": {"target_modules": list(GEN), "r": 4, "lora_alpha": 6},
    "und": {"target_modules": list(UND), "r": 2, "lora_alpha": 8},
    "all": {
        "target_modules": ["to_q", "to_k", "add_q_proj", "to_add_out", "up_proj"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"to_q": 3, "layers.1.self_attn.add_q_proj": 2},
        "alpha_pattern": {"up_proj": 2, r"layers\.[01]\.self_attn.to_k": 5, "^layers.2.self_attn.to_add_out": 1},
    },
    "rslora": {"target_modules": ["add_v_proj", "to_v"], "r": 4, "lora_alpha": 3, "use_rslora": True},
    "some layers": {
        "target_modules": ["add_k_proj", "to_k"],
        "r": 4,
        "lora_alpha": 6,
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
}


@pytest.mark.live
@pytest.mark.parametrize("how", ["diffusers", "peft"])
@pytest.mark.parametrize(
    ("name", "family"), [("gen", "small"), ("und", "edge"), ("all", "wide"), ("rslora", "small"), ("some layers", "small")]
)
def test_what_diffusers_and_peft_write_is_read(name, family, how, theirs, folders, tmp_path):
    load, run = theirs
    import peft
    import torch

    pipe, config = load(family), peft.LoraConfig(init_lora_weights=False, **PATTERNS[name])
    before = run(pipe)
    torch.manual_seed(0)
    if how == "diffusers":
        pipe.transformer.add_adapter(config)
    else:
        wrapped = peft.get_peft_model(pipe.transformer, config)
    with torch.no_grad():
        for parameter_name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.05)
    if how == "diffusers":
        pipe.transformer.save_lora_adapter(tmp_path)
    else:
        wrapped.save_pretrained(tmp_path)
    expected = run(pipe)
    assert errors(our_latents(folders(family), tmp_path), expected)[1] < 5e-5
    assert errors(expected, before)[0] > 0.02


@pytest.mark.live
def test_what_is_merged_is_what_diffusers_fuses(theirs, folders, lora_file):
    load, run = theirs
    pipe = load("small")
    pipe.transformer.load_lora_adapter(lora_file, prefix="transformer", use_safetensors=True)
    pipe.transformer.fuse_lora(lora_scale=0.5)
    assert errors(our_latents(folders("small"), (lora_file, 0.5)), run(pipe))[1] < 5e-5

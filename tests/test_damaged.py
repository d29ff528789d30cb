"""Folders that are damaged, or made to do harm: each is refused with a sentence, soon, before a weight is read.

What is opened is watched twice: Python's audit events see every path that Python opens, wherever it is, and inotify sees
whoever opens a file of the test's own folders, libraries in other languages too.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cosmos3_jax
from convert.random_checkpoint import write_checkpoint
from cosmos3_jax import Cosmos3Pipeline, InputError
from cosmos3_jax.config import TINY
from cosmos3_jax.safetensors_files import PICKLES, Tensor

CONFIG = dataclasses.replace(TINY, num_hidden_layers=2)
SECONDS = 20  # a folder of this size loads in 0.1 s
MEMORY = 1 << 30  # bytes that a refusal may take; the folder has 8 MB

STEM = "diffusion_pytorch_model"
FILE = f"{STEM}.safetensors"
SHARDS = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
FIRST, SECOND, VAE = f"transformer/{SHARDS[0]}", f"transformer/{SHARDS[1]}", f"vae/{FILE}"
SOUND, SOUND_CONFIG = f"sound_tokenizer/{FILE}", "sound_tokenizer/config.json"
INDEX = f"transformer/{FILE}.index.json"
MODEL, TRANSFORMER, VAE_CONFIG = "model_index.json", "transformer/config.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER, TOKENIZER_CONFIG = "text_tokenizer/tokenizer.json", "text_tokenizer/tokenizer_config.json"
TEMPLATE = "text_tokenizer/chat_template.jinja"
JSON = (MODEL, TRANSFORMER, VAE_CONFIG, SCHEDULER, INDEX, SOUND_CONFIG)

Damage = Callable[[Path], object]  # what it does to a folder, beside which there is the folder "outside"
Case = tuple[Damage, str]  # and a pattern that the sentence has

FAULTS = "faults? in the tensors"
UNREADABLE = "not a safetensors file that can be read"


# Damages


def write(name: str, content: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(name: str, keep: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def values(name: str, **changed: object) -> Damage:
    """Other values in a file of JSON; `...` takes a key away."""

    def damage(folder: Path) -> None:
        json_ = json.loads((folder / name).read_text()) | changed
        (folder / name).write_text(json.dumps({key: value for key, value in json_.items() if value is not ...}))

    return damage


def header(change: Callable[[dict], object], name: str = VAE) -> Damage:
    """Changes the header of a file of tensors, or puts what `change` returns in its place."""

    def damage(folder: Path) -> None:
        stored = (folder / name).read_bytes()
        length = int.from_bytes(stored[:8], "little")
        found = json.loads(stored[8 : 8 + length])
        found = change(found) or found
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + stored[8 + length :])

    return damage


def entry(tensor: str = "decoder.conv_in.bias", **changed: object) -> Damage:
    return header(lambda found: found[tensor].update(changed))


def header_length(length: int) -> Damage:
    return lambda folder: (folder / VAE).write_bytes(struct.pack("<Q", length) + (folder / VAE).read_bytes()[8:])


def tensors(change: Callable[[dict], dict], name: str = VAE) -> Damage:
    return lambda folder: save_file(change(load_file(folder / name)), folder / name)


def rename(old: str, new: str) -> Damage:
    """Other names for all tensors of the transformer, in its files and its index."""

    def damage(folder: Path) -> None:
        for name in (FIRST, SECOND):
            tensors(lambda found: {re.sub(old, new, key): value for key, value in found.items()}, name)(folder)
        index = json.loads((folder / INDEX).read_text())
        weight_map = {re.sub(old, new, key): file for key, file in index["weight_map"].items()}
        values(INDEX, weight_map=weight_map)(folder)

    return damage


def listed(tensor: str, file: object) -> Damage:
    """An entry of the index."""

    def damage(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        values(INDEX, weight_map=weight_map | {tensor: file})(folder)

    return damage


def forget(file: str) -> Damage:
    """An index that does not know a file."""

    def damage(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        values(INDEX, weight_map={name: place for name, place in weight_map.items() if place != file}, metadata={})(folder)

    return damage


def total_size(change: Callable[[int], object]) -> Damage:
    def damage(folder: Path) -> None:
        size = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
        values(INDEX, metadata={"total_size": change(size)})(folder)

    return damage


def move_out(name: str) -> Damage:
    """Puts a file or folder elsewhere and a link in its place."""

    def damage(folder: Path) -> None:
        target = folder.parent / "outside" / Path(name).name
        shutil.move(folder / name, target)
        (folder / name).symlink_to(target)

    return damage


def link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else than a file by the name of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def duplicate_first_key(name: str) -> Damage:
    """The first key of an object twice: another value first, and last the one that was there."""

    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        key = next(iter(json.loads(text)))
        (folder / name).write_text("{" + f'"{key}": 3, ' + text.lstrip()[1:])

    return damage


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickles(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        import pickle

        for name in names:
            write(name, pickle.dumps(Bomb(folder.parent / "outside" / "ran")))(folder)

    return damage


def remote_code(folder: Path) -> None:
    """A tokenizer that comes with a program."""
    write("text_tokenizer/code.py", f"import os\nos.mkdir({str(folder.parent / 'outside' / 'ran')!r})\nclass Mine: ...\n")(
        folder
    )
    values(TOKENIZER_CONFIG, auto_map={"AutoTokenizer": ["code.Mine", "code.Mine"]})(folder)


def elsewhere(key: str) -> Damage:
    """A tokenizer's config that names a file outside."""

    def damage(folder: Path) -> None:
        target = folder.parent / "outside" / "tokenizer.json"
        shutil.copy(folder / TOKENIZER, target)
        values(TOKENIZER_CONFIG, **{key: str(target)})(folder)

    return damage


def linked_template(folder: Path) -> None:
    """A link out of a folder within the tokenizer's."""
    target = folder.parent / "outside" / "default.jinja"
    shutil.copy(folder / TEMPLATE, target)
    (folder / "text_tokenizer" / "additional_chat_templates").mkdir()
    (folder / "text_tokenizer" / "additional_chat_templates" / "default.jinja").symlink_to(target)


def large_vocabulary(folder: Path) -> None:
    """Tokens that the model has no row for."""
    tokenizer = json.loads((folder / TOKENIZER).read_text())
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [first | {"id": 1000 + i, "content": f"<|{i}|>"} for i in range(100)]
    write(TOKENIZER, json.dumps(tokenizer))(folder)


# The table

TWICE = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
FILES: dict[str, Case] = {
    **{f"vae cut to {keep} bytes": (cut(VAE, keep), UNREADABLE) for keep in (0, 4, 8, 100, 20_000, -1)},
    "first shard cut": (cut(FIRST, -1), UNREADABLE),
    "a byte too many": (lambda folder: (folder / VAE).write_bytes((folder / VAE).read_bytes() + b"x"), UNREADABLE),
    **{f"header of {n} bytes": (header_length(n), UNREADABLE) for n in (0, 10, 10**8 + 1, 2**63, 2**64 - 1)},
    "header no JSON": (header(lambda _: b"{weights}"), UNREADABLE),
    "header not UTF-8": (header(lambda _: b'{"\xff":{}}'), UNREADABLE),
    "header a list": (header(lambda _: b"[]"), UNREADABLE),
    "header deep": (header(lambda _: DEEP.encode()), UNREADABLE),
    "header empty": (header(lambda _: b"{}"), UNREADABLE),
    "header of nothing but metadata": (write(VAE, struct.pack("<Q", 19) + b'{"__metadata__":{}}'), FAULTS),
    "a tensor twice in a header": (
        header(lambda found: json.dumps(found).replace("{", '{"decoder.conv_in.bias": ' + TWICE + ", ", 1).encode()),
        UNREADABLE,
    ),
    "offsets that overlap": (entry(data_offsets=[4, 196]), UNREADABLE),
    "offsets beyond the file": (entry(data_offsets=[10**12, 10**12 + 192]), UNREADABLE),
    "offsets reversed": (entry(data_offsets=[192, 0]), UNREADABLE),
    "offsets negative": (entry(data_offsets=[-192, 0]), UNREADABLE),
    "offsets fractional": (entry(data_offsets=[0.5, 192.5]), UNREADABLE),
    "offsets missing": (header(lambda found: found["decoder.conv_in.bias"].pop("data_offsets") and None), UNREADABLE),
    "unknown dtype": (entry(dtype="F7"), UNREADABLE),
    "shape beyond 64 bits": (entry(shape=[2**63, 2**63]), UNREADABLE),
    "shape negative": (entry(shape=[-48]), UNREADABLE),
    "float8": (entry(dtype="F8_E4M3", shape=[192]), r"odd kind: decoder\.conv_in\.bias is F8_E4M3, expected F32"),
    "int8": (entry(dtype="I8", shape=[192]), r"odd kind: decoder\.conv_in\.bias is I8"),
    "int32": (entry(dtype="I32"), r"odd kind: decoder\.conv_in\.bias is I32"),
    "float64": (entry(dtype="F64", shape=[24]), r"odd kind: decoder\.conv_in\.bias is F64"),
    "complex": (entry(dtype="C64", shape=[24]), r"odd kind: decoder\.conv_in\.bias is C64"),
    "another shape": (entry(shape=[6, 8]), r"misshapen: decoder\.conv_in\.bias is \[6, 8\], expected \[48\]"),
    "a scalar": (
        tensors(lambda t: t | {"decoder.conv_in.bias": np.ones((), np.float32)}),
        r"misshapen: decoder\.conv_in\.bias is \[\]",
    ),
    "a tensor missing": (
        tensors(lambda t: {k: v for k, v in t.items() if k != "decoder.conv_in.bias"}),
        r"missing: decoder\.conv_in\.bias",
    ),
    "a tensor too many": (tensors(lambda t: t | {"stray": np.zeros(2, np.float32)}), r"unexpected: stray \[2\]"),
    "a name that moves the cursor": (tensors(lambda t: t | {"\x1b[2J\r\n": np.zeros(2, np.float32)}), "unexpected: "),
    "only pickle files": (
        both(remove(VAE), pickles(f"vae/{STEM}.bin", "vae/model.pt")),
        rf"vae: no {re.escape(FILE)} .*\({STEM}\.bin, model\.pt: pickle files are never opened\)",
    ),
    "only pickle files with an index": (
        both(remove(VAE), pickles(f"vae/{STEM}-1.bin"), write(f"vae/{STEM}.bin.index.json", "{}")),
        "pickle files are never opened",
    ),
    "a pickle file by the name of safetensors": (pickles(VAE), UNREADABLE),
}
PLACES: dict[str, Case] = {
    "shard missing": (remove(SECOND), rf"{SHARDS[1]}: missing"),
    "index missing": (remove(INDEX), rf"{re.escape(FILE)}\.index\.json: missing"),
    "shard not listed": (forget(SHARDS[1]), rf"missing: (.|\n)*index: {SHARDS[1]} is not listed"),
    "tensor listed in another file": (
        lambda folder: [listed(name, SHARDS[1])(folder) for name in list(load_file(folder / FIRST))[:1]],
        rf"index: \S+ is not in {SHARDS[1]}",
    ),
    "tensor listed and nowhere": (listed("ghost", SHARDS[0]), rf"index: ghost is not in {SHARDS[0]}"),
    "tensor not listed": (tensors(lambda t: t | {"stray": np.zeros(2, np.float32)}, FIRST), "index: stray in .* is not listed"),
    "tensor in two files": (
        lambda folder: tensors(lambda t: t | dict([*load_file(folder / FIRST).items()][:1]), SECOND)(folder),
        r"twice: \S+ is also in",
    ),
    **{
        f"index lists {file!r:.40}": (listed("proj_in.bias", file), rf"{re.escape(FILE)}\.index\.json: .*safetensors")
        for file in (
            "../outside/outside.safetensors",
            "/etc/outside.safetensors",
            "..\\outside.safetensors",
            "\0.safetensors",
            "..",
            "",
            f"{STEM}.bin",
            f"{STEM}.pkl.safetensors/",
        )
    },
    "index lists a name too long": (listed("proj_in.bias", "a" * 5000 + ".safetensors"), r"safetensors"),
    "index lists half a character": (listed("proj_in.bias", "\ud800.safetensors"), r"safetensors"),
    **{
        f"index lists {file!r}": (listed("proj_in.bias", file), "weight_map from tensors to files is expected")
        for file in (3, None, [SHARDS[0]], {"file": SHARDS[0]})
    },
    **{f"weight_map {value!r}": (values(INDEX, weight_map=value), "a weight_map from tensors") for value in (..., [], {}, "a")},
    **{
        f"total_size {name}": (total_size(change), "index: total_size is ")
        for name, change in {
            "too large": lambda n: n + 1,
            "too small": lambda n: n - 1,
            "negative": lambda n: -n,
            "text": str,
            "huge": lambda n: 10**30,
        }.items()
    },
    **{
        f"link out of {name}": (move_out(name), rf"{re.escape(name)}: leads out of its folder")
        for name in (
            *JSON,
            FIRST,
            VAE,
            SOUND,
            TOKENIZER,
            TOKENIZER_CONFIG,
            TEMPLATE,
            "transformer",
            "vae",
            "scheduler",
            "text_tokenizer",
            "sound_tokenizer",
        )
    },
    "link out of a folder in the tokenizer's": (linked_template, "leads out of its folder"),
    "link to a device": (link(TRANSFORMER, "/dev/zero"), "leads out of its folder"),
    "link to nothing": (link(VAE, "gone.safetensors"), rf"{re.escape(VAE)}: missing"),
    **{f"link to itself: {name}": (link(name, Path(name).name), re.escape(name)) for name in (VAE, VAE_CONFIG, TOKENIZER)},
    "assets link out": (
        lambda folder: (folder / "assets").symlink_to(folder.parent / "outside"),
        "assets: leads out of its folder",
    ),
    **{f"folder instead of {name}": (instead(name, Path.mkdir), re.escape(name)) for name in (*JSON, FIRST, VAE, SOUND)},
    **{f"pipe instead of {name}": (instead(name, os.mkfifo), re.escape(name)) for name in (*JSON, FIRST, VAE, SOUND)},
    **{
        f"{name} instead of its folder": (
            lambda folder, name=name: (shutil.rmtree(folder / name), (folder / name).touch()),
            name,
        )
        for name in ("vae", "text_tokenizer")
    },
}
TEXTS: dict[str, Case] = {
    f"{name} {kind}": (damage(name), rf"{re.escape(name)}: {sentence}")
    for kind, (damage, sentence) in {
        "empty": (lambda name: write(name, b""), "not JSON"),
        "deep": (lambda name: write(name, DEEP), "not JSON"),
        "of 10,000 digits": (lambda name: write(name, '{"a": ' + "1" * 10_000 + "}"), "not JSON"),
        "in Latin-1": (lambda name: write(name, '{"a": "é"}'.encode("latin-1")), "not JSON"),
        "in UTF-16": (lambda name: write(name, '{"a": "b"}'.encode("utf-16")), "not JSON"),
        "a number": (lambda name: write(name, "3"), "a JSON object is expected"),
        "NaN": (lambda name: write(name, "NaN"), "a JSON object is expected"),
        "with a key twice": (duplicate_first_key, ".*(twice|duplicate)"),
    }.items()
    for name in JSON
}
INF, NAN = float("inf"), float("nan")
LIES: dict[str, dict[str, list[object]]] = {
    TRANSFORMER: {
        "hidden_size": [128, 10**12, 10**300, 0, -64, 64.0, 64.5, "64", NAN, [64], [[64]], {"size": 64}, True, None],
        "num_hidden_layers": [1, 3, 10**6, 10**9, 10**30, -1, 2.0],
        "intermediate_size": [161, 10**15],
        "num_attention_heads": [4, 7, 10**9],
        "num_key_value_heads": [3, 4, 10**9],
        "head_dim": [8, 17, 10**9],
        "vocab_size": [511, 10**15],
        "hidden_act": ["gelu", ["silu"], 3],
        "rms_norm_eps": [0, -1e-6, NAN, INF, "small", True],
        "qk_norm_for_text": [False, "yes", 1],
        "use_und_k_norm_for_gen": [1],
        "rope_theta": [NAN, INF, 0],
        "rope_axes_dim": [
            [4, 2],
            [4, 2, 2.0],
            ["4", "2", "2"],
            [100, 100, 100],
            [-4, 8, 4],
            [0, 0, 0],
            [[4], [2], [2]],
            [1] * 10**6,
            8,
        ],
        "latent_channel": [17, 10**12],
        "latent_patch_size": [1, 10**9],
        "patch_latent_dim": [63, "64", NAN],
        "timestep_scale": [NAN, INF, -1.0],
        "base_fps": [INF, 0],
        "sound_gen": [1, "true"],
        "sound_dim": [0, -8, 10**12, 10**300, 8.0, "8", NAN, [8], {"size": 8}, None],
        "unified_3d_mrope_temporal_modality_margin": [-1, 0.5, "far", NAN],
        "attention_bias": [True],
    },
    VAE_CONFIG: {
        "base_dim": [9, 10**12],
        "decoder_base_dim": [13, 10**12],
        "z_dim": [15, 10**9],
        "dim_mult": [
            [1] * 10**6,
            [],
            [1, 2, 4],
            [1, 2, 4, "4"],
            [0, 0, 0, 0],
            [-1, 2, 4, 4],
            [1.5, 2, 4, 4],
            [[1], 2, 4, 4],
            [10**12] * 4,
            4,
        ],
        "num_res_blocks": [10**9, 10**5, 3, 0, -1, "2"],
        "temperal_downsample": [[True] * 10**6, [], [False, True], [0, 1, 1], ["no", "yes", "yes"], [True, True, False]],
        "in_channels": [13],
        "out_channels": [13],
        "patch_size": [4],
        "scale_factor_spatial": [8, 10**9],
        "scale_factor_temporal": [3, 10**9],
        "latents_mean": [["a"] * 16, [NAN] * 16, [INF] * 16, [[0.0]] * 16, [0.0] * 15, "0" * 16],
        "latents_std": [[0.0] * 16, [-1.0] * 16, [NAN] * 16, [None] * 16, [[1.0]] * 16],
        "is_residual": [False, ...],
        "attn_scales": [[1.0]],
    },
    SOUND_CONFIG: {
        "sampling_rate": [0, -48000, 10**9, 48000.0, "48000", NAN, [48000], True],
        "vocoder_input_dim": [0, -8, 10**12, 8.0, "8", [8]],
        "dec_dim": [5, 0, -4, 10**9, 10**12, 4.0, "4"],
        "dec_c_mults": [
            [],
            [1, 2, 4],
            [1] * 10**6,
            [1, 2, 4, 8, 0],
            [-1, 2, 4, 8, 16],
            [1.0, 2, 4, 8, 16],
            ["1", 2, 4, 8, 16],
            [[1], 2, 4, 8, 16],
            [10**8] * 5,
            5,
        ],
        "dec_strides": [
            [],
            [2, 4, 5],
            [2] * 10**6,
            [2, 4, 5, 6, 0],
            [-2, 4, 5, 6, 8],
            [2.0, 4, 5, 6, 8],
            ["2", 4, 5, 6, 8],
            [True] * 5,
            [10**9] * 5,
            [10**8] * 5,
            "24568",
        ],
        "dec_out_channels": [1, 3, 0, -2, 10**9, "2"],
        "hop_size": [0, -1, 10**30, 1920.0, "1920", NAN, [1920], {"size": 1920}, True],
        "model_type": ["autoencoder_v1", 2, ["autoencoder_v2"]],
        "dec_type": ["hifigan"],
        "dec_use_snake": [False],
        "dec_final_tanh": [True],
        "dec_anti_aliasing": [True],
        "dec_use_nearest_upsample": [True],
        "activation": ["snake"],
        "snake_logscale": [False],
        "latent_mean": [0.5, [0.0] * 8],
        "latent_std": [2.0],
    },
    SCHEDULER: {
        "num_train_timesteps": [0, -1, "1000", 1000.5],
        "sigma_min": [NAN, INF, 0, 300.0],
        "sigma_max": [NAN, INF, 0.1],
        "solver_order": [3, "2"],
        "_class_name": ["DDIMScheduler", ["UniPCMultistepScheduler"]],
    },
}
SIZES: dict[str, Case] = {
    f"{name} {key}={value!r:.40}": (values(name, **{key: value}), rf"{re.escape(name)}: .*{key}|{FAULTS}")
    for name, lies in LIES.items()
    for key, lie in lies.items()
    for value in lie
} | {
    "quantized": (values(TRANSFORMER, quantization_config={"quant_method": "bitsandbytes"}), f"{TRANSFORMER}: quantiz"),
    **{
        f"{kind} of the sound decoder of {size}": (
            values(SOUND_CONFIG, dec_c_mults=[each] * count, dec_strides=[each] * count),
            rf"{re.escape(SOUND_CONFIG)}: |{FAULTS}",
        )
        for kind, size, each, count in [
            ("a block", "most", 10**8, 1),
            ("blocks", "least", 1, 900),
            ("blocks", "most", 10**8, 900),
        ]
    },
    "no blocks of the sound decoder": (values(SOUND_CONFIG, dec_c_mults=[], dec_strides=[]), re.escape(SOUND_CONFIG)),
    "quantized sound": (values(SOUND_CONFIG, quantization_config={}), f"{SOUND_CONFIG}: quantiz"),
    "latents that the sound tokenizer has not": (values(TRANSFORMER, sound_dim=9), "sound_dim=9 is not .*vocoder_input_dim=8"),
    "latents that the transformer has not": (values(SOUND_CONFIG, vocoder_input_dim=7), "sound_dim=8 is not .*_input_dim=7"),
    "quantized vae": (values(VAE_CONFIG, quantization_config={"quant_method": "gguf"}), f"{VAE_CONFIG}: quantiz"),
    "channels that the VAE has not": (values(TRANSFORMER, latent_channel=4, latent_patch_size=4), "latent_channel=4"),
    "a rope_scaling that is a list": (values(TRANSFORMER, rope_scaling=[1], rope_axes_dim=...), "rope|mrope"),
    "a mrope_section of text": (values(TRANSFORMER, rope_scaling={"mrope_section": "abc"}, rope_axes_dim=...), "rope"),
    "_class_name a list": (values(MODEL, _class_name=["Cosmos3OmniPipeline"]), "model_index.json is of"),
    "_class_name another": (values(MODEL, _class_name="os.system"), "model_index.json is of 'os.system'"),
}
TOKENIZERS: dict[str, Case] = {
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "text_tokenizer"), "text_tokenizer: missing"),
    "no tokenizer.json": (remove(TOKENIZER), "text_tokenizer: no tokenizer can be read"),
    "tokenizer empty": (write(TOKENIZER, ""), "text_tokenizer: no tokenizer can be read"),
    "tokenizer no JSON": (write(TOKENIZER, "{tokens}"), "text_tokenizer: no tokenizer can be read"),
    "tokenizer a list": (write(TOKENIZER, "[]"), "text_tokenizer: no tokenizer can be read"),
    "tokenizer deep": (write(TOKENIZER, DEEP), "text_tokenizer: no tokenizer can be read"),
    "tokenizer not UTF-8": (write(TOKENIZER, b'{"a":"\xff"}'), "text_tokenizer: no tokenizer can be read"),
    "tokenizer a folder": (instead(TOKENIZER, Path.mkdir), "text_tokenizer: no tokenizer can be read"),
    "tokenizer a pipe": (instead(TOKENIZER, os.mkfifo), "text_tokenizer"),
    "tokenizer's config a pipe": (instead(TOKENIZER_CONFIG, os.mkfifo), "text_tokenizer"),
    "tokenizer's config a list": (write(TOKENIZER_CONFIG, "[]"), "text_tokenizer: no tokenizer can be read"),
    "tokenizer's config deep": (write(TOKENIZER_CONFIG, DEEP), "text_tokenizer: no tokenizer can be read"),
    "tokenizer of remote code": (both(remote_code, values(TOKENIZER_CONFIG, tokenizer_class=...)), "text_tokenizer"),
    **{
        f"tokenizer elsewhere, by {key}": (both(elsewhere(key), remove(TOKENIZER)), "text_tokenizer")
        for key in ("tokenizer_file", "vocab_file")
    },
    "a token beyond the model's": (large_vocabulary, "vocab_size=512"),
    "no chat template": (remove(TEMPLATE), "no chat template"),
    "chat template of no grammar": (write(TEMPLATE, "{% for"), "chat template cannot be used"),
    "chat template that raises": (write(TEMPLATE, "{{ 1 / 0 }}"), "chat template cannot be used"),
    "chat template that reaches for classes": (write(TEMPLATE, "{{ ''.__class__.__mro__ }}"), "chat template cannot be used"),
    "chat template that includes": (write(TEMPLATE, "{% include '/etc/passwd' %}"), "chat template cannot be used"),
    "chat template a pipe": (instead(TEMPLATE, os.mkfifo), "chat template|text_tokenizer"),
}


def sound(change: Callable[[dict], dict]) -> Damage:
    return tensors(change, SOUND)


def without(name: str) -> Damage:
    return sound(lambda found: {key: value for key, value in found.items() if key != name})


def other(name: str, *shape: int) -> Damage:
    return sound(lambda found: found | {name: np.ones(shape, np.float32)})


SOUNDS: dict[str, Case] = {
    "sound tokenizer cut": (cut(SOUND, -1), UNREADABLE),
    "sound tokenizer cut to 4 bytes": (cut(SOUND, 4), UNREADABLE),
    "sound tokenizer a pickle": (pickles(SOUND), UNREADABLE),
    "sound tokenizer without tensors": (remove(SOUND), rf"sound_tokenizer: no {re.escape(FILE)} "),
    "sound tokenizer of pickles": (
        both(remove(SOUND), pickles(f"sound_tokenizer/{STEM}.bin")),
        r"sound_tokenizer: no .*pickle files are never opened",
    ),
    "sound tokenizer without config": (remove(SOUND_CONFIG), rf"{re.escape(SOUND_CONFIG)}: missing"),
    "sound tokenizer of another name": (
        lambda folder: (folder / SOUND).rename(folder / "sound_tokenizer" / "model.safetensors"),
        r"index\.json: missing, but there are safetensors files",
    ),
    "sound tokenizer all bare": (
        sound(lambda found: {name.removeprefix("decoder."): tensor for name, tensor in found.items()}),
        r"missing: decoder\.(.|\n)*unexpected: ",
    ),
    "sound tokenizer folded": (
        sound(lambda found: {name.removesuffix("_v"): x for name, x in found.items() if name[-2:] != "_g"}),
        r"missing: decoder\.conv1\.weight_g(.|\n)*unexpected: decoder\.conv1\.weight ",
    ),
    "sound tokenizer: encoder alone": (
        sound(lambda found: {"encoder.w": np.ones(3, np.float32)}),
        r"faults in the tensors\n  sound_tokenizer: missing: decoder\.",
    ),
    **{
        f"sound tokenizer without {name}": (
            without(f"decoder.{name}"),
            rf"1 fault .*\n.*: missing: decoder\.{re.escape(name)} ",
        )
        for name in (
            "conv1.weight_g",
            "conv1.weight_v",
            "conv2.weight_g",
            "block.4.res_unit3.snake2.beta",
            "block.0.conv_t1.bias",
        )
    },
    **{
        f"sound tokenizer with {name}": (other(name, 2), rf"1 fault .*\n.*: unexpected: {re.escape(name)} \[2\]")
        for name in ("decoder.conv2.bias", "decoder.block.5.snake1.alpha", "quantizer.w", "decoder", "encoderless.w")
    },
    **{
        f"sound tokenizer: {name} {shape}": (
            other(f"decoder.{name}", *shape),
            rf"1 fault .*\n.*: misshapen: decoder\.{name} is",
        )
        for name, shape in [
            ("conv1.weight_v", (7, 8, 64)),
            ("conv1.weight_g", (64,)),
            ("conv1.weight_g", (1, 8, 1)),
            ("block.0.conv_t1.weight_g", (1, 32, 1)),
            ("block.0.conv_t1.weight_v", (32, 64, 16)),
            ("snake1.alpha", (4,)),
            ("conv1.bias", ()),
        ]
    },
    **{
        f"sound tokenizer: {name} of {kind}": (
            header(lambda found, name=name, kind=kind: found[name].update(dtype=kind), SOUND),
            rf"odd kind: {re.escape(name)} is {kind}, expected F32",
        )
        for name in ("decoder.conv1.weight_g", "decoder.conv1.bias")
        for kind in ("I32", "U32")
    },
    "sound tokenizer: encoder of numbers": (
        sound(lambda found: found | {"encoder.w": np.ones(3, np.int64)}),
        r"odd kind: encoder\.w is I64",
    ),
}
OLDER: dict[str, Case] = {
    "names that begin with model.": (rename("^", "model."), r"\A[^\n]*(older|before|first release)[^\n]*\Z"),
    "names of the first release": (
        both(rename("^proj_in", "vae2llm"), rename("^proj_out", "llm2vae"), rename("^layers", "language_model.model.layers")),
        r"\A[^\n]*(older|before|first release)[^\n]*\Z",
    ),
}
TABLE = FILES | PLACES | TEXTS | SIZES | TOKENIZERS | SOUNDS | OLDER


# What is opened

RECORDS: list[list[tuple[str, object]]] = []  # of audit events; those that are being made (a hook cannot be taken away)
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")
LIBRARIES = [Path(path).resolve() for path in (sys.prefix, sys.base_prefix, Path(cosmos3_jax.__file__).parents[1])]
SYSTEM = [Path(path) for path in ("/proc", "/sys", "/dev/null", "/usr/share/zoneinfo", "/etc/mime.types")]
IN_OPEN = 0x20


@sys.addaudithook
def _record(event: str, arguments: tuple) -> None:
    if RECORDS and event in ("open", *FORBIDDEN):
        RECORDS[-1].append((event, arguments[0]))


class Watch:
    """What was opened below a folder, by whomever, while it was watched (inotify)."""

    def __init__(self, root: Path):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK)
        assert self.fd >= 0
        self.folders = {
            self.libc.inotify_add_watch(self.fd, os.fsencode(top), IN_OPEN): Path(top) for top, _, _ in os.walk(root)
        }

    def opened(self) -> list[Path]:
        """The files, and stops watching."""
        found = []
        try:
            while data := os.read(self.fd, 1 << 20):
                while data:
                    folder, _, _, length = struct.unpack_from("iIII", data)
                    name = data[16 : 16 + length].rstrip(b"\0").decode()
                    found.append(self.folders[folder] / name)
                    data = data[16 + length :]
        except BlockingIOError:
            pass
        os.close(self.fd)
        return [path for path in found if not path.is_dir()]


def is_below(path: Path, places: list[Path]) -> bool:
    return any(path.is_relative_to(place) for place in places)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A checkpoint that loads; what the libraries import the first time is imported after it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("pristine"), CONFIG, shards=2)
    Cosmos3Pipeline.from_pretrained(folder, progress=False)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A checkpoint to damage."""
    (tmp_path / "outside").mkdir()
    save_file({"proj_in.bias": np.zeros(64, np.float32)}, tmp_path / "outside" / "outside.safetensors")
    return shutil.copytree(pristine, tmp_path / "checkpoint")


@pytest.fixture
def load(folder, tmp_path, monkeypatch):
    """`load(**given)` loads the folder, in little time and memory, and fails if anything is opened that should not be."""

    def too_long(*_):
        pytest.fail(f"took more than {SECONDS} s")

    def load(**given):
        monkeypatch.setattr("builtins.input", lambda *_: "y")  # someone who says yes to everything
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, too_long)
        watch, events = Watch(tmp_path), []
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, limits[1]))
        signal.alarm(SECONDS)
        RECORDS.append(events)
        try:
            return Cosmos3Pipeline.from_pretrained(folder, progress=False, **given)
        finally:
            RECORDS.clear()
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
            resource.setrlimit(resource.RLIMIT_AS, limits)
            check(events, watch.opened())

    def check(events, opened):
        assert not (tmp_path / "outside" / "ran").exists(), "a program of the folder ran"
        paths = [Path(os.fsdecode(path)).absolute() for event, path in events if event == "open" and not isinstance(path, int)]
        assert [path for path in paths if not is_below(path.resolve(), [folder, *LIBRARIES, *SYSTEM])] == []
        assert [path for path in opened if not is_below(path, [folder])] == []
        assert [path for path in opened if path.suffix in PICKLES] == []
        assert [event for event in events if event[0] in FORBIDDEN] == []

    return load


# What holds


@pytest.mark.parametrize("sound", [True, False])
def test_nothing_outside_a_folder_is_opened(load, sound):
    assert ("sound" in load(sound=sound).residence.abstract) == sound


def test_the_watch_sees_what_is_opened(folder, tmp_path):
    """Python's files, the libraries', and none that were not."""
    watch = Watch(tmp_path)
    load_file(folder / VAE)
    (folder / MODEL).read_text()
    assert set(watch.opened()) == {folder / VAE, folder / MODEL}


PICKLED = [f"vae/{STEM}.bin", "transformer/pytorch_model.bin", "transformer/model.pt", "model.pkl", "text_tokenizer/vocab.pkl"]
PICKLED += [f"sound_tokenizer/{STEM}.bin"]


@pytest.mark.parametrize("name", [*PICKLED, "all"])
def test_pickle_files_beside_good_weights_are_never_opened(folder, load, name):
    pickles(*(PICKLED if name == "all" else [name]))(folder)
    load()


HARMLESS: dict[str, Damage] = {
    "remote code beside a class of the library": remote_code,
    "remote code of its own class": both(remote_code, values(TOKENIZER_CONFIG, tokenizer_class="Mine")),
    "no such class": values(TOKENIZER_CONFIG, tokenizer_class="os.system"),
    **{f"another {key}": elsewhere(key) for key in ("tokenizer_file", "vocab_file", "merges_file", "chat_template_file")},
}


@pytest.mark.parametrize("damage", HARMLESS.values(), ids=HARMLESS)
def test_what_a_tokenizer_asks_for_is_not_done(folder, load, damage):
    """It may be refused, or loaded from what is in its folder."""
    damage(folder)
    with contextlib.suppress(InputError):
        load()


@pytest.mark.parametrize(("damage", "sentence"), TABLE.values(), ids=TABLE)
def test_a_damaged_folder_is_refused(folder, load, monkeypatch, damage, sentence):
    damage(folder)
    monkeypatch.setattr(Tensor, "view", lambda self: pytest.fail("a tensor was read"))
    with pytest.raises(InputError, match=sentence) as error:
        load()
    message = str(error.value)
    assert all(line.isprintable() for line in message.split("\n")), "a terminal should not obey the sentence"
    assert len(message) < 100_000


OF_SOUND = SOUNDS | {name: case for name, case in (TEXTS | SIZES).items() if name.startswith(SOUND_CONFIG)}


@pytest.mark.parametrize("damage", [damage for damage, _ in OF_SOUND.values()], ids=OF_SOUND)
def test_a_damaged_sound_tokenizer_stops_nobody_who_wants_no_sound(folder, load, damage):
    damage(folder)
    assert "sound" not in load(sound=False).residence.abstract


@pytest.mark.parametrize("size", LIES[TRANSFORMER]["sound_dim"], ids=repr)
def test_a_size_of_sound_heads_that_is_none_without_a_sound_tokenizer(folder, load, size):
    values(TRANSFORMER, sound_dim=size)(folder)
    with pytest.raises(InputError, match=rf"{re.escape(TRANSFORMER)}: .*sound_dim|{FAULTS}"):
        load(sound=False)

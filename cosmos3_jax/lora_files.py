"""Files of adapters: safetensors as diffusers and peft write them, to adapters of the networks and back.

| in the file | |
|---|---|
| MODULE.lora_A.weight, MODULE.lora_B.weight | [R, inputs], [outputs, R]; also called lora_down, lora_up |
| MODULE.alpha | in files of kohya's scripts |
| metadata `lora_adapter_metadata` | peft's LoraConfig, with R and alpha; peft has it beside, in adapter_config.json |

MODULE is what diffusers calls it ("layers.0.self_attn.add_q_proj"), after `transformer.`, `base_model.model.`, both or neither.
Without an alpha a file means alpha = R. Only headers are read, and everything that is wrong is told, before tensors are.
Reference: diffusers 0.42.1, loaders/peft.py and utils/peft_utils.py; peft 0.21, tuners/lora/model.py and utils/other.py.
"""

import dataclasses
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.errors import InputError, faults, shown
from cosmos3_jax.folder import read_json, unique
from cosmos3_jax.lora import MOST, TOWERS, Adapter, Adapters, abstract_adapter, modules, number
from cosmos3_jax.published import unused_tensors
from cosmos3_jax.safetensors_files import DTYPES, PICKLES, Tensor, open_file, write_file
from cosmos3_jax.weights import Network, by_path

log = logging.getLogger(__name__)

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "lora.safetensors")  # diffusers', peft's, a run's
METADATA, CONFIG = "lora_adapter_metadata", "adapter_config.json"
ROLES = {"lora_A.weight": "a", "lora_down.weight": "a", "lora_B.weight": "b", "lora_up.weight": "b", "alpha": "alpha"}
TENSOR = re.compile(rf"(?:base_model\.model\.)?(?:transformer\.)?(.+)\.({'|'.join(map(re.escape, ROLES))})")
# What makes an adapter more than scale B A, in the names of tensors and in peft's config
OTHER_TENSORS = {
    r"\.lora_magnitude_vector|\.dora_scale$": "DoRA",
    r"\.bias$": "a bias",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.lora_embedding_[AB]": "an embedding's adapter",
}
OTHER_SETTINGS = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "alora_invocation_tokens"),
)
STARTS = ("gaussian", "orthogonal", "eva")  # that leave the weights as they are; PiSSA and others change them, too
REPEATS = 2  # in the patterns of a config: more could keep us busy for ever
PLAIN = "only plain LoRA can be added to the weights; train without it, or merge it with peft and load what that gives"


@dataclasses.dataclass
class Pair:
    """One module's tensors, as far as they are there: a [R, inputs], b [outputs, R], and kohya's alpha."""

    a: Tensor | None = None
    b: Tensor | None = None
    alpha: Tensor | None = None


class Lora:
    """A file of adapters, and how much of them is asked for.

    Only its header is read, and all of it once for the checksum. Raises InputError for what is not plain LoRA; `audit` tells
    what else is wrong.
    """

    def __init__(self, file: Path, scale: float = 1.0):
        self.file, self.scale = file, scale
        tensors, metadata = open_file(file)
        with file.open("rb") as opened:
            self.sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        self.config = _config(file, metadata)
        beside = file.parent / CONFIG
        is_beside = METADATA not in metadata and beside.exists()
        self.config_sha256 = hashlib.sha256(beside.read_bytes()).hexdigest() if is_beside else None
        patterns = {name: (self.config.get(name) or {}).items() for name in ("rank_pattern", "alpha_pattern")}
        self.patterns = {name: [(_compiled(key), value) for key, value in listed] for name, listed in patterns.items()}
        self.pairs: dict[str, Pair] = {}
        self.problems: list[str] = []
        for name, tensor in tensors.items():
            self._take(name, tensor)

    @property
    def identity(self) -> dict[str, Any]:
        """What a result depends on."""
        config = {"config_sha256": self.config_sha256} if self.config_sha256 else {}
        return {"file": self.file.name, "sha256": self.sha256, **config, "scale": self.scale}

    def _take(self, name: str, tensor: Tensor) -> None:
        for pattern, what in OTHER_TENSORS.items():
            if re.search(pattern, name):
                raise InputError(f"{self.file}: {name!a} is {what}; {PLAIN}")
        if not (match := TENSOR.fullmatch(name)):
            self.problems.append(f"unexpected: {name} {list(tensor.shape)}")
            return
        pair, role = self.pairs.setdefault(match[1], Pair()), ROLES[match[2]]
        if getattr(pair, role) is not None:
            self.problems.append(f"twice: {match[1]} also as {name}")
        if tensor.kind not in DTYPES:
            self.problems.append(f"odd kind: {name} is {tensor.kind}, expected {', '.join(DTYPES)}")
        setattr(pair, role, tensor)

    def audit(self, networks: Mapping[str, Network], config: TransformerConfig) -> list[str]:
        """What keeps the file from being added to abstract networks ("und", "gen"), a line each."""
        shapes = _shapes(networks, config)
        unused, lines = _unused(config), list(self.problems)
        for module, pair in sorted(self.pairs.items()):
            if module in shapes:
                lines += self._faults(module, pair, shapes[module])
            elif module not in unused:
                lines.append(f"unexpected: {module} is no projection in the layers of this checkpoint")
        if not lines and not self.pairs.keys() & shapes.keys():
            lines.append("missing: there is no lora_A and lora_B of any layer")
        return lines

    def _faults(self, module: str, pair: Pair, shape: tuple[int, ...]) -> Iterator[str]:
        outputs, inputs = shape
        rank = next((t.shape[axis] for t, axis in ((pair.a, 0), (pair.b, 1)) if t is not None and len(t.shape) == 2), 0)
        for name, tensor, expected in (("lora_A", pair.a, (rank, inputs)), ("lora_B", pair.b, (outputs, rank))):
            if tensor is None:
                yield f"missing: {module}.{name}.weight"
            elif tensor.shape != expected or rank == 0:
                wanted = ", ".join(str(size or "R") for size in expected)
                yield f"misshapen: {module}.{name}.weight is {list(tensor.shape)}, expected [{wanted}]"
        configured = self._by_pattern("rank_pattern", module, self.config.get("r", rank))
        if rank and configured != rank:
            yield f"rank: {module} has {rank}, in the config it is {configured}"
        if pair.alpha is not None and pair.alpha.kind in DTYPES:
            value = float(pair.alpha.view().item()) if math.prod(pair.alpha.shape) == 1 else math.nan
            if not abs(value) <= MOST:
                yield f"alpha: {module}.alpha {list(pair.alpha.shape)} is {value}, expected one number from {-MOST} to {MOST}"

    def _by_pattern(self, name: str, module: str, otherwise: Any) -> Any:
        """What the first fitting key of a pattern has: peft's `get_pattern_key`."""
        return next((value for pattern, value in self.patterns[name] if pattern.match(module)), otherwise)

    def tell_unused(self, config: TransformerConfig) -> None:
        """A line for the log of what has no effect."""
        if names := sorted(self.pairs.keys() & _unused(config)):
            log.info("%s: without effect, for nothing reads the last text layer's output: %s", self.file.name, ", ".join(names))

    def values(self, module: str) -> tuple[np.ndarray, np.ndarray, float]:
        """A module's a [R, inputs] and b [outputs, R], float32, and its scale, alpha / R times what is asked for."""
        pair = self.pairs[module]
        assert pair.a is not None
        assert pair.b is not None
        a, b = (each.view().astype(np.float32) for each in (pair.a, pair.b))
        alpha = self.config.get("lora_alpha", 8 if self.config else len(a))  # 8: LoraConfig's own
        alpha = self._by_pattern("alpha_pattern", module, alpha)
        if pair.alpha is not None:
            alpha = float(pair.alpha.view().item())
        return a, b, self.scale * alpha / (math.sqrt(len(a)) if self.config.get("use_rslora") else len(a))


def open_loras(asked: Any) -> list[Lora]:
    """The files of a list: "FILE" or ("FILE", scale) each, or a folder with one of `NAMES` in it.

    Raises InputError for anything else, and for files that hold no plain LoRA.
    """
    if not isinstance(asked, list | tuple):
        raise InputError(f'lora={shown(asked)}: a list is expected, such as ["a.safetensors"] or [("a.safetensors", 0.5)]')
    return [_open(item) for item in asked]


def _open(item: Any) -> Lora:
    path, scale = item if isinstance(item, list | tuple) and len(item) == 2 else (item, 1.0)
    if not isinstance(path, str | Path):
        raise InputError(f'lora: {shown(item)}: "FILE" or ("FILE", scale) is expected')
    scale = number(f"lora: scale of {path}", scale)
    try:
        return Lora(_located(Path(path).expanduser()), scale)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a user without a home
        raise InputError(f"lora: {str(path)!a}: cannot be read ({error})") from error


def _located(path: Path) -> Path:
    """The file that is meant."""
    found = [path / name for name in NAMES if (path / name).is_file()] if path.is_dir() else [path]
    if len(found) != 1:
        there = " and ".join(file.name for file in found) or f"none of {', '.join(NAMES)}"
        raise InputError(f"lora: {path}: {there} there; give the file itself")
    if found[0].suffix in PICKLES:
        raise InputError(f"lora: {found[0]}: pickle files are never opened; save it as safetensors")
    if not found[0].is_file():
        raise InputError(f"lora: {found[0]}: there is no such file")
    return found[0]


def check_loras(loras: Sequence[Lora], networks: Mapping[str, Network], config: TransformerConfig) -> None:
    """Raises InputError with all that keeps a file from being added to abstract networks ("und", "gen")."""
    for lora in loras:
        if problems := lora.audit(networks, config):
            raise InputError(f"{lora.file}: {faults(problems)}")
        lora.tell_unused(config)


def read_adapters(loras: Sequence[Lora], part: str, network: Network, config: TransformerConfig) -> dict[str, Adapter]:
    """Of files that were checked, the sum for one abstract network, by path; for "vae" and "sound" there is none.

    Layers share a rank: that of the largest, filled up with zeros. Where their scales differ, b is multiplied by them.
    """
    adapters = {}
    for path, names in (modules(part, network, config) if part in TOWERS else {}).items():
        layers = [[lora.values(name) for lora in loras if name in lora.pairs] for name in names]
        if any(layers):
            adapters[path] = _placed(network, path, layers)
    return adapters


def _placed(network: Network, path: str, layers: list[list[tuple[np.ndarray, np.ndarray, float]]]) -> Adapter:
    """The adapter of a weight from what each of its layers has: of every file a, b and a scale."""
    w = by_path(network.weights)[path]
    scales = {scale for layer in layers for *_, scale in layer}
    common = scales.pop() if len(scales) == 1 else 1.0
    rank = max(sum(len(a) for a, *_ in layer) for layer in layers)
    outputs, inputs = w.file_shape
    a_LRI, b_LOR = np.zeros((len(layers), rank, inputs), np.float32), np.zeros((len(layers), outputs, rank), np.float32)
    for layer, a_RI, b_OR in zip(layers, a_LRI, b_LOR, strict=True):
        start = 0
        for a, b, scale in layer:
            a_RI[start : start + len(a)] = a
            b_OR[:, start : start + len(a)] = b if scale == common else b * np.float32(scale)
            start += len(a)

    abstract = abstract_adapter(w, rank, common)

    def place(shape: jax.ShapeDtypeStruct, host: np.ndarray) -> jax.Array:
        host = host.reshape(shape.shape)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: host[index])

    return Adapter(place(abstract.a, a_LRI), place(abstract.b, b_LOR), abstract.scale, abstract.inputs)


def write_adapters(
    file: Path, adapters: Mapping[str, Adapters], networks: Mapping[str, Network], config: TransformerConfig
) -> None:
    """Writes adapters, by part and path, of networks (abstract will do), as `transformer.load_lora_adapter(file)` reads them.

    diffusers 0.42.1 reads the metadata, and with it an alpha that is not R, only if called with `use_safetensors=True`.
    The arrays, in whatever dtype, must be whole on this process. Raises InputError where there are none, RunError
    where they cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for part, own in adapters.items():
        names, weights = modules(part, networks[part], config), by_path(networks[part].weights)
        for path, adapter in own.items():
            outputs, inputs = weights[path].file_shape
            a = np.asarray(adapter.a).reshape(len(names[path]), adapter.rank, inputs)
            b = np.asarray(adapter.b).reshape(len(names[path]), outputs, adapter.rank)
            for module, a_RI, b_OR in zip(names[path], a, b, strict=True):
                tensors |= {f"transformer.{module}.lora_A.weight": a_RI, f"transformer.{module}.lora_B.weight": b_OR}
                ranks[module] = adapter.rank
                alphas[module] = float(f"{adapter.scale * adapter.rank:.12g}")  # 5 / 7 * 7 is not 5
    if not tensors:
        raise InputError(f"{file}: there are no adapters to be written")
    rank, alpha = (next(iter(each.values())) for each in (ranks, alphas))
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: each for module, each in ranks.items() if each != rank},
        "alpha_pattern": {module: each for module, each in alphas.items() if each != alpha},
    }
    text = json.dumps({f"transformer.{name}": value for name, value in settings.items()}, indent=2, sort_keys=True)
    write_file(file, tensors, {METADATA: text})


def _shapes(networks: Mapping[str, Network], config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """[outputs, inputs] of every module that can have an adapter."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in TOWERS:
        weights = by_path(networks[part].weights)
        for path, names in modules(part, networks[part], config).items():
            shapes |= dict.fromkeys(names, weights[path].file_shape)
    return shapes


def _unused(config: TransformerConfig) -> set[str]:
    """Modules that adapters of others may have, but whose output nothing reads."""
    return {name.removesuffix(".weight") for name in unused_tensors(config) if name.startswith(("layers.", "lm_head."))}


def _config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's config of a file, as far as there is one. Raises InputError for settings that are not plain LoRA, or none."""
    if METADATA in metadata:
        place = f"{file}: {METADATA}"
        try:
            found = json.loads(metadata[METADATA], object_pairs_hook=unique)
            config = {name.removeprefix("transformer."): value for name, value in found.items()}
        except (AttributeError, ValueError, RecursionError) as error:
            raise InputError(f"{place}: a JSON object is expected ({error})") from error
    elif (file.parent / CONFIG).exists():
        place = str(file.parent / CONFIG)
        config = read_json(file.parent / CONFIG)
    else:
        return {}
    for name in OTHER_SETTINGS:
        if config.get(name):
            raise InputError(f"{place}: {name}={shown(config[name])}; {PLAIN}")
    kind, bias, start = config.get("peft_type", "LORA"), config.get("bias", "none"), config.get("init_lora_weights", True)
    if kind != "LORA" or bias != "none" or (isinstance(start, str) and start not in STARTS):
        raise InputError(f"{place}: peft_type={kind!r}, bias={bias!r}, init_lora_weights={start!r}; {PLAIN}")
    _check_numbers(place, config)
    return config


def _check_numbers(place: str, config: Mapping[str, Any]) -> None:
    """Raises InputError where ranks and alphas are no numbers, or their patterns no patterns."""
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        by_module = config.get(pattern) or {}
        if not isinstance(by_module, dict):
            raise InputError(f"{place}: {pattern}={shown(by_module)}: an object is expected")
        number(f"{place}: {name}", config.get(name, 8))
        for key, value in by_module.items():
            number(f"{place}: {pattern}: {shown(key)}", value)
            if not _is_harmless(key):
                raise InputError(
                    f"{place}: {pattern}: {shown(key)} is no regular expression with at most {REPEATS} repetitions"
                )


def _is_harmless(pattern: str) -> bool:
    """Whether it is a regular expression that takes no time to be matched."""
    try:
        _compiled(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    repeats = len(re.findall(r"[*+?{]", pattern))
    return len(pattern) <= 200 and repeats <= REPEATS and not re.search(r"\)[*+?{]", pattern)


def _compiled(pattern: str) -> re.Pattern:
    """For the whole name of a module, or its end after a dot."""
    return re.compile(rf"(.*\.)?({pattern})$")

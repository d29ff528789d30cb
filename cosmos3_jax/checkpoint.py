"""A folder on disk and the weights it holds: JSON, safetensors, and the names of the published tensors.

The published layout is that of diffusers: model_index.json, and a folder each for transformer, vae, scheduler and
text_tokenizer. Nothing is read into memory before the audit has passed.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from cosmos3_jax.config import InputError, SchedulerConfig, TransformerConfig, VAEConfig
from cosmos3_jax.weights import Network, Weight, audit, by_path, is_stacked, map_weights

BUILT_IN = Path(__file__).parent / "tiny"
FOLDERS = ("transformer", "vae", "scheduler", "text_tokenizer")
PIPELINES = ("Cosmos3OmniPipeline", "Cosmos3OmniDiffusersPipeline")  # the second is the name in the first releases

# Place in a network -> name in the file. {} is the layer; the und tower's "last" is its last layer.
UND_NAMES = {
    "embed": "embed_tokens.weight",
    "layers.keys_values.norm.scale": "layers.{}.input_layernorm.weight",
    "layers.keys_values.k": "layers.{}.self_attn.to_k.weight",
    "layers.keys_values.v": "layers.{}.self_attn.to_v.weight",
    "layers.keys_values.k_norm.scale": "layers.{}.self_attn.norm_k.weight",
    "layers.keys_values.k_norm_for_gen.scale": "layers.{}.self_attn.k_norm_und_for_gen.weight",
    "layers.q": "layers.{}.self_attn.to_q.weight",
    "layers.q_norm.scale": "layers.{}.self_attn.norm_q.weight",
    "layers.o": "layers.{}.self_attn.to_out.weight",
    "layers.mlp_norm.scale": "layers.{}.post_attention_layernorm.weight",
    "layers.mlp.gate": "layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up": "layers.{}.mlp.up_proj.weight",
    "layers.mlp.down": "layers.{}.mlp.down_proj.weight",
}
GEN_NAMES = {
    "w_in": "proj_in.weight",
    "b_in": "proj_in.bias",
    "timestep_embedding.w_in": "time_embedder.linear_1.weight",
    "timestep_embedding.b_in": "time_embedder.linear_1.bias",
    "timestep_embedding.w_out": "time_embedder.linear_2.weight",
    "timestep_embedding.b_out": "time_embedder.linear_2.bias",
    "layers.norm.scale": "layers.{}.input_layernorm_moe_gen.weight",
    "layers.q": "layers.{}.self_attn.add_q_proj.weight",
    "layers.k": "layers.{}.self_attn.add_k_proj.weight",
    "layers.v": "layers.{}.self_attn.add_v_proj.weight",
    "layers.q_norm.scale": "layers.{}.self_attn.norm_added_q.weight",
    "layers.k_norm.scale": "layers.{}.self_attn.norm_added_k.weight",
    "layers.o": "layers.{}.self_attn.to_add_out.weight",
    "layers.mlp_norm.scale": "layers.{}.post_attention_layernorm_moe_gen.weight",
    "layers.mlp.gate": "layers.{}.mlp_moe_gen.gate_proj.weight",
    "layers.mlp.up": "layers.{}.mlp_moe_gen.up_proj.weight",
    "layers.mlp.down": "layers.{}.mlp_moe_gen.down_proj.weight",
    "norm.scale": "norm_moe_gen.weight",
    "w_out": "proj_out.weight",
    "b_out": "proj_out.bias",
}
# Part of a path in the VAE -> part of the name in the file; everything else is called as in the file.
VAE_NAMES = {"sampler.conv.": "sampler.resample.1."}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder says of itself, without its weights."""

    folder: Path
    transformer: TransformerConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    use_system_prompt: bool  # in the prompt style "diffusers"
    negative_prompt: str  # of a video, in the prompt style "native"

    @classmethod
    def open(cls, path: str | Path, *, weights: bool = True) -> Self:
        """Reads the JSON of a folder, or of a Hugging Face repository ("nvidia/Cosmos3-Nano", downloaded first).

        Without `weights` everything else is downloaded.
        """
        folder = locate(path, weights=weights)
        index = read_json(folder / "model_index.json")
        if index.get("_class_name") not in PIPELINES:
            raise InputError(f"{folder}: model_index.json is of {index.get('_class_name')!r}; expected {PIPELINES[0]!r}")
        negative = folder / "assets" / "negative_prompt.json"
        return cls(
            folder,
            TransformerConfig.from_json(read_json(folder / "transformer" / "config.json")),
            VAEConfig.from_json(read_json(folder / "vae" / "config.json")),
            SchedulerConfig.from_json(read_json(folder / "scheduler" / "scheduler_config.json")),
            use_system_prompt=bool(index.get("default_use_system_prompt", True)),
            negative_prompt=json.dumps(read_json(negative)) if negative.is_file() else "",
        )


def locate(path: str | Path, *, weights: bool = True) -> Path:
    """The folder of a checkpoint, of which a repository may leave out the weights. Raises InputError if there is none."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise InputError(f"{folder}: no model_index.json there; a checkpoint folder in the published layout is expected")
        return folder
    if folder.is_absolute() or len(folder.parts) != 2 or str(path).startswith("."):
        raise InputError(f"{path}: there is no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kinds = ["*"] if weights else ["*.json", "*.jinja"]
    wanted = ["model_index.json", "assets/*.json", *(f"{part}/{kind}" for part in FOLDERS for kind in kinds)]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{path}: neither a folder here nor a Hugging Face repository that can be reached; "
            f"download {', '.join(wanted)} of it to a folder and give that"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; is the checkpoint complete?") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected")
    return value


def file_names(table: Mapping[str, str], tower: Network, num_layers: int) -> dict[str, list[str]]:
    """The tensors in the file of each weight of a tower: one, or one for each layer."""
    names = {}
    for path, w in by_path(tower.weights).items():
        template = table[path.replace("last.", "layers.keys_values.")]
        layers = range(w.shape[0]) if is_stacked(w) else [num_layers - 1]
        names[path] = [template.format(layer) for layer in layers]
    return names


def vae_file_names(vae: Network) -> dict[str, list[str]]:
    """The tensor in the file of each weight of the VAE."""
    names = {path: path for path in by_path(vae.weights)}
    for part, in_file in VAE_NAMES.items():
        names = {path: name.replace(part, in_file) for path, name in names.items()}
    return {path: [name] for path, name in names.items()}


def unused_tensors(config: TransformerConfig) -> dict[str, str]:
    """Published tensors of the transformer that generation does not need: name -> reason."""
    last = f"layers.{config.num_hidden_layers - 1}."
    dead = ("self_attn.to_q", "self_attn.norm_q", "self_attn.to_out", "post_attention_layernorm")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    sound = ("audio_proj_in.weight", "audio_proj_in.bias", "audio_proj_out.weight", "audio_proj_out.bias")
    action = ("action_proj_in.fc", "action_proj_in.bias", "action_proj_out.fc", "action_proj_out.bias")
    return {
        "lm_head.weight": "predicts text, which is never asked for",
        "norm.weight": "of the text tower's output, which nothing reads",
        **{f"{last}{name}.weight": "of the last text layer, whose output nothing reads" for name in dead + mlp},
        **dict.fromkeys((*sound, "audio_modality_embed"), "sound: not in this version"),
        **dict.fromkeys((*(f"{name}.weight" for name in action), "action_modality_embed"), "actions: not in this version"),
    }


class TensorFolder:
    """The tensors of one folder, in one safetensors file or in several with an index."""

    def __init__(self, folder: Path):
        single = folder / "diffusion_pytorch_model.safetensors"
        index = folder / f"{single.name}.index.json"
        files = [single]
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise InputError(f"{index}: a weight_map from tensors to files is expected")
            files = [folder / name for name in sorted(set(weight_map.values()))]
        self._file_of: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, "numpy")
            except (OSError, SafetensorError) as error:
                raise InputError(f"{file}: not a safetensors file that can be read ({error})") from error
            twice = sorted(self._file_of.keys() & set(handle.keys()))
            if twice:
                raise InputError(f"{file}: also in another file of the folder: {', '.join(twice)}")
            self._file_of |= dict.fromkeys(handle.keys(), handle)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the files' headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def odd_kinds(self) -> list[str]:
        """The tensors that are not stored as floats of 16 or 32 bits, a line each."""
        kinds = {name: file.get_slice(name).get_dtype() for name, file in self._file_of.items()}
        odd = {name: kind for name, kind in sorted(kinds.items()) if kind not in ("F32", "BF16", "F16")}
        return [f"odd kind: {name} is {kind}, expected F32, BF16 or F16" for name, kind in odd.items()]

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is stored."""
        return self._file_of[name].get_tensor(name)


def load(checkpoint: Checkpoint, und: Network, gen: Network, vae: Network) -> tuple[Network, Network, Network]:
    """The three abstract networks with arrays for weights.

    Raises InputError, before anything is read, with every tensor that is missing, unexpected, misshapen or not of floats.
    """
    layers = checkpoint.transformer.num_hidden_layers
    und_names, gen_names = file_names(UND_NAMES, und, layers), file_names(GEN_NAMES, gen, layers)
    vae_names = vae_file_names(vae)
    towers, autoencoder = (TensorFolder(checkpoint.folder / part) for part in ("transformer", "vae"))
    in_towers = file_shapes(und, und_names) | file_shapes(gen, gen_names)
    of_towers = audit(in_towers, towers.shapes(), unused_tensors(checkpoint.transformer)) + towers.odd_kinds()
    of_vae = audit(file_shapes(vae, vae_names), autoencoder.shapes(), ()) + autoencoder.odd_kinds()
    problems = [f"transformer: {line}" for line in of_towers] + [f"vae: {line}" for line in of_vae]
    if problems:
        listing = "\n  ".join(problems)
        raise InputError(f"{checkpoint.folder}: {len(problems)} faults in the tensors\n  {listing}")
    return (
        read_weights(und, und_names, towers),
        read_weights(gen, gen_names, towers),
        read_weights(vae, vae_names, autoencoder),
    )


def file_shapes(network: Network, names: Mapping[str, list[str]]) -> dict[str, tuple[int, ...]]:
    """What a file must hold for a network: shapes by tensor name."""
    return {name: w.file_shape for path, w in by_path(network.weights).items() for name in names[path]}


def read_weights(network: Network, names: Mapping[str, list[str]], files: TensorFolder) -> Network:
    """An abstract network filled: each weight read, laid out, cast and placed on its devices, one after the other."""

    def fill(path: str, w: Weight) -> jax.Array:
        tensors = [arrange(files.read(name), w) for name in names[path]]
        # not np.stack: of a text tower with one layer, a stack holds none
        value = (tensors[0] if len(tensors) == 1 else np.array(tensors, w.dtype)).reshape(w.shape)
        return jax.make_array_from_callback(w.shape, w.get_value().sharding, lambda index: value[index])

    return Network(network.graph, map_weights(fill, network.weights))


def arrange(tensor: np.ndarray, w: Weight) -> np.ndarray:
    """A tensor of a file in its weight's own layout and dtype: a view, unless it is a convolution or changes its dtype.

    A convolution is stored [out, in, (time,) height, width] and used as [height, width, (time x) in, out].
    """
    if tensor.ndim > 2:
        tensor = tensor.transpose(*range(tensor.ndim - 2, tensor.ndim), *range(tensor.ndim - 3, -1, -1))
    shape = w.shape[1:] if is_stacked(w) else w.shape
    return tensor.reshape(shape).astype(w.dtype, copy=False)

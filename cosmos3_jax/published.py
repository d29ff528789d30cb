"""The published layout: which tensors of which file are which weights, and how they get from there to the devices.

It is that of diffusers: a folder each for transformer, VAE and sound tokenizer, with safetensors in them. Nothing but headers
is read before the audit has passed; then each device's part of each weight is copied out of the mapped files, once, straight to
where JAX takes it from.
"""

import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.errors import InputError, faults
from cosmos3_jax.safetensors_files import DTYPES, Tensor, TensorFolder
from cosmos3_jax.weights import Index, Network, Weight, audit, by_path, copy, is_stacked, place_weight

# network -> where its tensors are
FOLDER_OF = {
    "und": "transformer",
    "gen": "transformer",
    "vae": "vae",
    "sound": "sound_tokenizer",
    "sound_encoder": "sound_tokenizer",
}
OLD = re.compile(r"^(transformer|model|language_model)\.|vae2llm|llm2vae|action2llm|llm2action|sound2llm|llm2sound")
BLOCK = 1 << 26  # bytes that one thread copies at a time

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
    "vision.w_in": "proj_in.weight",
    "vision.b_in": "proj_in.bias",
    "vision.w_out": "proj_out.weight",
    "vision.b_out": "proj_out.bias",
    "sound.w_in": "audio_proj_in.weight",
    "sound.b_in": "audio_proj_in.bias",
    "sound.w_out": "audio_proj_out.weight",
    "sound.b_out": "audio_proj_out.bias",
    "sound.mark": "audio_modality_embed",
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
}
# Part of a path in the VAE -> part of the name in the file; everything else is called as in the file.
VAE_NAMES = {"sampler.conv.": "sampler.resample.1."}
NORMED = re.compile(r"layers\.\d+\.weight$")  # of the sound encoder's convolutions, those with a weight norm
# Where the tensors of each network begin in a sound tokenizer.
SOUND_PREFIX = {"sound": "decoder.", "sound_encoder": "encoder."}


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


def sound_file_names(decoder: Network) -> dict[str, list[str]]:
    """The tensors in the file of each weight of the sound decoder: of a convolution, its directions and its magnitudes."""
    names = {path: f"decoder.{path}" for path in by_path(decoder.weights)}
    return {path: [f"{name}_v", f"{name}_g"] if path.endswith(".weight") else [name] for path, name in names.items()}


def sound_encoder_file_names(encoder: Network) -> dict[str, list[str]]:
    """Likewise of the sound encoder; inside its blocks no convolution has a weight norm."""
    names = {}
    for path in by_path(encoder.weights):
        name = f"encoder.{path.replace('dwconv.', 'dwconv.1.')}"
        names[path] = [f"{name}_v", f"{name}_g"] if NORMED.match(path) else [name]
    return names


def unused_tensors(config: TransformerConfig) -> dict[str, str]:
    """Published tensors of the transformer that generation does not need: name -> reason."""
    last = f"layers.{config.num_hidden_layers - 1}."
    dead = ("self_attn.to_q", "self_attn.norm_q", "self_attn.to_out", "post_attention_layernorm")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    sound = () if config.sound_gen else [name for name in GEN_NAMES.values() if name.startswith("audio_")]
    action = ("action_proj_in.fc", "action_proj_in.bias", "action_proj_out.fc", "action_proj_out.bias")
    return {
        "lm_head.weight": "predicts text, which is never asked for",
        "norm.weight": "of the text tower's output, which nothing reads",
        **{f"{last}{name}.weight": "of the last text layer, whose output nothing reads" for name in dead + mlp},
        **dict.fromkeys(sound, "sound: this model has sound_gen=false"),
        **dict.fromkeys((*(f"{name}.weight" for name in action), "action_modality_embed"), "actions: not in this version"),
    }


def unused_of_sound(names: Iterable[str], parts: Collection[str]) -> list[str]:
    """Those tensors of a sound tokenizer that belong to a network which is not among `parts` ("sound", "sound_encoder").

    Some files have an encoder, some do not.
    """
    prefixes = tuple(prefix for part, prefix in SOUND_PREFIX.items() if part not in parts)
    return [name for name in names if name.startswith(prefixes)]


def check_sound_encoder(folder: Path, names: Iterable[str]) -> None:
    """Raises InputError for a sound tokenizer that is a decoder only."""
    if not any(name.startswith(SOUND_PREFIX["sound_encoder"]) for name in names):
        raise InputError(f"{folder}: its sound tokenizer has no encoder, so no sound can be learned from; leave sound out")


def names_of(part: str, network: Network, config: TransformerConfig) -> dict[str, list[str]]:
    """The tensors in the file of each weight of "und", "gen", "vae", "sound" or "sound_encoder"."""
    alone = {"vae": vae_file_names, "sound": sound_file_names, "sound_encoder": sound_encoder_file_names}
    if part in alone:
        return alone[part](network)
    return file_names(UND_NAMES if part == "und" else GEN_NAMES, network, config.num_hidden_layers)


def file_shapes(network: Network, names: Mapping[str, list[str]]) -> dict[str, tuple[int, ...]]:
    """What a file must hold for a network: shapes by tensor name."""
    shapes = {}
    for path, w in by_path(network.weights).items():
        for name in names[path]:
            shapes[name] = (w.file_shape[0], 1, 1) if name.endswith("_g") else w.file_shape
    return shapes


class PublishedWeights:
    """The weights in a folder of the published layout. Raises InputError for files that cannot be read."""

    def __init__(self, folder: Path, config: TransformerConfig):
        self.folder, self.config = folder, config
        self._opened: dict[str, TensorFolder] = {}

    def _files(self, name: str) -> TensorFolder:
        if name not in self._opened:
            self._opened[name] = TensorFolder(self.folder / name)
        return self._opened[name]

    def audit(self, networks: Mapping[str, Network]) -> list[str]:
        """What keeps `networks` ("und", "gen", "vae", "sound", "sound_encoder") from being read, a line each.

        Raises InputError for an older layout, and where the sound encoder is asked for and there is none.
        """
        lines = []
        for name in sorted({FOLDER_OF[part] for part in networks}):
            files = self._files(name)
            unused: Collection[str] = unused_tensors(self.config) if name == "transformer" else ()
            if name == "sound_tokenizer":
                unused = unused_of_sound(files.tensors, networks)
                if "sound_encoder" in networks:
                    check_sound_encoder(self.folder, files.tensors)
            expected: dict[str, tuple[int, ...]] = {}
            for part, network in networks.items():
                if FOLDER_OF[part] == name:
                    expected |= file_shapes(network, names_of(part, network, self.config))
            if old := next((tensor for tensor in files.tensors if name == "transformer" and OLD.search(tensor)), None):
                raise InputError(
                    f"{self.folder}: {old} in {name} is a name from before the first release; download the current revision"
                )
            found = files.problems + audit(expected, files.shapes(), unused)
            found += [f"index: {file} is not listed" for file in files.unlisted if found]
            lines += [f"{name}: {line}" for line in found]
        return lines

    def dtypes(self, part: str, network: Network) -> dict[str, np.dtype]:
        """The dtype in which each weight is stored, by its path; of layers that differ, one that holds all of them."""
        tensors, names = self._files(FOLDER_OF[part]).tensors, names_of(part, network, self.config)
        kinds = {path: [DTYPES[tensors[name].kind] for name in listed] for path, listed in names.items()}
        return {path: functools.reduce(jnp.promote_types, found) for path, found in kinds.items() if found}

    def beside(self, store: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the transformer's tensors that generation does not read ("unused"), or all of the "sound_tokenizer"'s.

        None if there are none. Raises InputError for files that cannot be read.
        """
        if store == "unused":
            unused = unused_tensors(self.config)
            return {name: shape for name, shape in self._files("transformer").shapes().items() if name in unused}
        if not (self.folder / store).is_dir():
            return {}
        files = self._files(store)
        if files.problems:
            raise InputError(f"{self.folder / store}: {faults(files.problems)}")
        return files.shapes()

    def fingerprint(self, folder: str) -> str:
        """A checksum of a sample of all tensors of a folder: after any training it is another."""
        return self._files(folder).fingerprint()

    def arrays(self, store: str) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of `beside`, in the order of their names, as they are stored."""
        files = self._files("transformer" if store == "unused" else store)
        for name in sorted(self.beside(store)):
            yield name, files.tensors[name].view()
            files.tensors[name].release()

    def read(self, part: str, network: Network, on_bytes: Callable[[int], object]) -> Iterator[tuple[str, jax.Array]]:
        """Each weight of an abstract network, cast and placed on its devices, one after the other, by its path.

        Host memory holds one device's share of one weight at a time. `on_bytes` is told how many more bytes are there.
        """
        tensors = self._files(FOLDER_OF[part]).tensors
        names = names_of(part, network, self.config)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for path, w in by_path(network.weights).items():
                sources = [tensors[name] for name in names[path]]
                yield path, place_weight(w, functools.partial(_fill, w, sources, pool, on_bytes))


def _fill(
    w: Weight,
    sources: list[Tensor],
    pool: ThreadPoolExecutor,
    on_bytes: Callable[[int], object],
    buffer: np.ndarray,
    index: Index,
) -> None:
    """Writes part of a weight: a tensor, one for each layer, or the directions and magnitudes of a convolution of the sound."""
    normed = len(sources) == 2 and not is_stacked(w)
    for nbytes in pool.map(_copy, _blocks(buffer, index, w, sources[:1] if normed else sources)):
        on_bytes(nbytes)
    if normed:
        buffer *= scales(*(source.view() for source in sources))


def _blocks(buffer: np.ndarray, index: Index, w: Weight, sources: list[Tensor]) -> Iterator[tuple]:
    """Pieces to copy: (where to, where from, the tensor that this is of). A stacked weight has a tensor for each layer."""
    if not is_stacked(w):
        buffer, index = buffer[None], (slice(None), *index)
    for target, source in zip(buffer, sources, strict=True):
        view = arrange(source.view(), w)[index[1:]]
        count = max(1, target.nbytes // BLOCK) if target.ndim else 1
        for part in zip(np.array_split(target, count), np.array_split(view, count), strict=True):
            yield *part, source


def _copy(block: tuple[np.ndarray, np.ndarray, Tensor]) -> int:
    target, view, source = block
    copy(target, view)
    source.release()
    return target.nbytes


def arrange(tensor: np.ndarray, w: Weight) -> np.ndarray:
    """A view of a tensor of a file in its weight's own layout.

    A convolution is stored [out, in, (time,) height, width] and used as [(time,) height, width, in, out]; one of sound is
    stored [out, in, samples] and used as [samples, in, out], and a transposed one the other way round.
    """
    if tensor.ndim > 2:
        tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
    return tensor.reshape(w.shape[1:] if is_stacked(w) else w.shape)


def disarrange(value: np.ndarray, w: Weight) -> np.ndarray:
    """The inverse of `arrange`."""
    if len(w.file_shape) < 3:
        return value.reshape(w.file_shape)
    outputs, inputs, *kernel = w.file_shape
    return np.moveaxis(value.reshape(*kernel, inputs, outputs), (-1, -2), (0, 1))


def scales(v: np.ndarray, g: np.ndarray) -> np.ndarray:
    """What each slice v[i] is to be multiplied by for its length to be g[i] (weight norm along the first axis)."""
    flat = v.reshape(len(v), -1)
    length = [np.linalg.norm(rows.astype(np.float32), axis=1) for rows in np.array_split(flat, -(-len(flat) // 64))]
    return g.reshape(-1).astype(np.float32) / np.concatenate(length)

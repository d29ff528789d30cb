"""A checkpoint: a folder on disk, what it says of itself, and its weights on the way to the devices.

The folder is in the published layout (published.py) or was written by `python -m convert` (converted.py).
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np
from tqdm import tqdm

from cosmos3_jax import hub
from cosmos3_jax.config import SchedulerConfig, SoundConfig, TransformerConfig, VAEConfig
from cosmos3_jax.converted import MARK, ConvertedWeights
from cosmos3_jax.errors import InputError, faults, shown
from cosmos3_jax.folder import check_files, read_json, within
from cosmos3_jax.processes import is_first
from cosmos3_jax.published import PublishedWeights
from cosmos3_jax.weights import Network, map_weights, nbytes

BUILT_IN = Path(__file__).parent / "built_in"
FOLDERS = ("transformer", "vae", "scheduler", "text_tokenizer")
PIPELINES = ("Cosmos3OmniPipeline", "Cosmos3OmniDiffusersPipeline")  # the second is the name in the first releases
NAMES = {
    "und": "text tower",
    "gen": "generating tower",
    "vae": "VAE",
    "sound": "sound decoder",
    "sound_encoder": "sound encoder",
}


class Weights(Protocol):
    """The weights of a folder in either layout."""

    def audit(self, networks: Mapping[str, Network]) -> list[str]:
        """What keeps `networks` (names as in NAMES) from being read, a line each.

        Raises InputError where the sound encoder is one of them, and there is none.
        """

    def read(self, part: str, network: Network, on_bytes: Callable[[int], object]) -> Iterator[tuple[str, jax.Array]]:
        """Each weight of an abstract network, cast and placed on its devices, one after the other, by its path."""

    def dtypes(self, part: str, network: Network) -> dict[str, np.dtype]:
        """The dtype in which each weight is stored, by its path."""

    def beside(self, store: str) -> dict[str, tuple[int, ...]]:
        """Shapes, by name, of what no network reads: "unused" tensors of the transformer, or the "sound_tokenizer"."""

    def arrays(self, store: str) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays of `beside`, in the order of their names, as they are stored."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder says of itself, without its weights."""

    folder: Path
    transformer: TransformerConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    use_system_prompt: bool  # in the prompt style "diffusers"
    negative_prompt: str  # of a video, in the prompt style "native"
    sound: SoundConfig | None = None  # None: there is no sound tokenizer, or it was not asked for

    @classmethod
    def open(cls, path: str | Path, *, weights: bool = True, sound: bool = False, sound_encoder: bool = False) -> Self:
        """Reads the JSON of a folder, or of a Hugging Face repository ("nvidia/Cosmos3-Nano@main"), downloaded first.

        Without `weights`, everything else is downloaded; with `sound`, the sound tokenizer too, if there is one; with
        `sound_encoder`, which must then be there, also as `sound.encoder`. Raises InputError for a folder that is no such
        checkpoint.
        """
        folder = locate(path, weights=weights, sound=sound or sound_encoder)
        with _readable(folder):
            return cls._read(folder, sound=sound or sound_encoder, sound_encoder=sound_encoder)

    @classmethod
    def _read(cls, folder: Path, *, sound: bool, sound_encoder: bool) -> Self:
        for name in (*FOLDERS, "sound_tokenizer", "assets"):
            within(folder, folder / name)
        check_files(folder, folder / "text_tokenizer")
        index = read_json(folder / "model_index.json")
        if index.get("_class_name") not in PIPELINES:
            raise InputError(f"{folder}: model_index.json is of {index.get('_class_name')!r}; expected {PIPELINES[0]!r}")
        negative, modular = folder / "assets" / "negative_prompt.json", folder / "modular_model_index.json"
        transformer = TransformerConfig.from_json(read_json(folder / "transformer" / "config.json"))
        vae = VAEConfig.from_json(read_json(folder / "vae" / "config.json"))
        if transformer.latent_channel != vae.z_dim:
            raise InputError(
                f"{folder}: the transformer's latent_channel={transformer.latent_channel} is not the VAE's z_dim={vae.z_dim}"
            )
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        tokenizer = None
        if sound and (folder / "sound_tokenizer").is_dir():
            config = read_json(folder / "sound_tokenizer" / "config.json")
            tokenizer = SoundConfig.from_json(config, encoder=sound_encoder)
            if transformer.sound_gen and transformer.sound_dim != tokenizer.vocoder_input_dim:
                raise InputError(
                    f"{folder}: the transformer's sound_dim={transformer.sound_dim} is not the sound tokenizer's "
                    f"vocoder_input_dim={tokenizer.vocoder_input_dim}"
                )
        elif sound_encoder:
            raise InputError(f"{folder}: there is no sound tokenizer, so no sound can be learned from; leave sound out")
        return cls(
            folder,
            transformer,
            vae,
            SchedulerConfig.from_json(scheduler, read_json(modular) if modular.is_file() else {}),
            use_system_prompt=bool(index.get("default_use_system_prompt", True)),
            negative_prompt=json.dumps(read_json(negative)) if negative.is_file() else "",
            sound=tokenizer,
        )

    @property
    def name(self) -> str:
        """What it is called wherever it lies: "built-in", the id of its Hugging Face repository, or the folder's name."""
        if self.folder == BUILT_IN:
            return "built-in"
        return hub.repository(self.folder) or self.folder.resolve().name

    @property
    def revision(self) -> str | None:
        """The commit of the Hugging Face repository that it was downloaded from; None where nothing in the folder says so."""
        if not (self.folder / MARK).is_file():
            return hub.revision(self.folder)
        revision = read_json(self.folder / MARK).get("revision")
        return revision if isinstance(revision, str) else None

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """What tells the weights of each folder from others, wherever they lie. Raises InputError where they cannot be read."""
        folders = ("transformer", "vae", *["sound_tokenizer"] * (self.sound is not None))
        return {folder: self.weights.fingerprint(folder) for folder in folders}

    def identity(self, *folders: str) -> str:
        """What tells the weights in these folders from others: the commit, or else a checksum of a sample of each."""
        if self.revision is not None:
            return self.revision
        found = " ".join(self.fingerprints[folder] for folder in folders)
        return f"sample of sha256 {hashlib.sha256(found.encode()).hexdigest()[:16]}"

    @property
    def configs(self) -> tuple[TransformerConfig, VAEConfig, SchedulerConfig, SoundConfig | None]:
        """What a request is resolved for."""
        return self.transformer, self.vae, self.scheduler, self.sound

    @functools.cached_property
    def weights(self) -> PublishedWeights | ConvertedWeights:
        """Its weights, in whichever layout, opened once. Raises InputError for files that cannot be read."""
        if (self.folder / MARK).is_file():
            return ConvertedWeights(self.folder, self.transformer)
        return PublishedWeights(self.folder, self.transformer)

    def audited(self, networks: Mapping[str, Network]) -> Weights:
        """Its weights, of which every tensor was found to fit these abstract networks (names as in NAMES).

        Raises InputError with every tensor that is missing, unexpected, misshapen or not of floats; nothing was read by then.
        """
        with _readable(self.folder):
            problems = self.weights.audit(networks)
        if problems:
            raise InputError(f"{self.folder}: {faults(problems, ' in the tensors')}")
        return self.weights


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Raises InputError for what the system does not let us read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error})") from error


def locate(path: str | Path, *, weights: bool = True, sound: bool = False) -> Path:
    """The folder of a checkpoint, downloaded if need be. Raises InputError if there is none."""
    try:
        folder = Path(path).expanduser()
        is_folder, is_checkpoint = folder.is_dir(), (folder / "model_index.json").exists()
    except Exception as error:  # no path, one that is too long, or that may not be looked at
        name = shown(str(path) if isinstance(path, Path) else path)
        raise InputError(f"{name}: no folder that can be read ({getattr(error, 'strerror', None) or error})") from error
    if is_folder:
        if not is_checkpoint:
            raise InputError(f"{folder}: no model_index.json there; a checkpoint folder in the published layout is expected")
        return folder
    repository = Path(str(path).partition("@")[0])
    if folder.is_absolute() or len(repository.parts) != 2 or str(path).startswith("."):
        raise InputError(f"{path}: there is no such folder")
    return hub.download(str(path), (*FOLDERS, "sound_tokenizer") if sound else FOLDERS, weights=weights)


def load(weights: Weights, part: str, network: Network, *, progress: bool = False) -> Network:
    """An abstract network (`part` is one of NAMES) filled, with a bar of the bytes if there is `progress` to show."""
    total, visible = nbytes(network), progress and is_first()
    with tqdm(total=total, desc=f"load {NAMES[part]}", unit="B", unit_scale=True, disable=not visible) as bar:
        arrays: dict[str, Any] = dict(weights.read(part, network, bar.update))
    return Network(network.graph, map_weights(lambda path, _: arrays[path], network.weights))

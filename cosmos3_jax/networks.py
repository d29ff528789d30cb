"""The networks of a checkpoint, and which of them are on the devices: only what the next stage needs, if memory is short.

    stage            network   with text_tower="keep"    "drop", "host"
    encode           vae       always there              comes when it is needed
    prefill          und       always there              comes for a prompt, leaves right after it
    denoise          gen       always there              comes, and stays while there is room for the next
    decode           vae       always there              comes, and stays likewise
    decode sound     sound     comes at the first sound  comes, and stays likewise

What leaves is read again from the folder when it is needed ("drop"), or waits in host memory ("host").
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cosmos3_jax.config import SoundConfig, SoundEncoderConfig, TransformerConfig, VAEConfig
from cosmos3_jax.errors import InputError
from cosmos3_jax.models.sound import SoundDecoder
from cosmos3_jax.models.sound_encoder import SoundEncoder
from cosmos3_jax.models.transformer import GenTower, UndTower
from cosmos3_jax.models.vae import VAE
from cosmos3_jax.quantization import quantized
from cosmos3_jax.weights import Network, nbytes_on_device, split

HOST = "pinned_host"  # memory of the host that GPUs read by themselves
TEXT_TOWER = ("auto", "keep", "host", "drop")
QUANTIZE = (None, "fp8")
# The share of a device's memory that weights may take while a network runs. The prefill needs little beside them; what the
# others need grows with the video: by the dry run 16 GB at 720p for Nano on one GPU, beside 30.5 GB of weights.
ROOM = {"und": 0.9, "gen": 2 / 3, "vae": 2 / 3, "sound": 2 / 3}


class Networks(NamedTuple):
    """The networks of a checkpoint."""

    und: Network
    gen: Network
    vae: Network
    sound: Network | None = None

    def by_name(self) -> dict[str, Network]:
        """Those that there are."""
        return {part: network for part, network in self._asdict().items() if network is not None}


def abstract_networks(
    transformer: TransformerConfig, vae: VAEConfig, mesh: Mesh, dtype: str, sound: SoundConfig | None = None
) -> Networks:
    """The networks with shapes for weights: nothing is allocated. The sound decoder's are float32 whatever the `dtype`."""
    modules = [UndTower(transformer), GenTower(transformer), VAE(vae), *([SoundDecoder(sound)] if sound else [])]
    return Networks(*(split(module, mesh, jnp.dtype(dtype)) for module in modules))


def abstract_sound_encoder(config: SoundEncoderConfig, mesh: Mesh) -> Network:
    """The sound encoder likewise: "sound_encoder" where weights are audited and loaded. Only training needs it."""
    return split(SoundEncoder(config), mesh, jnp.float32)


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that JAX may take of each device of this process; None where it does not say (CPUs)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return min((limit for limit in limits if limit), default=None)


class Fill(Protocol):
    """Where weights come from; `checkpoint.load` of a folder is one."""

    def __call__(self, part: str, network: Network, *, progress: bool) -> Network:
        """An abstract network ("und", "gen", "vae" or "sound") filled."""


class Residence:
    """The networks of a checkpoint as they come to the devices and leave.

    It holds the only references to what `fill` gives it, so that what leaves is freed. Raises InputError for a `text_tower`
    that the devices do not allow.
    """

    def __init__(self, fill: Fill, abstract: Networks, mesh: Mesh, text_tower: str = "auto", *, quantize: str | None = None):
        kinds = {memory.kind for memory in mesh.local_devices[0].addressable_memories()}
        if text_tower == "host" and HOST not in kinds:
            raise InputError(f'text_tower="host": these devices cannot reach memory of the kind {HOST}; use "drop" or "keep"')
        self.fill, self.abstract, self.memory = fill, abstract.by_name(), device_memory(mesh)
        self.quantize = quantize  # "fp8": the matrices of the generating tower, once they are on the devices
        self.sizes = {part: nbytes_on_device(self._quantized(part, network)) for part, network in self.abstract.items()}
        self.text_tower = self._chosen() if text_tower == "auto" else text_tower
        self.on_devices: dict[str, Network] = {}
        self.on_host: dict[str, Network] = {}

    def _chosen(self) -> str:
        fits = self.memory is None or sum(self.sizes.values()) <= ROOM["gen"] * self.memory
        return "keep" if fits else "drop"

    def __str__(self) -> str:
        """What became of `text_tower`, with the reason."""
        of = "" if self.memory is None else f" of {self.memory / 1e9:.3g}"
        return f"{self.text_tower} (all weights take {sum(self.sizes.values()) / 1e9:.3g}{of} GB of each device)"

    def bring(self, part: str, *, progress: bool = False) -> Network:
        """A network on the devices; before it comes, others leave if they have to. The caller must not hold on to it."""
        if part not in self.on_devices:
            self._make_room(part)
            if part in self.on_host:
                placement = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), self.on_host[part])
                self.on_devices[part] = jax.block_until_ready(jax.device_put(self.on_host[part], placement))
            else:
                self.on_devices[part] = self._quantized(part, self.fill(part, self.abstract[part], progress=progress))
        return self.on_devices[part]

    def _quantized(self, part: str, network: Network) -> Network:
        return quantized(network) if self.quantize == "fp8" and part == "gen" else network

    def release(self, part: str) -> None:
        """Says that a network has run: the text tower leaves, unless it is kept."""
        if part == "und" and self.text_tower != "keep":
            self._leave(part)

    def _make_room(self, part: str) -> None:
        """Lets networks leave, the longest there first, until `part` fits."""
        if self.memory is None or self.text_tower == "keep":
            return
        for other in list(self.on_devices):
            if sum(self.sizes[each] for each in (part, *self.on_devices)) > ROOM[part] * self.memory:
                self._leave(other)

    def _leave(self, part: str) -> None:
        network = self.on_devices.pop(part)
        if self.text_tower == "host" and part not in self.on_host:
            placement = jax.tree.map(lambda x: x.sharding.with_memory_kind(HOST), network)
            self.on_host[part] = jax.block_until_ready(jax.device_put(network, placement))

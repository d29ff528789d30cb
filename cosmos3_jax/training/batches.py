"""From clips to batches: in which order they come, and what is drawn for each. The only file that imports grain.

Everything that is random is drawn here, each clip's from the seed and its place in the order alone: so the place is all that a
run must remember to go on, and neither mesh nor number of processes changes anything.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cosmos3_jax import positions
from cosmos3_jax.axes import place
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.latents import Latents
from cosmos3_jax.models.layers import Rotary
from cosmos3_jax.prompt import pad
from cosmos3_jax.training.objective import Batch, draw_sigma

EPOCHS = 1 << 30  # nobody waits for the end; grain's own infinity is too much for a batch of one


class Example(NamedTuple):
    """A clip and its caption, as they are learned from."""

    latents: Latents  # video [t, h, w, c], sound [s, c]; clean, float32
    ids: Sequence[int]  # of the caption's tokens


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is drawn for each clip."""

    flow_shift: float = 10.0  # of the noise levels of a video
    image_flow_shift: float = 3.0  # of an image's
    caption_dropout: float = 0.1  # the share of clips without their caption, for guidance to have something to lead away from
    image_share: float = 0.2  # of which the first frame is given
    clip_share: float = 0.1  # of which the first two latent frames are


class Drawn(NamedTuple):
    """An example with what was drawn for it."""

    latents: Latents
    ids: Sequence[int]
    sigma: np.float32
    is_given_t: np.ndarray
    seed: np.uint32


def draw(example: Example, random: np.random.Generator, how: Draws, no_caption: Sequence[int]) -> Drawn:
    """An example with a noise level, given frames, and perhaps without its caption."""
    frames = len(example.latents.video)
    sigma = draw_sigma(random, how.flow_shift if frames > 1 else how.image_flow_shift)
    dropped, kind = random.random() < how.caption_dropout, random.random()
    given = 1 if kind < how.image_share else 2 if kind < how.image_share + how.clip_share else 0
    is_given_t = np.arange(frames) < min(given, frames - 1)
    seed = np.uint32(random.integers(1 << 32))
    return Drawn(example.latents, no_caption if dropped else example.ids, sigma, is_given_t, seed)


def batches(
    kinds: Sequence[Sequence[Example]],
    size: int,
    seed: int,
    how: Draws,
    no_caption: Sequence[int],
    *,
    threads: int = 4,
) -> grain.DatasetIterator:
    """Lists of `size` drawn examples without end, all of one of the `kinds` (shapes), each kind as often as there are of it.

    Every example comes once before any comes again, in another order each time. The iterator's `get_state()` is its place.
    """
    parts = [
        grain.MapDataset.source(kind)
        .seed(seed + i)
        .shuffle()
        .repeat(EPOCHS)
        .random_map(lambda example, random: draw(example, random, how, no_caption))
        .batch(size, batch_fn=list)
        for i, kind in enumerate(kinds)
    ]
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, [len(kind) for kind in kinds])
    return iter(mixed.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def collate(rows: Sequence[Drawn], config: TransformerConfig, fps: float, longest: int) -> Batch:
    """Drawn examples as one batch of host arrays; captions are padded as one of `longest` tokens is."""
    ids_BS, length_B = pad([list(row.ids) for row in rows], longest)
    latents = jax.tree.map(lambda *each: np.stack(each), *(row.latents for row in rows))
    sound_frames = 0 if latents.sound is None else latents.sound.shape[1]
    text, generated = positions.layout(config, length_B, ids_BS.shape[1], latents.video.shape[1:4], fps, sound_frames)
    text_rotary, rotary = (Rotary(*each) for each in (text, generated))  # type: ignore[arg-type] # numpy, still
    sigma_B, is_given_Bt, seed_B = (np.stack([getattr(row, name) for row in rows]) for name in ("sigma", "is_given_t", "seed"))
    return Batch(latents, ids_BS, length_B, text_rotary, rotary, sigma_B, is_given_Bt, seed_B)


def put(batches: Sequence[Batch], mesh: Mesh) -> Batch:
    """Batches of equal shapes as one on the devices, [n, B, …]: rows divided over `cfg`. Every process has all of them."""
    stacked = jax.tree.map(lambda *each: np.stack(each), *batches)

    def divided(x: np.ndarray) -> jax.Array:
        placement = NamedSharding(mesh, PartitionSpec(None, "cfg"))
        return jax.make_array_from_callback(x.shape, placement, lambda index: x[index])

    text_rotary = place(mesh, stacked.text_rotary)  # which all rows share
    return dataclasses.replace(jax.tree.map(divided, dataclasses.replace(stacked, text_rotary=None)), text_rotary=text_rotary)

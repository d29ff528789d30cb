"""Trains the built-in checkpoint from random weights: `python -m benchmarks.small_world.train WORK` writes WORK/checkpoint.

Tokenizer, VAE, sound tokenizer and transformer, one after the other. The autoencoders see new scenes at every step, the
transformer films that are encoded once. What is finished is kept in WORK, so that the same command goes on where it was
stopped. WORK/small-world-training.json tells the seconds of each stage, and what they ran on.

    python -m benchmarks.small_world.train WORK --checkpoint DIR

trains the transformer of such a checkpoint further, on other films; all else in it stays as it is.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tqdm import tqdm

from benchmarks.record import surroundings
from benchmarks.record import write as write_record
from benchmarks.small_world import autoencoders
from benchmarks.small_world.autoencoders import fit
from benchmarks.small_world.film import CLIP, frames
from benchmarks.small_world.film import sound as tone
from benchmarks.small_world.scene import SHAPES, TWO, Scene, Thing, caption, draw_scene
from convert.random_checkpoint import write_checkpoint, write_tokenizer
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.checkpoint import Checkpoint, load
from cosmos3_jax.config import TINY, TINY_SOUND, TINY_VAE, SoundEncoderConfig, VAEConfig
from cosmos3_jax.latents import Latents
from cosmos3_jax.lora import TOWERS
from cosmos3_jax.models.sound import SoundDecoder
from cosmos3_jax.models.sound_encoder import SoundEncoder
from cosmos3_jax.models.transformer import GenTower, UndTower
from cosmos3_jax.models.vae import VAE
from cosmos3_jax.prompt import Metadata, load_tokenizer, native_texts, tokenize
from cosmos3_jax.published import FOLDER_OF, disarrange, names_of
from cosmos3_jax.safetensors_files import STEM, write_tensors
from cosmos3_jax.stop import stoppable
from cosmos3_jax.training.batches import Drawn, Draws, Example, batches, collate, put
from cosmos3_jax.training.run import Run, Schedule
from cosmos3_jax.training.trained import Whole, values_of
from cosmos3_jax.training.update import Optimization, Progress, TrainState, begin, update
from cosmos3_jax.weights import Network, by_path, is_stacked, map_weights, random_weights, some, split

TRANSFORMER_CONFIG = dataclasses.replace(
    TINY, hidden_size=160, intermediate_size=400, num_hidden_layers=6, head_dim=20, rope_axes_dim=(4, 3, 3)
)
VAE_CONFIG = dataclasses.replace(TINY_VAE, base_dim=16, num_res_blocks=1)
SOUND_CONFIG = dataclasses.replace(
    TINY_SOUND,
    sampling_rate=16_000,
    dec_strides=(2, 4, 4, 4, 5),
    encoder=SoundEncoderConfig(enc_dim=6, enc_latent_dim=16, enc_strides=(2, 4, 5)),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of everything."""

    vae_steps: int = 16_000
    short_steps: int = 13_500  # of these, from short films
    sound_steps: int = 1500
    examples: int = 12_000  # films, encoded once
    pairs: int = 6_000  # films more, of two things, which are harder to learn than one
    images: int = 1_500  # of one frame
    seeds: tuple[int, int, int] = (4, 8, 5)  # of these three
    steps: int = 24_000  # of the transformer
    flow_shift: float = 5.0  # of the noise levels of films
    rate: float = 1.5e-3  # its highest learning rate
    batch_size: int = 32


FURTHER = Plan(examples=4_800, pairs=0, images=300, seeds=(14, 18, 15), steps=1_800, flow_shift=4.0, rate=5e-4)
QUICK = Plan(vae_steps=2, short_steps=1, sound_steps=2, examples=8, pairs=4, images=4, steps=2, batch_size=2)
SHORT_FILMS, FILMS = (12, autoencoders.SHORT), (3, autoencoders.LONG)  # (batch size, frames) that the VAE learns from
SOUND_BATCH, SOUND_LATENTS = 8, 10
QUIET = 0.01  # the sound decoder's last weights, and the last of each residual unit, begin with so much of their usual size
VAE_RATE, SOUND_RATE = 2e-3, 1e-3  # learning rates, the highest

RECORD = "small-world-training.json"

Values = dict[str, Any]
"""The weights of a network, by path."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The folder of what is finished."""

    folder: Path

    def stage(self, name: str, make: Callable[[], Any]) -> Any:
        """What a stage makes, a tree of arrays and numbers, now or in an earlier run; its time is in the record."""
        file = self.folder / f"{name}.pickle"
        if not file.exists():
            start = time.perf_counter()
            try:
                made = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, make())
            finally:
                self.tell(name, time.perf_counter() - start)
            partial = file.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(made))
            partial.rename(file)
        return pickle.loads(file.read_bytes())

    def tell(self, name: str, seconds: float) -> None:
        """Adds to a stage's time on record, for it may have been stopped before; with what it runs on."""
        file = self.folder / RECORD
        before = json.loads(file.read_text())["seconds"] if file.exists() else {}
        taken = before | {name: round(before.get(name, 0) + seconds)}
        write_record({"kind": "small_world_training", "seconds": taken, **surroundings()}, file)
        print(f"{name}: {taken[name]} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_world.train", description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="train its transformer further (from random weights)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, in WORK/quick, to see that it runs")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that times are told
    folder: Path = arguments.work / "quick" if arguments.quick else arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(folder)
    if arguments.checkpoint is None:
        plan = QUICK if arguments.quick else Plan()
        config, networks = train_autoencoders(plan, work)
        towers = {"und": fresh(UndTower(TRANSFORMER_CONFIG), 6), "gen": fresh(GenTower(TRANSFORMER_CONFIG), 7)}
        networks |= {part: values(network) for part, network in towers.items()}
    else:
        plan = QUICK if arguments.quick else FURTHER
        config, networks = read(arguments.checkpoint)
        shutil.copytree(arguments.checkpoint / "text_tokenizer", folder / "text_tokenizer", dirs_exist_ok=True)
    latents = work.stage("latents", lambda: encode(plan, config, networks["vae"]))
    kinds, nothing = examples(folder, latents, encode_sounds(networks["sound_encoder"]))
    networks |= work.stage("transformer", lambda: train_transformer(plan, folder, networks, kinds, nothing))
    write(folder / "checkpoint", config, networks, folder / "text_tokenizer")
    if arguments.checkpoint is not None:
        for name in ("vae", "sound_tokenizer"):
            shutil.copytree(arguments.checkpoint / name, folder / "checkpoint" / name, dirs_exist_ok=True)
    size = sum(file.stat().st_size for file in (folder / "checkpoint").rglob("*") if file.is_file())
    print(f"{folder / 'checkpoint'}: {size / 1e6:.1f} MB")


def train_autoencoders(plan: Plan, work: Work) -> tuple[VAEConfig, dict[str, Values]]:
    """The VAE with the statistics of its latents, and the sound tokenizer; the text tokenizer in its folder."""
    folder = work.folder
    if not (folder / "text_tokenizer").exists():
        write_tokenizer(folder / "text_tokenizer", list(texts(5000)))
    vae, (mean, std) = work.stage("vae", lambda: train_vae(plan, folder))
    sound = work.stage("sound", lambda: train_sound(plan, folder))
    config = dataclasses.replace(VAE_CONFIG, latents_mean=tuple(mean), latents_std=tuple(std))
    return config, {"vae": vae, "sound": sound["decoder"], "sound_encoder": sound["encoder"]}


def read(folder: Path) -> tuple[VAEConfig, dict[str, Values]]:
    """A checkpoint of this script: its VAE's config, and the weights of all its networks. Raises InputError for another."""
    checkpoint = Checkpoint.open(folder, sound=True, sound_encoder=True)
    networks = {part: split(module, make_mesh(), jnp.float32) for part, module in modules(checkpoint.vae).items()}
    weights = checkpoint.audited(networks)
    return checkpoint.vae, {part: values(load(weights, part, network)) for part, network in networks.items()}


def modules(config: VAEConfig) -> dict[str, nnx.Module]:
    """All networks, without weights."""
    assert SOUND_CONFIG.encoder is not None
    return {
        "und": UndTower(TRANSFORMER_CONFIG),
        "gen": GenTower(TRANSFORMER_CONFIG),
        "vae": VAE(config),
        "sound": SoundDecoder(SOUND_CONFIG),
        "sound_encoder": SoundEncoder(SOUND_CONFIG.encoder),
    }


def texts(count: int) -> Iterator[str]:
    """Captions as a prompt has them, to train the tokenizer on."""
    random = np.random.default_rng(1)
    for _ in range(count):
        yield caption(draw_scene(random), random)
        height, width = random.integers(2, 46, 2) * 16
        metadata = Metadata(1 + 4 * int(random.integers(48)), int(height), int(width), float(random.integers(12, 31)))
        yield native_texts("", "", metadata, "")[0]


def fresh(module: nnx.Module, seed: int) -> Network:
    """A network with random weights."""
    network = split(module, make_mesh(), jnp.float32)
    return Network(network.graph, random_weights(network.weights, seed))


def values(network: Network) -> Values:
    """Its weights, by path."""
    return values_of({"": network})[""]


def filled(module: nnx.Module, weights: Values) -> Network:
    """A network with these weights."""
    network = split(module, make_mesh(), jnp.float32)
    return Network(network.graph, map_weights(lambda path, _: jnp.asarray(weights[path]), network.weights))


def train_vae(plan: Plan, folder: Path) -> tuple[Values, Any]:
    """The VAE's weights, and the mean and the deviation of its latents, a number for each channel."""

    def crops(step: int) -> np.ndarray:
        return autoencoders.crops(*(SHORT_FILMS if step < plan.short_steps else FILMS), seed=1, step=step)

    vae = fit(fresh(VAE(VAE_CONFIG), 1), autoencoders.vae_loss, crops, plan.vae_steps, VAE_RATE, kept=folder / "vae.fit")
    films = [film for _, _, film in scenes(64, seed=2)]
    encoded = np.concatenate([np.asarray(encode_clip(vae, pixels(film))).reshape(-1, VAE_CONFIG.z_dim) for film in films])
    print("vae: psnr of the worst frame of each film, dB:", np.round(sorted(autoencoders.psnr(vae, map(pixels, films))), 1))
    return values(vae), [np.round(x, 4).tolist() for x in (encoded.mean(axis=0), encoded.std(axis=0))]


def train_sound(plan: Plan, folder: Path) -> dict[str, Values]:
    """The weights of the sound tokenizer."""
    assert SOUND_CONFIG.encoder is not None
    decoder = fresh(SoundDecoder(SOUND_CONFIG), 3)
    # As good as silent, for what is clipped has no gradient.
    quiet = map_weights(lambda path, w: w.get_value() * (QUIET if "conv2" in path else 1), decoder.weights)
    networks = {"encoder": fresh(SoundEncoder(SOUND_CONFIG.encoder), 2), "decoder": Network(decoder.graph, quiet)}
    samples = SOUND_LATENTS * SOUND_CONFIG.samples_per_latent
    tones = functools.partial(autoencoders.tones, SOUND_BATCH, samples, SOUND_CONFIG, 3)
    networks = fit(networks, autoencoders.sound_loss, tones, plan.sound_steps, SOUND_RATE, kept=folder / "sound.fit")
    return {part: values(network) for part, network in networks.items()}


def scenes(count: int, seed: int, two: float = TWO) -> Iterator[tuple[Scene, str, np.ndarray]]:
    """Scenes, what is said of them, and their films, uint8 [t, h, w, 3]."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        scene = draw_scene(random, two)
        yield scene, caption(scene, random), frames(scene, random, CLIP)


def pixels(film_thwc: np.ndarray) -> np.ndarray:
    """In [-1, 1]."""
    return film_thwc.astype(np.float32) / 127.5 - 1


@jax.jit
def encode_clip(vae: Network, pixels_thwc: Any) -> jax.Array:
    """Normalized latents of a film."""
    return vae.merge().encode(pixels_thwc)


def encode(plan: Plan, config: VAEConfig, vae: Values) -> dict[str, Any]:
    """The latents of films and of pictures, in half precision, their captions, and the shapes that are heard."""
    network = filled(VAE(config), vae)
    found: dict[str, Any] = {"films": [], "film_texts": [], "first_shapes": [], "images": [], "image_texts": []}
    of_films, of_pairs, of_images = plan.seeds
    films = itertools.chain(scenes(plan.examples, of_films), scenes(plan.pairs, of_pairs, two=1))
    for scene, text, film in tqdm(films, desc="encode", total=plan.examples + plan.pairs):
        found["films"].append(np.asarray(encode_clip(network, pixels(film)), np.float16))
        found["film_texts"].append(text)
        found["first_shapes"].append(scene.things[0].shape)
    for _, text, film in scenes(plan.images, of_images):
        found["images"].append(np.asarray(encode_clip(network, pixels(film[:1])), np.float16))
        found["image_texts"].append(text)
    return found


def encode_sounds(encoder: Values) -> dict[str, np.ndarray]:
    """The sound latents of a film, by the shape that is heard."""
    assert SOUND_CONFIG.encoder is not None
    network, config = filled(SoundEncoder(SOUND_CONFIG.encoder), encoder), SOUND_CONFIG
    samples = config.latent_frames(CLIP.num_frames, CLIP.fps) * config.samples_per_latent
    found = {}
    for shape in SHAPES:
        scene = Scene((Thing(shape, "red", "still"),))
        found[shape] = np.asarray(network.merge().encode(tone(scene, samples, config.sampling_rate, config.dec_out_channels).T))
    return found


def examples(folder: Path, latents: dict[str, Any], sounds: dict[str, np.ndarray]) -> tuple[list[list[Example]], list[int]]:
    """Films with sound, films without, and pictures; and the tokens of no caption."""
    tokenizer = load_tokenizer(folder / "text_tokenizer", TRANSFORMER_CONFIG.vocab_size)

    def ids(text: str, num_frames: int) -> list[int]:
        metadata = Metadata(num_frames, CLIP.height, CLIP.width, CLIP.fps)
        return tokenize(tokenizer, native_texts(text, "", metadata, "")[0])

    films = [
        Example(Latents(np.asarray(video, np.float32), sounds[shape]), ids(text, CLIP.num_frames))
        for video, text, shape in zip(latents["films"], latents["film_texts"], latents["first_shapes"], strict=True)
    ]
    silent = [Example(Latents(film.latents.video), film.ids) for film in films]
    pairs = zip(latents["images"], latents["image_texts"], strict=True)
    images = [Example(Latents(np.asarray(video, np.float32)), ids(text, 1)) for video, text in pairs]
    return [films, silent, images], tokenize(tokenizer, "")


def train_transformer(
    plan: Plan, folder: Path, start: dict[str, Values], kinds: list[list[Example]], nothing: list[int]
) -> dict[str, Values]:
    """The weights of both towers, averaged; from `start`, or from where an earlier run was stopped."""
    towers = {part: filled(module, start[part]) for part, module in modules(VAE_CONFIG).items() if part in TOWERS}
    how = Optimization(steps=plan.steps, learning_rate=plan.rate, warmup=200, weight_decay=0.01, average=0.999)
    trained, mesh = Whole(towers, jnp.float32), make_mesh()
    state = begin(values_of(towers), how, mesh)
    empty = {part: some(network, lambda path: False) for part, network in towers.items()}
    draws = Draws(plan.flow_shift, image_flow_shift=3.0, caption_dropout=0.1, image_share=0.2, clip_share=0.05)
    data = batches(kinds, plan.batch_size, 8, draws, nothing)
    longest = max(len(example.ids) for kind in kinds for example in kind)
    run = Run(folder / "run", {"plan": dataclasses.asdict(plan)})
    compiled = update(trained, how, state, train_und=True)

    def step(state: TrainState, rows: Sequence[Drawn]) -> tuple[TrainState, Progress]:
        return compiled(state, empty, put([collate(rows, TRANSFORMER_CONFIG, CLIP.fps, longest)], mesh))

    with jax.set_mesh(mesh), stoppable() as check:
        state = run.go(run.resume(state, data), data, step, Schedule(plan.steps), check=check)
    assert state.average is not None
    return state.average


def write(folder: Path, config: VAEConfig, networks: dict[str, Values], tokenizer: Path) -> None:
    """The checkpoint in the published layout, in bfloat16; what generation does not read is zero."""
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder, TRANSFORMER_CONFIG, config, SOUND_CONFIG, dtype=jnp.bfloat16)
    shutil.copytree(tokenizer, folder / "text_tokenizer", dirs_exist_ok=True)
    for name in ("transformer", "vae", "sound_tokenizer"):
        tensors = {key: np.zeros(x.shape, jnp.bfloat16) for key, x in load_file(folder / name / f"{STEM}.safetensors").items()}
        for part, module in modules(config).items():
            if FOLDER_OF[part] == name:
                tensors |= published(part, filled(module, networks[part]))
        write_tensors(folder / name, [tensors])


def published(part: str, network: Network) -> dict[str, np.ndarray]:
    """A network's weights as tensors of a file, in bfloat16; of a convolution of the sound, directions and magnitudes."""
    names = names_of(part, network, TRANSFORMER_CONFIG)
    tensors: dict[str, np.ndarray] = {}
    for path, w in by_path(network.weights).items():
        whole = np.asarray(w.get_value())
        if is_stacked(w) or len(names[path]) == 1:
            parts = [disarrange(each, w) for each in (whole if is_stacked(w) else [whole])]
        else:
            v = disarrange(whole, w)
            parts = [v, np.linalg.norm(v.reshape(len(v), -1), axis=1).reshape(-1, 1, 1)]
        tensors |= {name: np.asarray(each, jnp.bfloat16) for name, each in zip(names[path], parts, strict=True)}
    return tensors


if __name__ == "__main__":
    main()

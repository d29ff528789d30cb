"""The order of things in training, from clips to a checkpoint.

clips.find_clips -> latent_cache (VAE, sound encoder; once a clip) -> batches -> update, step by step -> results
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from cosmos3_jax import media
from cosmos3_jax.checkpoint import Checkpoint, Weights, load
from cosmos3_jax.config import SoundConfig, SoundEncoderConfig
from cosmos3_jax.conversion import Source
from cosmos3_jax.errors import InputError, shown
from cosmos3_jax.folder import writing
from cosmos3_jax.latents import Latents
from cosmos3_jax.lora import TARGETS, TEXT_TARGETS, TOWERS, Adapter, abstract_adapters, random_adapters
from cosmos3_jax.networks import Networks, Residence, abstract_networks, abstract_sound_encoder
from cosmos3_jax.pipeline import Cosmos3Pipeline, encode, encode_sound
from cosmos3_jax.processes import agree, is_first
from cosmos3_jax.prompt import MOST_TOKENS, Metadata, texts, tokenize
from cosmos3_jax.request import Request, ResolvedRequest, resolve
from cosmos3_jax.stage import failures_told
from cosmos3_jax.training import latent_cache
from cosmos3_jax.training.batches import Drawn, Draws, Example, batches, collate, put
from cosmos3_jax.training.clips import Clip, frames
from cosmos3_jax.training.latent_cache import LatentCache
from cosmos3_jax.training.results import write_folder, write_lora
from cosmos3_jax.training.run import Run, Schedule
from cosmos3_jax.training.settings import Training
from cosmos3_jax.training.trained import Adapters, Values, Whole, values_of
from cosmos3_jax.training.update import Optimization, Progress, TrainState, begin, update
from cosmos3_jax.weights import Network, some

log = logging.getLogger(__name__)
SIZES = "num_frames", "height", "width", "fps", "enable_sound"


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint to be trained on a mesh."""

    checkpoint: Checkpoint
    tokenizer: Any
    mesh: Mesh
    dtype: str  # that is computed in; what is trained is float32

    def weights(self) -> Weights:
        """Its weights, found to fit. Raises InputError where they do not."""
        networks, sound = self.abstract(self.dtype).by_name(), self.checkpoint.sound
        if sound is not None and sound.encoder is not None:
            networks["sound_encoder"] = abstract_sound_encoder(sound.encoder, self.mesh)
        return self.checkpoint.audited(networks)

    def abstract(self, dtype: str) -> Networks:
        """Its networks, with shapes for weights."""
        checkpoint = self.checkpoint
        return abstract_networks(checkpoint.transformer, checkpoint.vae, self.mesh, dtype, checkpoint.sound)

    def towers(self, dtype: str) -> dict[str, Network]:
        """The two that can be trained."""
        return {part: network for part, network in self.abstract(dtype).by_name().items() if part in TOWERS}


def post_train(
    model: Model,
    clips: Sequence[Clip],
    settings: Training,
    out: Path,
    cache: Path,
    *,
    check: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> Path:
    """Trains, or goes on with it, in the folder `out`; returns what became of it, a folder or a file of adapters.

    `check` is called before each clip and each step, and may raise StoppedError. Raises InputError for what cannot be used:
    but for files that turn out to be damaged or too short, before any clip is encoded.
    """
    settings, weights = settings.checked(), model.weights()
    asked = request_of(model, clips, settings)
    settings = dataclasses.replace(settings, **{name: getattr(asked, name) for name in SIZES})
    how, drawn, adapters = optimization(settings), draws(model, settings), adapters_of(model, settings)
    base = Source.open(model.checkpoint.folder) if adapters is None else None
    if model.checkpoint.scheduler.distilled_sigmas:
        log.warning("the checkpoint is distilled for few steps, and this training is not for these: they may end up worse")
    for prompt in settings.sample_prompts:
        tokens(model, prompt, asked, f"the sample prompt {shown(prompt)}")
    if (out / "checkpoint").resolve() == model.checkpoint.folder.resolve():
        raise InputError(f"{out}: the checkpoint to begin with is in there, where the result goes; give another folder")
    run, result = Run(out, about(model, clips, settings)), out / ("checkpoint" if adapters is None else "lora.safetensors")
    if run.saved.latest is None and result.exists():
        raise InputError(f"{result}: is there already, and no state of a run that goes on; give another folder")
    agree(run.about)
    with jax.set_mesh(model.mesh), jax.default_matmul_precision("highest" if model.dtype == "float32" else None):
        kinds = examples(model, clips, asked, weights, cache, check=check, progress=progress)
        trained, values, frozen = prepare(model, settings, adapters, weights, progress=progress)
        nothing = tokenize(model.tokenizer, "")
        data = batches(kinds, settings.batch_size * settings.accumulate, settings.seed, drawn, nothing)
        with failures_told("load"):
            state = run.resume(begin(values, how, model.mesh), data)
        compiled = update(trained, how, state, train_und="und" in values, sound_weight=settings.sound_weight)
        longest = max(len(ids) for kind in kinds for ids in (nothing, *kind.ids))

        def step(state: TrainState, rows: Sequence[Drawn]) -> tuple[TrainState, Progress]:
            parts = [rows[i :: settings.accumulate] for i in range(settings.accumulate)]
            batches = [collate(part, model.checkpoint.transformer, settings.fps, longest) for part in parts]
            return compiled(state, frozen, put(batches, model.mesh))

        def sample(state: TrainState, folder: Path) -> None:
            if not settings.sample_prompts:
                return
            with failures_told("sample"):
                networks = trained.networks(kept(state), frozen)
            show(model, weights, networks, asked, settings.sample_prompts, folder)

        schedule = Schedule(settings.steps, settings.save_every, settings.sample_every)
        state = run.go(state, data, step, schedule, sample=sample, check=check, progress=progress)
    write(result, model, base, trained, kept(state))
    return result


def request_of(model: Model, clips: Sequence[Clip], settings: Training) -> ResolvedRequest:
    """What a clip is, as a request that would make one: sizes, sound and the shift of the noise levels, checked as its are."""
    request = Request(prompt="", **{name: getattr(settings, name) for name in (*SIZES, "flow_shift")})
    if all(clip.is_image for clip in clips):
        request = dataclasses.replace(request, num_frames=1, enable_sound=False)
    cfg = model.mesh.shape["cfg"]
    if settings.batch_size % cfg:
        raise InputError(f"batch_size={settings.batch_size}: cfg={cfg} does not divide it; use {settings.batch_size * cfg}")
    return resolve(request, *model.checkpoint.configs)


def draws(model: Model, settings: Training) -> Draws:
    """What is drawn for each clip. Raises InputError for a flow shift that cannot be used."""
    request = Request("", height=settings.height, width=settings.width, flow_shift=settings.flow_shift)

    def shift(num_frames: int) -> float:
        return resolve(dataclasses.replace(request, num_frames=num_frames), *model.checkpoint.configs).flow_shift

    return Draws(shift(settings.num_frames), shift(1), settings.caption_dropout, settings.image_share, settings.clip_share)


def optimization(settings: Training) -> Optimization:
    """How weights are moved."""
    rate = settings.learning_rate or (2e-5 if settings.lora_rank is None else 1e-4)
    return Optimization(settings.steps, rate, settings.warmup, settings.weight_decay, settings.clip_norm, settings.average)


def about(model: Model, clips: Sequence[Clip], settings: Training) -> dict[str, Any]:
    """All that a run depends on but its length: with another mesh it would go on too, but not bit for bit."""
    free = ("steps", "save_every", "sample_every", "sample_prompts")
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    said = json.dumps([[clip.path.name, clip.path.stat().st_size, clip.caption] for clip in clips])
    names = {"checkpoint": model.checkpoint.name, "weights": model.checkpoint.identity("transformer")}
    names["clips"] = f"{len(clips)}, sha256 {hashlib.sha256(said.encode()).hexdigest()[:16]}"
    return {**names, **dict(model.mesh.shape), "dtype": model.dtype, **values}


def examples(
    model: Model,
    clips: Sequence[Clip],
    asked: ResolvedRequest,
    weights: Weights,
    cache: Path,
    *,
    check: Callable[[], None],
    progress: bool,
) -> list["Examples"]:
    """The clips as latents and tokens, those of one shape together; latents that are not in the cache are made.

    Every process of a mesh makes its own: they may share the cache, but need not.
    """
    made_by = {
        "checkpoint": str(model.checkpoint.folder.resolve()),
        "weights": model.checkpoint.identity("vae", *["sound_tokenizer"] * asked.enable_sound),
        "dtype": model.dtype,
        "shape": [asked.num_frames, asked.height, asked.width],
        "fps": asked.fps,
        "sound": asked.enable_sound,
    }
    store = LatentCache(cache, made_by)
    store.open()
    encoder = Encoder(model, weights, asked)
    ids = [caption_ids(model, clip, asked) for clip in clips]
    files: list[Path] = []
    with tqdm(clips, desc="encode", unit="clip", disable=not (progress and is_first())) as bar:
        for clip in bar:
            check()
            files.append(store.add(clip.path, functools.partial(encoder, clip)))
    kinds: dict[Any, Examples] = {}
    for clip, file, caption in zip(clips, files, ids, strict=True):
        kinds.setdefault(clip.is_image, Examples()).add(file, caption)
    return list(kinds.values())


def caption_ids(model: Model, clip: Clip, asked: ResolvedRequest) -> list[int]:
    """The tokens of a caption. Raises InputError for one that is too long."""
    if clip.is_image:
        asked = dataclasses.replace(asked, num_frames=1)
    return tokens(model, clip.caption, asked, f"the caption of {clip.path}")


def tokens(model: Model, text: str, asked: ResolvedRequest, what: str) -> list[int]:
    """The tokens of a text that is written as a prompt is. Raises InputError for one that is too long."""
    metadata = Metadata(asked.num_frames, asked.height, asked.width, asked.fps)
    ids = tokenize(model.tokenizer, texts("native", text, "", metadata, "")[0])
    if len(ids) > MOST_TOKENS:
        raise InputError(f"{what}: {len(ids)} tokens; {MOST_TOKENS} are possible; shorten it")
    return ids


class Examples(Sequence[Example]):
    """Clips of one shape, whose latents are read when they are asked for: what grain takes for a list."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.ids: list[list[int]] = []

    def add(self, file: Path, ids: list[int]) -> None:
        """One more."""
        self.files.append(file)
        self.ids.append(ids)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        return Example(latent_cache.read(self.files[index]), self.ids[index])


class Encoder:
    """Clips to latents; VAE and sound encoder are loaded for the first that needs them."""

    def __init__(self, model: Model, weights: Weights, asked: ResolvedRequest):
        self.model, self.weights, self.asked = model, weights, asked

    def __call__(self, clip: Clip) -> Latents:
        """Raises InputError for a file that cannot be read, or is too short."""
        asked = self.asked
        pixels = frames(clip, asked.num_frames, asked.height, asked.width, asked.fps)
        with failures_told("encode"):
            video = np.asarray(encode(self.vae, pixels))
        return Latents(video, self.sound(clip) if asked.enable_sound and not clip.is_image else None)

    def sound(self, clip: Clip) -> np.ndarray:
        """Sound latents [s, c] of as much of the soundtrack as the frames last."""
        config, encoder = self.sound_config
        samples = self.asked.sound_frames(config) * config.samples_per_latent
        wave_cn = media.open_sound(clip.path, config.sampling_rate, encoder.channels, samples)
        with failures_told("encode"):
            return np.asarray(encode_sound(self.sound_encoder, wave_cn.T))

    @property
    def sound_config(self) -> tuple[SoundConfig, SoundEncoderConfig]:
        config = self.model.checkpoint.sound
        assert config is not None
        assert config.encoder is not None
        return config, config.encoder

    @functools.cached_property
    def vae(self) -> Network:
        return load(self.weights, "vae", self.model.abstract(self.model.dtype).vae)

    @functools.cached_property
    def sound_encoder(self) -> Network:
        return load(self.weights, "sound_encoder", abstract_sound_encoder(self.sound_config[1], self.model.mesh))


def adapters_of(model: Model, settings: Training) -> dict[str, dict[str, Adapter]] | None:
    """The adapters to train, with shapes for arrays; None for whole towers. Raises InputError for a target that is none."""
    if settings.lora_rank is None:
        return None
    return abstract_adapters(
        model.towers(model.dtype),
        model.checkpoint.transformer,
        settings.lora_rank,
        settings.lora_alpha or settings.lora_rank,
        settings.lora_targets or (TARGETS + TEXT_TARGETS if settings.train_text_tower else TARGETS),
    )


def prepare(
    model: Model, settings: Training, adapters: Mapping[str, Mapping[str, Adapter]] | None, weights: Weights, *, progress: bool
) -> tuple[Whole | Adapters, Values, dict[str, Network]]:
    """What is trained, what it begins with, and the networks that stay as they are."""
    masters, computed = (model.towers(dtype) for dtype in ("float32", model.dtype))
    parts = TOWERS if settings.train_text_tower else ("gen",)

    def learns(path: str) -> bool:
        return settings.enable_sound or not path.startswith("sound.")  # else heads without gradients would decay

    def read(part: str, network: Network) -> Network:
        return load(weights, part, network, progress=progress)

    with failures_told("load"):
        if adapters is None:
            values = values_of({part: read(part, some(masters[part], learns)) for part in parts})
            rest = {part: some(computed[part], lambda path: not learns(path)) for part in parts}
            frozen = {part: read(part, rest.get(part, computed[part])) for part in TOWERS}
            return Whole({part: masters[part] for part in parts}, jnp.dtype(model.dtype)), values, frozen
        start = Adapters.values(random_adapters(adapters, jax.random.key(settings.seed)))
        frozen = {part: read(part, computed[part]) for part in TOWERS}
        return Adapters(adapters), start, frozen


def kept(state: TrainState) -> Values:
    """What a run leaves: the average of the weights, if there is one."""
    return state.values if state.average is None else state.average


def show(
    model: Model,
    weights: Weights,
    networks: Mapping[str, Network],
    asked: ResolvedRequest,
    prompts: Sequence[str],
    folder: Path,
) -> None:
    """Writes what the networks make of some prompts: 0.mp4, 1.mp4, … or pictures."""

    def fill(part: str, network: Network, *, progress: bool) -> Network:
        return networks[part] if part in networks else load(weights, part, network)

    residence = Residence(fill, model.abstract(model.dtype), model.mesh, "keep")
    pipe = Cosmos3Pipeline(model.checkpoint, model.tokenizer, model.mesh, model.dtype, residence)
    for index, prompt in enumerate(prompts):
        request = dataclasses.replace(asked, prompt=prompt, output_type="pil")
        result = pipe.run(request, progress=False)
        if is_first():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            result.save(folder / f"{index}{request.suffix}")


def write(result: Path, model: Model, base: Source | None, trained: Whole | Adapters, values: Values) -> None:
    """Writes what was trained: the folder `base` with other weights, in the published layout, or a file of adapters."""
    if isinstance(trained, Adapters):
        write_lora(result, model.towers("float32"), model.checkpoint, trained.adapters(values))
    else:
        assert base is not None
        write_folder(result, base, values)

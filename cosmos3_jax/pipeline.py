"""The plot: from a request to a video. The only file that knows the order.

    safety.check_prompt -> prompt.tokenize -> positions.layout -> media, VAE.encode -> UndTower.prefill -> sampler.denoise
                        -> VAE.decode, SoundDecoder.decode -> safety.check_video

What is jitted are plain functions of networks (weights.py) and arrays.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

from cosmos3_jax import media, positions, safety, sampler
from cosmos3_jax.axes import make_mesh, picture_mesh, place
from cosmos3_jax.callback import on_step
from cosmos3_jax.checkpoint import Checkpoint, Weights, load
from cosmos3_jax.compilation_cache import use_compilation_cache
from cosmos3_jax.config import TransformerConfig, VAEConfig
from cosmos3_jax.errors import InputError, shown
from cosmos3_jax.latents import Latents, noise, private, public
from cosmos3_jax.lora import merged
from cosmos3_jax.lora_files import Lora, check_loras, open_loras, read_adapters
from cosmos3_jax.models.layers import Rotary
from cosmos3_jax.models.transformer import Prefix
from cosmos3_jax.models.vae import uint8, unit
from cosmos3_jax.networks import QUANTIZE, TEXT_TOWER, Residence, abstract_networks
from cosmos3_jax.processes import agree, is_first
from cosmos3_jax.prompt import load_tokenizer, pad, system_prompt, texts, tokenize
from cosmos3_jax.provenance import provenance
from cosmos3_jax.request import Request, ResolvedRequest, resolve
from cosmos3_jax.result import Result
from cosmos3_jax.stage import failures_told, timed
from cosmos3_jax.weights import Network

DTYPES = ("float32", "bfloat16")
OWN = ("checkpoint", "revision", "weights", "guardrails")  # of a result's metadata: what each process may have another name for
# Else XLA drops some roundings to bf16, others on each mesh, and results differ between meshes by as much as from float32.
AS_WRITTEN = {"xla_allow_excess_precision": False}

Stage = Callable[[str, str, Callable[[Network], Any]], Any]
"""(what the time goes by, "und", "gen", "vae" or "sound", what to run on it) -> what that returns."""


@jax.jit
def prefill(und: Network, ids_BS: Any, length_B: Any, rotary: Rotary) -> Prefix:
    """`UndTower.prefill`, compiled."""
    return und.merge().prefill(ids_BS, length_B, rotary)


@functools.partial(jax.jit, compiler_options=AS_WRITTEN)
def encode(vae: Network, frames_thwc: Any) -> jax.Array:
    """`VAE.encode`, compiled."""
    return vae.merge().encode(frames_thwc)


@functools.partial(jax.jit, static_argnums=2, compiler_options=AS_WRITTEN)
def decode(vae: Network, latents_thwc: Any, finish: Callable) -> jax.Array:
    """`VAE.decode`, compiled."""
    return vae.merge().decode(latents_thwc, finish)


@jax.jit
def decode_sound(sound: Network, latents_sc: Any) -> jax.Array:
    """`SoundDecoder.decode`, compiled."""
    with jax.default_matmul_precision("highest"):  # else GPUs round float32 to TF32, 10 bits
        return sound.merge().decode(latents_sc)


@jax.jit
def encode_sound(encoder: Network, wave_nc: Any) -> jax.Array:
    """`SoundEncoder.encode`, compiled. To generate it is not needed."""
    with jax.default_matmul_precision("highest"):
        return encoder.merge().encode(wave_nc)


def velocity(inputs: tuple[Network, Rotary, Prefix], x: Latents, timestep: Any, is_given_t: Any) -> Latents:
    """`GenTower.velocity`, as the sampler calls it."""
    gen, rotary, prefix = inputs
    return gen.merge().velocity(x, timestep, is_given_t, rotary, prefix)


class Cosmos3Pipeline:
    """A checkpoint on a mesh, ready to generate."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Any,
        mesh: Mesh,
        dtype: str,
        residence: Residence,
        safety_checker: safety.SafetyChecker | None = None,
        lora: Sequence[Mapping[str, Any]] = (),
    ):
        self.checkpoint, self.tokenizer, self.mesh, self.residence = checkpoint, tokenizer, mesh, residence
        self.dtype = dtype  # of weights and activations; the timestep embedding and the sampler are float32 in any case
        self.safety_checker = safety_checker
        self.lora = lora  # what was added to the weights: file, checksum and scale of each

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        mesh: Mesh | None = None,
        dtype: str | None = None,
        text_tower: str = "auto",
        quantize: str | None = None,
        lora: Sequence[Any] = (),
        sound: bool = True,
        safety_checker: safety.SafetyChecker | bool | None = None,
        progress: bool = True,
    ) -> Self:
        """Loads a folder in the published layout, one that `python -m convert` wrote, or a Hugging Face repository id.

        `dtype` of weights and activations is "bfloat16" or "float32"; by default the former on GPUs, the latter elsewhere.
        `text_tower` is what becomes of the text tower after a prompt: "keep", "host" (waits in host memory) or "drop" (read
        again for the next one); "auto" keeps it unless memory is short (networks.py). Only what is kept is loaded now, and
        the sound decoder at the first sound; without `sound` it is not even downloaded. `quantize="fp8"` halves the memory of
        the generating tower's matrices, and is not exact (quantization.py). `lora` has files of adapters, "FILE" or ("FILE",
        scale) each, that are added to the weights whenever these are read (lora_files.py). `safety_checker` is one, or whether
        `cosmos_guardrail` is to be it; None: if it is installed (safety.py). What is compiled from now on is kept for the next
        process (compilation_cache.py).
        Raises InputError for a folder, a mesh, adapters or tensors that do not fit, before any weight is read.
        """
        checkpoint = Checkpoint.open(path, weights=False, sound=sound)
        mesh = make_mesh() if mesh is None else mesh
        if not isinstance(mesh, Mesh) or mesh.axis_names != ("cfg", "tp") or AxisType.Explicit in mesh.axis_types:
            raise InputError(f"mesh: one that make_mesh(cfg, tp) makes is expected, not {shown(mesh)}")
        dtype = dtype_on(mesh, dtype)
        if not isinstance(text_tower, str) or text_tower not in TEXT_TOWER:
            raise InputError(f"text_tower={shown(text_tower)}: one of {', '.join(TEXT_TOWER)} is expected")
        if not isinstance(quantize, str | None) or quantize not in QUANTIZE:
            raise InputError(f'quantize={shown(quantize)}: None or "fp8" is expected')
        checkpoint.transformer.check_tensor_parallel(mesh.shape["tp"])
        loras = open_loras(lora)
        if loras:
            towers = abstract_networks(checkpoint.transformer, checkpoint.vae, mesh, dtype)
            check_loras(loras, towers.by_name(), checkpoint.transformer)
        checker = safety.chosen(safety_checker)
        sound = checkpoint.sound is not None and checkpoint.transformer.sound_gen
        checkpoint = Checkpoint.open(path, sound=sound)  # the weights are downloaded now that nothing else is wrong
        tokenizer = load_tokenizer(checkpoint.folder / "text_tokenizer", checkpoint.transformer.vocab_size)
        use_compilation_cache()
        networks = abstract_networks(checkpoint.transformer, checkpoint.vae, mesh, dtype, checkpoint.sound)
        fill = functools.partial(load_with, loras, checkpoint.transformer, checkpoint.audited(networks.by_name()))
        residence = Residence(fill, networks, mesh, text_tower, quantize=quantize)
        if residence.text_tower == "keep":
            for part in ("und", "gen", "vae"):
                with failures_told("load"):
                    residence.bring(part, progress=progress)
        return cls(checkpoint, tokenizer, mesh, dtype, residence, checker, [each.identity for each in loras])

    def __call__(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        *,
        image: Any = None,
        video: Any = None,
        condition_frame_indexes_vision: Sequence[int] = (0, 1),
        condition_video_keep: str = "first",
        num_frames: int = 189,
        height: int = 720,
        width: int = 1280,
        fps: float = 24.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        sigmas: str = "native",
        enable_sound: bool = False,
        seed: int = 42,
        latents: Any = None,
        sound_latents: Any = None,
        prompt_style: str = "native",
        output_type: str = "np",
        steps_per_call: int = 1,
        step_cache: float = 0.0,
        callback_on_step_end: Callable[[int, float, jax.Array], Any] | None = None,
        progress: bool = True,
    ) -> Result:
        """Generates; what each setting means stands at its field of `Request`.

        `callback_on_step_end(step, timestep, latents [1, c, t, h, w])` may return new latents, or False to end the run after
        this step; with `steps_per_call` > 1 it is called for the last step of each call. Of several processes, each calls the
        pipeline, and all callbacks must answer the same; `decode` makes a preview of latents. What a callback raises ends the
        run, and the pipeline can go on with another. Raises InputError for a value that cannot be used, BlockedError for what
        the safety checker does not let pass, OutOfMemoryError, and RunError for latents that are no numbers.
        """
        asked = {name: value for name, value in locals().items() if name not in ("self", "callback_on_step_end", "progress")}
        return self.run(Request(**asked), callback_on_step_end=callback_on_step_end, progress=progress)

    def run(self, request: Request, *, callback_on_step_end: Callable | None = None, progress: bool = True) -> Result:
        """Generates what `request` asks for; `__call__` with a value instead of words."""
        checkpoint = self.checkpoint
        request = resolve(request, *checkpoint.configs)
        request = open_media(request, checkpoint.vae)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise InputError(f"callback_on_step_end: a function is expected, not {type(callback_on_step_end).__name__}")
        if self.safety_checker is not None:
            safety.check_prompt(self.safety_checker, request.prompt)
        metadata = self.metadata(request)
        with failures_told("noise"):
            draws = self._noise(request)
        steps = self._steps(request, jax.tree.map(lambda each: each[1:], draws))
        seconds: dict[str, float] = {}
        stage = functools.partial(self._stage, seconds, progress)
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(self._precision):
            with timed(seconds, "tokenize"):
                ids_BS, length_B = token_ids(request, checkpoint, self.tokenizer, self.mesh.shape["cfg"])
            shapes = jax.tree.map(np.shape, draws)
            asked = {name: value for name, value in metadata.items() if name not in OWN}
            agree([asked, request.steps_per_call, request.output_type, shapes, steps, ids_BS.tolist()])
            text, generated = self._rotary(request, ids_BS, length_B)
            given = self._encode_given(request, stage)
            prefix = stage("prefill", "und", lambda und: prefill(und, ids_BS, length_B, text))
            start = place(self.mesh, jax.tree.map(lambda each: each[0], draws))
            between = None if callback_on_step_end is None else on_step(callback_on_step_end, steps, self.mesh)

            def denoise(gen: Network) -> sampler.State:
                with _progress_bar(request, progress) as on_progress:
                    inputs, per_call = (gen, generated, prefix), request.steps_per_call
                    return sampler.denoise(
                        velocity, inputs, start, given, steps, steps_per_call=per_call, on_step=between, on_progress=on_progress
                    )

            state = stage("denoise", "gen", denoise)
            latents, prefix = state.sample, None  # room for the decoder
            video = self._video(latents.video, request.output_type, stage)
            sound, sample_rate = self._decode_sound(latents.sound, request.output_type, stage)
        if (computed := int(state.computed)) < request.num_inference_steps:  # a step cache, or a callback that ended the run
            metadata["computed_steps"] = computed
        return Result(video, float(request.fps), seconds, sound, sample_rate, computed, metadata)

    def decode(self, latents: Any, *, progress: bool = False) -> np.ndarray:
        """The frames, float32 [t, h, w, 3] in [0, 1], of normalized latents [1, c, t, h, w], such as a callback is given.

        A preview takes the first latent frames, `latents[:, :, :2]`: frames depend on none that are later. What it shows is as
        noisy as the step. No safety checker sees it. Raises InputError for another shape.
        """
        z_dim = self.checkpoint.vae.z_dim
        try:
            array = np.asarray(latents)
        except Exception as error:  # ragged lists; whatever an object does that is asked for an array
            raise InputError(f"latents: {type(latents).__name__} is no array ({error})") from error
        if array.ndim != 5 or array.shape[:2] != (1, z_dim) or array.size == 0 or array.dtype.kind not in "fV":
            raise InputError(f"latents: floats [1, {z_dim}, t, h, w] are expected, not {list(array.shape)} of {array.dtype}")
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(self._precision):
            latents_thwc = place(self.mesh, private(array))
            return self._frames(latents_thwc, unit, functools.partial(self._stage, {}, progress))

    def metadata(self, request: ResolvedRequest) -> dict[str, Any]:
        """All that its result depends on, as JSON has it (provenance.py)."""
        quantize, guardrails = self.residence.quantize, safety.name(self.safety_checker)
        how: dict[str, Any] = {"quantize": quantize, "guardrails": guardrails, "lora": self.lora}
        return provenance(request, self.checkpoint, self.mesh, self.dtype, **how)

    @property
    def _precision(self) -> str | None:
        return "highest" if self.dtype == "float32" else None  # else GPUs round float32 to TF32, 10 bits

    def _stage(self, seconds: dict[str, float], progress: bool, name: str, part: str, run: Callable[[Network], Any]) -> Any:
        """What `run` makes of a network, which is on the devices for as long as that takes."""
        with timed(seconds, "load"):
            network = self.residence.bring(part, progress=progress)
        with timed(seconds, name):
            result = jax.block_until_ready(run(network))
        del network
        self.residence.release(part)
        return result

    def _rotary(self, request: ResolvedRequest, ids_BS: np.ndarray, length_B: np.ndarray) -> tuple[Rotary, Rotary]:
        """The rotary angles of text and of generated tokens."""
        shape, frames = self._latent_shape(request), request.sound_frames(self.checkpoint.sound)
        both = positions.layout(self.checkpoint.transformer, length_B, ids_BS.shape[1], shape, float(request.fps), frames)
        text, generated = (Rotary(*place(self.mesh, each)) for each in both)
        return text, generated

    def _latent_shape(self, request: ResolvedRequest) -> tuple[int, int, int]:
        return self.checkpoint.vae.latent_shape(request.num_frames, request.height, request.width)

    def _encode_given(self, request: ResolvedRequest, stage: Stage) -> sampler.Given:
        """The latents of the frames that came with the request; none are given without an image or a clip."""
        t, h, w = self._latent_shape(request)
        latents, is_given = np.zeros((t, h, w, self.checkpoint.vae.z_dim), np.float32), np.zeros(t, bool)
        with failures_told("encode"):
            if request.image is not None:
                frames = media.fit_image(request.image, request.height, request.width)[None]
                is_given[0] = True
            elif request.video is not None:
                frames = self._given_frames(request)
                is_given[list(request.condition_frame_indexes_vision)] = True
        if is_given.any():
            encoded = np.asarray(stage("encode", "vae", lambda vae: encode(vae, frames)))
            latents[: len(encoded)] = encoded
        return sampler.Given(*place(self.mesh, (latents, is_given)))

    def _given_frames(self, request: ResolvedRequest) -> np.ndarray:
        """What the last given latent frame sees of the clip (the encoder is causal); a short clip repeats its last frame."""
        count = frames_needed(request, self.checkpoint.vae)
        part = slice(count) if request.condition_video_keep == "first" else slice(-count, None)
        frames = media.fit_clip(request.video, request.height, request.width, part)
        return np.pad(frames, ((0, count - len(frames)), (0, 0), (0, 0), (0, 0)), mode="edge")

    def _noise(self, request: ResolvedRequest) -> Latents:
        """Of the request's latents, [n] in front: what to start from, and what stochastic steps add one by one."""
        draws = len(self.checkpoint.scheduler.distilled_sigmas) or 1
        shape, frames = self._latent_shape(request), request.sound_frames(self.checkpoint.sound)
        video = noise(request.seed, (draws, self.checkpoint.vae.z_dim, *shape), request.latents)
        if not frames:
            return Latents(video)
        channels = self.checkpoint.transformer.sizes["A"]
        return Latents(video, noise(request.seed, (draws, channels, frames), request.sound_latents))

    def _steps(self, request: ResolvedRequest, fresh: Latents) -> sampler.Steps:
        scheduler = self.checkpoint.scheduler
        if scheduler.distilled_sigmas:
            return sampler.distilled_steps(np.array(scheduler.distilled_sigmas), fresh, scheduler.num_train_timesteps)
        sigma = sampler.sigma_grid(request.sigmas, request.num_inference_steps, request.flow_shift, scheduler)
        guidance_scale = request.guidance_scale if request.guided else 1.0
        steps = sampler.unipc_steps(sigma, guidance_scale, scheduler.num_train_timesteps)
        return sampler.with_reuse(steps, request.step_cache) if request.step_cache else steps

    def _video(self, latents_thwc: jax.Array, output_type: str, stage: Stage) -> Any:
        if output_type == "latent":
            return np.asarray(public(latents_thwc))
        frames = self._frames(latents_thwc, unit if output_type == "np" else uint8, stage)
        if self.safety_checker is not None:
            frames = safety.check_video(self.safety_checker, frames)
        return frames if output_type == "np" else media.images(frames)

    def _frames(self, latents_thwc: jax.Array, finish: Callable, stage: Stage) -> np.ndarray:
        with jax.set_mesh(picture_mesh(self.mesh, *latents_thwc.shape[1:3])):
            return stage("decode", "vae", lambda vae: np.asarray(decode(vae, latents_thwc, finish)))

    def _decode_sound(self, latents_sc: jax.Array | None, output_type: str, stage: Stage) -> tuple[Any, int | None]:
        """(waveform, its sample rate), (latents, None) or, without sound, (None, None)."""
        if latents_sc is None or self.checkpoint.sound is None:
            return None, None
        if output_type == "latent":
            return np.asarray(latents_sc).T, None
        wave_nc = stage("decode_sound", "sound", lambda sound: np.asarray(decode_sound(sound, latents_sc)))
        return wave_nc.T, self.checkpoint.sound.sampling_rate


def load_with(
    loras: Sequence[Lora], config: TransformerConfig, weights: Weights, part: str, network: Network, *, progress: bool
) -> Network:
    """`checkpoint.load`, and files of adapters added to what it gives."""
    loaded = load(weights, part, network, progress=progress)
    return merged(loaded, read_adapters(loras, part, network, config))


def dtype_on(mesh: Mesh, asked: str | None) -> str:
    """The dtype of weights and activations. Raises InputError for one that is none."""
    if asked is None:
        return "bfloat16" if mesh.devices.flat[0].platform == "gpu" else "float32"
    if not isinstance(asked, str) or asked not in DTYPES:
        raise InputError(f"dtype={shown(asked)}: one of {', '.join(DTYPES)} is expected")
    return asked


def token_ids(request: ResolvedRequest, checkpoint: Checkpoint, tokenizer: Any, cfg: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids_BS, length_B) of the branches; on a mesh with cfg=2 there are two in any case."""
    style, metadata = request.prompt_style, request.metadata
    system = system_prompt(style, metadata, checkpoint.use_system_prompt)
    both = texts(style, request.prompt, request.negative_prompt, metadata, checkpoint.negative_prompt)
    branches = both if request.guided else both[:1] * cfg
    if cfg == 2 and not request.guided:
        warnings.warn(
            f"cfg=2 with guidance_scale={request.guidance_scale} (guidance is on above 1): half of the devices compute "
            "nothing of use; cfg=1 and twice the tp is faster",
            stacklevel=4,  # the caller of Cosmos3Pipeline.__call__
        )
    return pad([tokenize(tokenizer, text, system) for text in branches])


def open_media(request: ResolvedRequest, vae: VAEConfig) -> ResolvedRequest:
    """The request with its image or clip read, where it named a file. Raises InputError if that cannot be."""
    if isinstance(request.image, str | Path):
        request = dataclasses.replace(request, image=media.open_image(request.image))
    if isinstance(request.video, str | Path):
        clip = media.open_clip(request.video, frames_needed(request, vae), request.condition_video_keep)
        request = dataclasses.replace(request, video=clip)
    return request


def frames_needed(request: ResolvedRequest, vae: VAEConfig) -> int:
    """The frames that the last given latent frame sees."""
    return max(request.condition_frame_indexes_vision) * vae.scale_factor_temporal + 1


@contextlib.contextmanager
def _progress_bar(request: ResolvedRequest, visible: bool) -> Iterator[Callable[[int], object]]:
    """A function that takes the number of steps done."""
    with tqdm(total=request.num_inference_steps, desc="denoise", unit="step", disable=not (visible and is_first())) as bar:
        yield lambda done: bar.update(done - bar.n)

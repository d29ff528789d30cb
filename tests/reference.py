"""The reference implementation (diffusers 0.42.1 on torch), run on the checkpoints and cases of the tests.

Imported only by make_goldens.py and by the tests marked live. The reference draws our noise instead of torch's, so that a
request is the same request on both sides.
"""

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import numpy as np
from metrics import sample

from cosmos3_jax.latents import Latents

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch
    from diffusers import Cosmos3DistilledModularPipeline, Cosmos3OmniPipeline, UniPCMultistepScheduler
    from diffusers.modular_pipelines.cosmos import before_denoise
    from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as omni
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow_match

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

VERSIONS = {"diffusers": diffusers.__version__, "torch": torch.__version__}


def load(folder: Path, dtype: str = "float32") -> Cosmos3OmniPipeline:
    """The reference pipeline on a checkpoint folder; weights as `from_pretrained` loads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = Cosmos3OmniPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), enable_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Cosmos3OmniPipeline, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Latents [1, C, t, h, w] after the last step and frames [t, h, w, 3] of a case, float32; of sound [C, s] and [c, n]."""
    case = {key: value for key, value in case.items() if key != "prompt_style"}
    sigmas, seed = case.pop("sigmas"), case.pop("seed")
    shift = case.pop("flow_shift", 10.0)
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, flow_shift=shift, use_karras_sigmas=sigmas == "karras"
    )
    pipe.register_to_config(use_native_flow_schedule=sigmas == "native")
    latents, decode_sound = {}, pipe.decode_sound

    def keep(_pipe, _step, _timestep, values):
        latents["latents"] = values["latents"]
        return values

    def keep_sound(x):
        latents["sound_latents"] = x
        return decode_sound(x)

    def noise(shape, **_):
        return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))

    with (
        torch.inference_mode(),
        mock.patch.object(omni, "randn_tensor", noise),
        mock.patch.object(pipe, "decode_sound", keep_sound),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        result = pipe(**case, output_type="np", callback_on_step_end=keep, enable_safety_check=False)
    outputs = {name: x.float().numpy() for name, x in latents.items()} | {"video": np.asarray(result.video, np.float32)}
    return outputs if result.sound is None else outputs | {"sound": result.sound.float().numpy()}


def load_distilled(folder: Path, dtype: str = "float32") -> Cosmos3DistilledModularPipeline:
    """The reference's pipeline for a distilled checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = Cosmos3DistilledModularPipeline.from_pretrained(str(folder), local_files_only=True)
        pipe.load_components(torch_dtype=getattr(torch, dtype), local_files_only=True)
    pipe.disable_safety_checker()
    pipe._blocks.sub_blocks["denoise"].sub_blocks["denoise"].set_progress_bar_config(disable=True)
    return pipe


def run_distilled(pipe: Cosmos3DistilledModularPipeline, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """As `run`; each draw of noise, the first and one after every step, is the next of one stream."""
    case = {key: value for key, value in case.items() if key != "prompt_style"}
    random = np.random.RandomState(case.pop("seed"))

    def noise(shape, **_):
        return torch.from_numpy(random.standard_normal(tuple(shape)).astype(np.float32))

    with (
        torch.inference_mode(),
        mock.patch.object(before_denoise, "randn_tensor", noise),
        mock.patch.object(flow_match, "randn_tensor", noise),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        result = pipe(**case, output_type="np", output=["latents", "videos"])
    return {"latents": result["latents"].float().numpy(), "video": np.asarray(result["videos"], np.float32)}


def layer(pipe: Cosmos3OmniPipeline) -> dict[str, np.ndarray]:
    """One transformer layer on random und and gen tokens, with the rotary angles it was given."""
    config = pipe.transformer.config
    und, gen = cases.layer_inputs(config.hidden_size)
    text, _ = omni.get_3d_mrope_ids_text_tokens(cases.TEXT, 0, use_float_positions=True)
    vision, _ = omni.get_3d_mrope_ids_vae_tokens(*cases.GRID, cases.TEXT + 15000, fps=16.0)
    ids = torch.cat([text, vision], dim=1)[:, None]
    with torch.inference_mode():
        cos, sin = (x[0] for x in pipe.transformer.rotary_emb(ids, device="cpu", dtype=torch.float32))
        rotary = (cos[: cases.TEXT], sin[: cases.TEXT], cos[cases.TEXT :], sin[cases.TEXT :])
        und, gen = pipe.transformer.layers[1](torch.from_numpy(und), torch.from_numpy(gen), rotary)
    half = cos.shape[-1] // 2
    return {"und": und.numpy(), "gen": gen.numpy(), "cos": cos[:, :half].numpy(), "sin": sin[:, :half].numpy()}


def gradients(pipe: Cosmos3OmniPipeline, batch: Any, noise: Any, fps: float) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a batch (cosmos3_jax/training/objective.py) and its gradient for each tensor of the transformer."""
    pipe.transformer.zero_grad()
    losses = []
    for i in range(len(batch.ids_BS)):
        drawn = [x[i] for x in (batch.ids_BS, batch.length_B, batch.sigma_B, batch.is_given_Bt)]
        clean, e = (Latents(x.video[i], None if x.sound is None else x.sound[i]) for x in (batch.latents, noise))
        losses.append(_row_loss(pipe.transformer, clean, e, *drawn, fps))
    total = sum(losses) / len(losses)
    total.backward()
    return total.item(), {name: p.grad.numpy() for name, p in pipe.transformer.named_parameters() if p.grad is not None}


def _row_loss(transformer, latents, noise, ids_S, length, sigma, is_given_t, fps) -> "torch.Tensor":
    """Of one clip: through the joint sequence of text and generated tokens, as the pipeline feeds it."""
    sigma, noisy_t = float(sigma), np.flatnonzero(~is_given_t)
    clean, e = (torch.from_numpy(np.moveaxis(x, -1, 0)) for x in (latents.video, noise.video))  # [c, t, h, w]
    mixed = clean.clone()
    mixed[:, noisy_t] = (1 - sigma) * clean[:, noisy_t] + sigma * e[:, noisy_t]
    t, h, w = clean.shape[1:]
    rows, columns, length = -(-h // 2), -(-w // 2), int(length)
    patches, start = rows * columns, length + 15000
    text, _ = omni.get_3d_mrope_ids_text_tokens(length, 0, use_float_positions=True)
    vision, _ = omni.get_3d_mrope_ids_vae_tokens(t, rows, columns, start, fps=fps)
    ids, sound_length, sound = [text, vision], 0, {}
    indexes = length + torch.cat([torch.arange(patches) + i * patches for i in noisy_t])
    if latents.sound is not None:
        clean_sound, e_sound = torch.from_numpy(latents.sound.T), torch.from_numpy(noise.sound.T)
        sound_length = clean_sound.shape[1]
        ids.append(
            omni.get_3d_mrope_ids_vae_tokens(
                sound_length, 1, 1, start, fps=25.0, temporal_compression_factor=1, base_temporal_compression_factor=1
            )[0]
        )
        where = length + t * patches + torch.arange(sound_length)
        sound = {
            "sound_tokens": [(1 - sigma) * clean_sound + sigma * e_sound],
            "sound_token_shapes": [(sound_length, 1, 1)],
            "sound_sequence_indexes": where,
            "sound_mse_loss_indexes": where,
            "sound_timesteps": torch.full((sound_length,), 1000 * sigma),
            "sound_noisy_frame_indexes": [torch.arange(sound_length)],
        }
    result = transformer(
        input_ids=torch.from_numpy(ids_S[:length].astype(np.int64)),
        text_indexes=torch.arange(length),
        position_ids=torch.cat(ids, dim=1),
        und_len=length,
        sequence_length=length + t * patches + sound_length,
        vision_tokens=[mixed[None]],
        vision_token_shapes=[(t, rows, columns)],
        vision_sequence_indexes=length + torch.arange(t * patches),
        vision_mse_loss_indexes=indexes,
        vision_timesteps=torch.full((len(noisy_t) * patches,), 1000 * sigma),
        vision_noisy_frame_indexes=[torch.from_numpy(noisy_t)],
        **sound,
    )
    error = (result.sample[0][0] - (e - clean))[:, noisy_t].square().mean()
    return error if latents.sound is None else error + (result.sound[0] - (e_sound - clean_sound)).square().mean()


def blocks(pipe: Cosmos3OmniPipeline) -> dict[str, np.ndarray]:
    """Every block of the VAE, streamed over a first frame and `cases.CHUNKS` chunks: outputs [t, h, w, c]."""
    outputs = {}
    for name, frames in cases.BLOCKS.items():
        block = pipe.vae.get_submodule(name)
        inputs = cases.block_inputs(block.resnets[0].conv1.in_channels, frames)
        x = torch.from_numpy(np.moveaxis(inputs, -1, 0)[None])
        cache, out = [None] * 32, []
        for start, stop in [(0, 1), *((1 + i * frames, 1 + (i + 1) * frames) for i in range(cases.CHUNKS))]:
            first = {"first_chunk": start == 0} if "up_blocks" in name else {}
            with torch.inference_mode():
                out.append(block(x[:, :, start:stop], feat_cache=cache, feat_idx=[0], **first))
        outputs[name] = np.moveaxis(torch.cat(out, dim=2)[0].numpy(), 0, -1)
    return outputs


def sounds(pipe: Cosmos3OmniPipeline) -> dict[str, np.ndarray]:
    """The sound decoder alone: of latents of each length, samples [channels, n], one in 41."""
    outputs = {}
    for length in cases.SOUND_LENGTHS:
        with torch.inference_mode():
            wave = pipe.decode_sound(torch.from_numpy(cases.sound_latents(length).T)).numpy()
        outputs[str(length)] = sample(wave)
    return outputs


def sound_tokenizer(folder: Path) -> Any:
    """The sound tokenizer of a checkpoint folder alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diffusers.Cosmos3AVAEAudioTokenizer.from_pretrained(folder / "sound_tokenizer").eval()


def latents_of(tokenizer: Any, wave_nc: np.ndarray) -> np.ndarray:
    """The mode of a waveform's latents, [s, c]."""
    with torch.inference_mode():
        return tokenizer.encode(torch.from_numpy(wave_nc.T[None])).latent_dist.mode()[0].numpy().T


def heard(folder: Path) -> dict[str, np.ndarray]:
    """The sound encoder: latents [s, c] of waveforms of each length, one's spectra, and each layer alone, [n, channels]."""
    tokenizer = sound_tokenizer(folder)
    outputs = {str(length): latents_of(tokenizer, cases.wave(length)) for length in cases.WAVE_LENGTHS}
    with torch.inference_mode():
        seen = []
        hook = tokenizer.encoder.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        tokenizer.encoder(torch.from_numpy(cases.wave(48_000)[:1920].T[None]))
        hook.remove()
        outputs["spectra"] = seen[0][0].numpy().T[:5]
        for i, layer in enumerate(tokenizer.encoder.layers):
            channels = layer.dwconv[1].in_channels if hasattr(layer, "dwconv") else layer.in_channels
            outputs[f"layers.{i}"] = layer(torch.from_numpy(cases.spectra(channels).T[None]))[0].numpy().T
    return outputs


def fitted(image: Any, clip: Any, sizes: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """The reference's preparation of an image and of a clip at several sizes, [t, h, w, 3] in [-1, 1]."""
    processor = diffusers.video_processor.VideoProcessor(vae_scale_factor=16, resample="bilinear")
    outputs = {}
    for height, width in sizes:
        prepared = omni._preprocess_conditioning_image(image, height=height, width=width)
        outputs[f"image_{height}x{width}"] = prepared[0].permute(1, 2, 0).numpy()
        video = processor.preprocess_video(clip, height=height, width=width)
        outputs[f"clip_{height}x{width}"] = video[0].permute(1, 2, 3, 0).numpy()
    return outputs

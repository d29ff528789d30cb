"""diffusers' Cosmos3OmniPipeline with the weights of one of our pipelines, and a request of ours run on it.

Its transformer computes on the very memory of ours (DLPack): stacked layers are views, and nothing is read or copied. Its VAE
has convolutions laid out otherwise, and so a copy. Needs the extra `parity`.
"""

import itertools
import json
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler

from convert.random_checkpoint import SCHEDULER, transformer_json, transformer_shapes, vae_json
from cosmos3_jax import Cosmos3Pipeline
from cosmos3_jax.published import names_of
from cosmos3_jax.request import ResolvedRequest
from cosmos3_jax.weights import Network, Weight, by_path, is_stacked


def diffusers_pipeline(ours: Cosmos3Pipeline) -> Cosmos3OmniPipeline:
    """The reference with our weights, for pipelines on one device without sound."""
    config, vae_config = ours.checkpoint.transformer, ours.checkpoint.vae
    networks = {part: ours.residence.bring(part) for part in ("und", "gen", "vae")}
    tensors = dict(
        itertools.chain.from_iterable(
            published(networks[part], names_of(part, networks[part], config)) for part in ("und", "gen")
        )
    )
    like = next(iter(tensors.values()))
    for name, shape in transformer_shapes(config).items():
        if name not in tensors:  # what generation does not read; the reference multiplies by some of it all the same
            tensors[name] = torch.full(shape, 0.01, dtype=like.dtype, device=like.device)
    with init_empty_weights(include_buffers=False):
        transformer = _configured(Cosmos3OmniTransformer, transformer_json(config))
        vae = _configured(AutoencoderKLWan, vae_json(vae_config))
    transformer.load_state_dict(tensors, assign=True)
    vae.load_state_dict(dict(published(networks["vae"], names_of("vae", networks["vae"], config))), assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = Cosmos3OmniPipeline(
            transformer=transformer.to(like.device).requires_grad_(False).eval(),
            text_tokenizer=ours.tokenizer,
            vae=vae.to(like.device).requires_grad_(False).eval(),
            scheduler=UniPCMultistepScheduler.from_config(SCHEDULER),
            enable_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _configured(kind: Any, config: dict[str, object]) -> Any:
    """A module of diffusers, of a config as it stands in a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_config(json.loads(json.dumps(config)))  # lists, not tuples


def published(network: Network, names: dict[str, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a network by its published name."""
    for path, w in by_path(network.weights).items():
        value = torch.from_dlpack(w.get_value())
        layers = value if is_stacked(w) else value[None]
        for name, layer in zip(names[path], layers, strict=True):
            yield name, _as_in_file(layer, w)


def _as_in_file(value: torch.Tensor, w: Weight) -> torch.Tensor:
    """A matrix or vector as it is; a convolution with its outputs and inputs first again, which copies it."""
    if len(w.file_shape) < 3:
        return value.reshape(w.file_shape)
    outputs, inputs, *kernel = w.file_shape
    return value.reshape(*kernel, inputs, outputs).movedim((-1, -2), (0, 1)).contiguous()


def run(pipe: Cosmos3OmniPipeline, request: ResolvedRequest, noise: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Seconds of a request ("whole", "step", "decode"), and its last latents [1, c, t, h, w]."""
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, flow_shift=request.flow_shift, use_karras_sigmas=False
    )
    ends, decodes, last = [], [], {}
    decode = pipe.vae.decode

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        ends.append(now())
        last.update(values)
        return values

    def timed_decode(*arguments: Any, **more: Any) -> Any:
        start = now()
        result = decode(*arguments, **more)
        decodes.append(now() - start)
        return result

    names = ("num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale")
    asked: dict[str, Any] = {name: getattr(request, name) for name in names}
    with torch.inference_mode(), mock.patch.object(pipe.vae, "decode", timed_decode), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = now()
        pipe(
            request.prompt,
            request.negative_prompt,
            **asked,
            latents=torch.from_numpy(noise).to(pipe.device),
            output_type="np",
            callback_on_step_end=on_step,
            enable_safety_check=False,
        )
        whole = now() - start
    steps = np.diff(ends) if len(ends) > 1 else [math.nan]  # the first has all that comes before it on its clock
    return {"whole": whole, "step": float(np.median(steps)), "decode": sum(decodes)}, last["latents"].float().cpu().numpy()

"""The user's callback between denoising steps, as the sampler calls it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cosmos3_jax.axes import place
from cosmos3_jax.errors import InputError
from cosmos3_jax.latents import private, public
from cosmos3_jax.sampler import OnStep, Steps


def on_step(callback: Callable[[int, float, jax.Array], Any], steps: Steps, mesh: Mesh) -> OnStep:
    """Calls `callback(step, timestep, latents [1, c, t, h, w])`. Raises InputError for an answer that cannot be used."""

    def call(step: int, latents_thwc: jax.Array) -> Any:
        timestep = float(steps.timestep[step])
        answer = callback(step, int(timestep) if timestep.is_integer() else timestep, public(latents_thwc))
        if answer is None:
            return None
        if isinstance(answer, bool | np.bool_):
            return bool(answer)
        expected = (1, latents_thwc.shape[-1], *latents_thwc.shape[:-1])
        if getattr(answer, "shape", None) != expected:
            what = f"an array of shape {answer.shape}" if hasattr(answer, "shape") else type(answer).__name__
            raise InputError(f"callback_on_step_end returned {what}; latents {expected}, False or None are expected")
        new = private(answer)
        if not np.isfinite(new).all():
            raise InputError("callback_on_step_end returned latents that are NaN or infinite")
        return place(mesh, new)

    return call

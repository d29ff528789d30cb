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
        try:
            with np.errstate(over="ignore"):
                given = np.asarray(answer)
                new = private(given) if given.shape == expected and given.dtype.kind in "uifV" else None
        except Exception as error:  # whatever an object does that is asked for an array
            raise InputError(f"callback_on_step_end returned {type(answer).__name__}, which is no array ({error})") from error
        if new is None:
            of = f"shape {given.shape}" if given.shape != expected else str(given.dtype)
            what = f"an array of {of}" if given.ndim else type(answer).__name__
            raise InputError(f"callback_on_step_end returned {what}; latents {expected}, False or None are expected")
        if not np.isfinite(new).all():
            raise InputError("callback_on_step_end returned latents that are NaN or infinite")
        return place(mesh, new)

    return call

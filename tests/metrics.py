"""Random inputs, what a case gives, how it is compared, and what of a long output is recorded."""

import numpy as np

from cosmos3_jax import Cosmos3Pipeline


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def outputs(pipe: Cosmos3Pipeline, case: dict) -> dict[str, np.ndarray]:
    """Latents [1, c, t, h, w] after the last step, and the sample of the frames that is recorded."""
    steps = []
    result = pipe(**case, callback_on_step_end=lambda _step, _timestep, x: steps.append(np.asarray(x)), progress=False)
    return {"latents": steps[-1], "video": sample(result.video)}


def sample(video: np.ndarray) -> np.ndarray:
    """A 41st of the frames' values, spread evenly: what is worth keeping of them."""
    return video.reshape(-1)[::41]


def errors(x: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """[root mean square, largest] error relative to the standard deviation of `exact`."""
    difference = x - exact
    return np.array([np.sqrt(np.mean(difference**2)), np.abs(difference).max()]) / exact.std()

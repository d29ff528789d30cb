"""Random inputs and weights, what a case gives, how it is compared, and what of a long output is recorded."""

import jax
import numpy as np

from cosmos3_jax import Cosmos3Pipeline
from cosmos3_jax.weights import Network, Weight, map_weights


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def drawn(network: Network) -> Network:
    """Random weights for an abstract network, the same on every mesh."""

    def draw(path: str, w: Weight) -> jax.Array:
        x = random(*w.shape, seed=len(path)) * max(w.std, 0.02) + w.mean
        return jax.device_put(x.astype(w.dtype), w.get_value().sharding)

    return Network(network.graph, map_weights(draw, network.weights))


def outputs(pipe: Cosmos3Pipeline, case: dict) -> dict[str, np.ndarray]:
    """Latents after the last step, and the sample of the frames that is recorded; of the sound likewise."""
    latents, result = (pipe(**case, output_type=kind, progress=False) for kind in ("latent", "np"))
    made = {"latents": latents.video, "video": sample(result.video)}
    return made if result.sound is None else made | {"sound_latents": latents.sound, "sound": sample(result.sound)}


def sample(x: np.ndarray) -> np.ndarray:
    """A 41st of the values of frames or of a sound, spread evenly: what is worth keeping of them."""
    return x.reshape(-1)[::41]


def errors(x: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """[root mean square, largest] error relative to the standard deviation of `exact`."""
    difference = x - exact
    return np.array([np.sqrt(np.mean(difference**2)), np.abs(difference).max()]) / exact.std()

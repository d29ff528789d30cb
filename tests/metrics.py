"""Random inputs, how outputs are compared, and what of a long one is recorded."""

import numpy as np


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def sample(video: np.ndarray) -> np.ndarray:
    """A 41st of the frames' values, spread evenly: what is worth keeping of them."""
    return video.reshape(-1)[::41]


def errors(x: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """[root mean square, largest] error relative to the standard deviation of `exact`."""
    difference = x - exact
    return np.array([np.sqrt(np.mean(difference**2)), np.abs(difference).max()]) / exact.std()

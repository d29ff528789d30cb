"""NVIDIA Cosmos3, the open world model, in JAX."""

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.errors import InputError
from cosmos3_jax.pipeline import Cosmos3Pipeline
from cosmos3_jax.request import Request
from cosmos3_jax.result import Result

__version__ = "0.1.0"
__all__ = ["Cosmos3Pipeline", "InputError", "Request", "Result", "make_mesh"]

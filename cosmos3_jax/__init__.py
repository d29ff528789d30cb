"""NVIDIA Cosmos3, the open world model, in JAX."""

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.errors import BlockedError, Cosmos3Error, DeviceError, InputError, OutOfMemoryError, RunError, StoppedError
from cosmos3_jax.pipeline import Cosmos3Pipeline
from cosmos3_jax.request import Request
from cosmos3_jax.result import Result
from cosmos3_jax.version import VERSION

__version__ = VERSION
__all__ = [
    "BlockedError",
    "Cosmos3Error",
    "Cosmos3Pipeline",
    "DeviceError",
    "InputError",
    "OutOfMemoryError",
    "Request",
    "Result",
    "RunError",
    "StoppedError",
    "make_mesh",
]

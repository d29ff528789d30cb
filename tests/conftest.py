"""What every test shares: CPU devices, and small random checkpoints written once a session."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import cases
import pytest

from convert.random_checkpoint import write_checkpoint
from cosmos3_jax import Cosmos3Pipeline

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of recorded data."""
    return DATA


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`folders(family)`: a checkpoint folder of a small family, float32, written on first use."""
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            made[family] = write_checkpoint(path, cases.FAMILIES[family], cases.VAE)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def pipes(folders):
    """`pipes(family, dtype)`: its pipeline on one device, loaded on first use."""
    made = {}

    def pipe(family: str, dtype: str = "float32") -> Cosmos3Pipeline:
        if (family, dtype) not in made:
            made[family, dtype] = Cosmos3Pipeline.from_pretrained(folders(family), dtype=dtype)
        return made[family, dtype]

    return pipe

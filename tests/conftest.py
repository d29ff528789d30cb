"""What every test shares: eight CPU devices, and small random checkpoints written once a session."""

import dataclasses
import functools
import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")  # what is tested is compiled here and now
os.environ["COSMOS3_GUARDRAILS"] = "0"  # also where they are installed

import signal
import subprocess
from pathlib import Path

import cases
import jax
import numpy as np
import pytest

from convert.random_checkpoint import write_checkpoint
from cosmos3_jax import Cosmos3Pipeline, make_mesh
from cosmos3_jax.config import TINY, SoundConfig

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of recorded data."""
    return DATA


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`folders(family)`: a checkpoint folder of a small family, "distilled" or "full_sound", float32, written on first use."""
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            others = {"distilled": cases.DISTILLED, "full_sound": cases.FAMILIES["small"]}
            config, sound = (cases.FAMILIES | others)[family], cases.FULL_SOUND if family == "full_sound" else None
            made[family] = write_checkpoint(path, config, cases.VAE, sound, distilled=family == "distilled")
        return made[family]

    return folder


@pytest.fixture(scope="session")
def folders_with(tmp_path_factory):
    """`folders_with(config)`: a checkpoint with such a sound tokenizer, written once."""

    @functools.cache
    def folder(config: SoundConfig) -> Path:
        transformer = dataclasses.replace(TINY, sound_dim=config.vocoder_input_dim)
        return write_checkpoint(tmp_path_factory.mktemp("sound"), transformer, cases.VAE, config)

    return folder


@pytest.fixture(scope="session")
def pipes(folders):
    """`pipes(family, dtype, cfg, tp)`: its pipeline on cfg x tp devices (one, if not given), loaded on first use."""
    made = {}

    def pipe(family: str, dtype: str = "float32", cfg: int = 1, tp: int = 1) -> Cosmos3Pipeline:
        key = family, dtype, cfg, tp
        if key not in made:
            made[key] = Cosmos3Pipeline.from_pretrained(folders(family), mesh=make_mesh(cfg, tp), dtype=dtype)
        return made[key]

    return pipe


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """Each file compiles anew. A program takes some twenty mappings of memory, and XLA dies where a process has 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def no_process_is_left(monkeypatch):
    """A test that leaves a child process running fails."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            started.append(self)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    yield
    assert [process.args for process in started if process.returncode is None] == []


@pytest.fixture
def ten_seconds():
    """A test that takes longer fails, whatever it waits for."""

    def late(*_):
        pytest.fail("longer than ten seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def compilations():
    """A list that grows by one for every program that XLA compiles."""
    compiled = []

    def listen(event: str, duration: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def recorded():
    """`recorded(name)`: what the reference computed, by name."""
    return lambda name: np.load(DATA / "goldens" / f"{name}.npz")


@pytest.fixture(params=["recorded", pytest.param("live", marks=pytest.mark.live)])
def goldens(request, folders, recorded):
    """`goldens(name)`: what the reference computes, by name; recorded, and live where torch and diffusers are installed."""
    if request.param == "live":
        pytest.importorskip("torch")
        pytest.importorskip("diffusers")
        import make_goldens

        return make_goldens.Live(folders)
    return recorded

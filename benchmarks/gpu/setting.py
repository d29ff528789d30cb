"""What the parts of gpu_suite.py share: where and until when they measure, sizes, times, random numbers.

A part is a function that yields rows. A row is what was measured, of what. One that fails has its error in it and the next
follows; one for which no time is left says so, as does what there is on GPUs only. Elsewhere shapes are small stand-ins, and
nothing else differs.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import models
from cosmos3_jax import Cosmos3Pipeline, Request, make_mesh
from cosmos3_jax.checkpoint import BUILT_IN
from cosmos3_jax.config import TransformerConfig, VAEConfig

Row = dict[str, Any]
Case = tuple[Row, Callable[[], Row]]
"""(what is measured, the measurement)."""

GPU_ONLY = {"note": "not on this platform"}
CHECKPOINTS = {"tiny": BUILT_IN}  # read at once, where a program that draws weights takes CPUs half a minute to compile
TEXT = 512  # tokens of each branch


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured, and until when."""

    model: str
    deadline: float  # of the clock (time.time()); nothing more is begun then

    @property
    def configs(self) -> tuple[TransformerConfig, VAEConfig]:
        """The model's."""
        return models.MODELS[self.model]

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()


@dataclasses.dataclass(frozen=True)
class Part:
    """A measurement; `run` must be a function that another process can import."""

    run: Callable[[Setting], Iterator[Row]]
    seconds: int  # on an H100, compiling included; with fewer left it is not begun
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of a process of its own, if there is any


@dataclasses.dataclass(frozen=True)
class Video:
    """The size of a request, and the seconds that others published for it (NVIDIA Cosmos3's own page: Nano, one H200, bf16)."""

    width: int
    height: int
    frames: int
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.frames} frames"

    def tokens(self, transformer: TransformerConfig, vae: VAEConfig) -> int:
        """The generated tokens of a branch."""
        t, h, w = vae.latent_shape(self.frames, self.height, self.width)
        return t * -(-h // transformer.latent_patch_size) * -(-w // transformer.latent_patch_size)

    def request(self, steps: int | None, **more: Any) -> Request:
        """As the pipeline takes it."""
        size: dict[str, Any] = {"num_frames": self.frames, "height": self.height, "width": self.width}
        return Request(models.PROMPT, num_inference_steps=steps, **size, **more)


def _published(*seconds: float) -> dict[str, float]:
    return dict(zip(("vLLM-Omni", "NVIDIA", "diffusers"), seconds, strict=True))


ON_GPU = {
    "256p": Video(320, 192, 189, _published(6.8, 7.5, 9)),
    "image": Video(1280, 720, 1, _published(2.6, 3.3, 4)),
    "720p": Video(1280, 720, 189, _published(208.4, 214.3, 239.6)),
    "480p": Video(832, 480, 189, _published(58.1, 60.2, 67)),
}
ELSEWHERE = {name: Video(48, 32, 1 if video.frames == 1 else 5) for name, video in ON_GPU.items()}


def on_gpu() -> bool:
    """Whether this process computes on one."""
    return jax.default_backend() == "gpu"


def videos() -> dict[str, Video]:
    """The sizes that are measured, by what they are on a GPU."""
    return ON_GPU if on_gpu() else ELSEWHERE


def precision() -> Any:
    """The dtype of weights and activations."""
    return jnp.bfloat16 if on_gpu() else jnp.float32


def first_line(error: BaseException) -> str:
    """What went wrong, briefly."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def measured(setting: Setting, cases: Iterable[Case]) -> Iterator[Row]:
    """A row for each case, whatever becomes of it."""
    for about, measure in cases:
        if setting.left <= 0:
            yield {**about, "note": "no time left"}
            continue
        try:
            yield {**about, **measure()}
        except Exception as error:
            yield {**about, "error": first_line(error)}


def seconds(run: Callable[[], Any], *, runs: int = 3, least: float | None = None) -> float:
    """Seconds of one call, the median of `runs`, in each of which calls wait in line for `least` seconds of work (0.1)."""
    least = least if least is not None else 0.1 if on_gpu() else 0.01  # a CPU's numbers only show that all of it runs
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    count = max(1, min(100, int(least / (time.perf_counter() - start))))

    def once() -> float:
        start = time.perf_counter()
        for _ in range(count):
            last = run()
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / count

    return statistics.median(once() for _ in range(runs))


def normal(seed: int, *shape: int, dtype: Any = None) -> jax.Array:
    """Random numbers, drawn on the device."""
    return _draw(jax.random.key(seed, impl="rbg"), shape, dtype or precision())


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape).astype(dtype)


@functools.cache
def pipeline(model: str) -> Cosmos3Pipeline:
    """The model, for all parts: with random weights, unless there is a checkpoint."""
    if folder := CHECKPOINTS.get(model):
        return Cosmos3Pipeline.from_pretrained(folder, sound=False, safety_checker=False, progress=False)
    return models.random_pipeline(*models.MODELS[model], make_mesh())

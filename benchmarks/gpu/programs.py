"""Parts of gpu_suite.py about the two programs that take the time, a step and a decode: how to compile them, and a trace."""

import collections
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import models
from benchmarks.gpu.setting import (
    GPU_ONLY,
    TEXT,
    Case,
    Row,
    Setting,
    Video,
    measured,
    normal,
    on_gpu,
    pipeline,
    seconds,
    videos,
)
from cosmos3_jax.axes import picture_mesh
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.latents import Latents
from cosmos3_jax.models.layers import Rotary
from cosmos3_jax.models.transformer import Prefix
from cosmos3_jax.models.vae import uint8
from cosmos3_jax.pipeline import decode

# The programs of a request


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with arguments, and the mesh that it runs under."""

    function: Any
    arguments: tuple
    mesh: Any
    static: tuple = ()

    def compiled(self, **options: Any) -> Callable[[], Any]:
        """It, with these options of the compiler in front of its own."""
        with jax.set_mesh(self.mesh):
            program = self.function.lower(*self.arguments, *self.static).compile(compiler_options=options or None)
        return lambda: program(*self.arguments)


def _velocity(gen: Any, x: Latents, timestep: Any, is_given_t: Any, rotary: Rotary, prefix: Prefix, unroll: int) -> Latents:
    return gen.merge().velocity(x, timestep, is_given_t, rotary, prefix, unroll=unroll)


velocity = jax.jit(_velocity, static_argnums=6)


def step_program(model: str, video: Video, unroll: int = 1) -> Program:
    """The network of a denoising step, of both branches."""
    pipe = pipeline(model)
    config, vae = models.MODELS[model]
    shape, tokens = vae.latent_shape(video.frames, video.height, video.width), video.tokens(config, vae)
    half = normal(0, 2, tokens, config.head_dim // 2, dtype=jnp.float32)
    keys = normal(1, config.num_hidden_layers, 2, TEXT, config.num_key_value_heads, config.head_dim)
    prefix = Prefix(keys, keys, jnp.array([TEXT - 100, TEXT - 400], jnp.int32))
    latents = Latents(normal(2, *shape, vae.z_dim, dtype=jnp.float32), None)
    given = jnp.zeros(shape[0], bool)
    arguments = pipe.residence.bring("gen"), latents, jnp.float32(700), given, Rotary(jnp.cos(half), jnp.sin(half)), prefix
    return Program(velocity, arguments, pipe.mesh, (unroll,))


def decode_program(model: str, video: Video) -> Program:
    """The decoder, to what goes into a file."""
    pipe, vae = pipeline(model), models.MODELS[model][1]
    t, h, w = vae.latent_shape(video.frames, video.height, video.width)
    latents = normal(0, t, h, w, vae.z_dim, dtype=jnp.float32)
    arguments = pipe.residence.bring("vae"), latents
    return Program(decode, arguments, picture_mesh(pipe.mesh, h, w), (uint8,))


PROGRAMS = {"step": step_program, "decode": decode_program}


def layers(setting: Setting) -> Iterator[Row]:
    """One step with its layers looped or unrolled, weights of either order, and steps in one program or many."""
    config, sizes = setting.configs[0], videos()
    whole = config.num_hidden_layers

    def unrolled(name: str, unroll: int) -> Row:
        return {"ms": 1e3 * seconds(step_program(setting.model, sizes[name], unroll).compiled(), least=0)}

    def cases() -> Iterator[Case]:
        yield from (unroll_case("256p", unroll) for unroll in (1, 2, 4))
        yield from _orders(config, 2 * sizes["480p"].tokens(*setting.configs))
        yield from (
            ({"what": f"a step of {sizes['256p']}, {count} in a program"}, functools.partial(_fused, setting.model, count))
            for count in (1, 5, 10)
        )
        yield from (unroll_case("480p", unroll) for unroll in (1, 2, 4))
        yield from (unroll_case(name, whole) for name in ("256p", "480p"))

    def unroll_case(name: str, unroll: int) -> Case:
        return {"what": f"velocity of {sizes[name]}, unroll={unroll}"}, functools.partial(unrolled, name, unroll)

    yield from measured(setting, cases())


def _orders(config: TransformerConfig, tokens: int) -> Iterator[Case]:
    """Both products of an MLP, with weights [out, in] and [in, out]."""
    sizes = {"T": tokens, "D": config.hidden_size, "F": config.intermediate_size}

    def product(equation: str) -> Row:
        x, w = (normal(i, *(sizes[letter] for letter in dims)) for i, dims in enumerate(equation.partition("->")[0].split(",")))
        multiply = jax.jit(functools.partial(jnp.einsum, equation))
        took = seconds(lambda: multiply(x, w))
        flops = 2 * sizes["T"] * sizes["D"] * sizes["F"]
        return {"ms": 1e3 * took, "TFLOP/s": flops / took / 1e12}

    for equation in ("TD,FD->TF", "TD,DF->TF", "TF,DF->TD", "TF,FD->TD"):
        yield {"what": f"{equation} of {tokens} tokens"}, functools.partial(product, equation)


def _fused(model: str, steps_per_call: int) -> Row:
    """Ten steps of a request, and the decode left out."""
    request = videos()["256p"].request(10, steps_per_call=steps_per_call, output_type="latent")
    pipe = pipeline(model)
    pipe.run(request, progress=False)
    return {"ms": 1e3 * pipe.run(request, progress=False).seconds["denoise"] / 10}


# XLA's options: what may pay, one at a time
FLAGS: dict[str, Sequence[tuple[str, Any]]] = {
    "step": (
        ("xla_gpu_enable_latency_hiding_scheduler", True),
        ("xla_gpu_enable_triton_gemm", False),
        ("xla_gpu_enable_command_buffer", ""),
        ("xla_gpu_enable_dynamic_slice_fusion", True),
        ("xla_gpu_enable_cublaslt", True),
        ("xla_gpu_triton_gemm_any", True),
        ("xla_gpu_enable_while_loop_unrolling", "WHILE_LOOP_UNROLLING_DOUBLE_BUFFER"),
        ("xla_gpu_cudnn_gemm_fusion_level", 2),
        ("xla_gpu_autotune_level", 0),
        ("xla_gpu_exclude_nondeterministic_ops", True),
        ("xla_allow_excess_precision", False),
    ),
    "decode": (
        ("xla_allow_excess_precision", True),
        ("xla_gpu_force_conv_nhwc", True),
        ("xla_gpu_force_conv_nchw", True),
        ("xla_gpu_experimental_enable_conv_fusion", True),
        ("xla_gpu_enable_latency_hiding_scheduler", True),
        ("xla_gpu_enable_command_buffer", ""),
        ("xla_gpu_autotune_level", 0),
        ("xla_gpu_exclude_nondeterministic_ops", True),
    ),
}


def flags(setting: Setting) -> Iterator[Row]:
    """A step and a decode of the smallest video under options of XLA, one at a time, against none."""
    for name, options in FLAGS.items():
        program, plain = PROGRAMS[name](setting.model, videos()["256p"]), None
        for flag, value in (("none", None), *options):
            about = {"program": name, "option": flag if value is None else f"{flag}={value}"}
            (row,) = measured(setting, [(about, functools.partial(_with_option, program, flag, value))])
            if "ms" in row:
                plain = plain or row["ms"]
                row["of none"] = row["ms"] / plain
            yield row


def _with_option(program: Program, flag: str, value: Any) -> Row:
    if flag.startswith("xla_gpu") and not on_gpu():
        return GPU_ONLY
    start = time.perf_counter()
    try:
        run = program.compiled(**({} if value is None else {flag: value}))
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return {"note": "unknown to this version"}
        raise
    compiling = time.perf_counter() - start
    return {"ms": 1e3 * seconds(run, least=0), "s to compile": compiling}


# Where the time goes


def trace(setting: Setting) -> Iterator[Row]:
    """The ten longest kernels of a step and of a decode at 480p, of all that ran, and how much of the time nothing did."""
    for name, program in PROGRAMS.items():
        yield from _longest(name, program(setting.model, videos()["480p"]).compiled())


def _longest(name: str, run: Callable[[], Any]) -> Iterator[Row]:
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        file = next(Path(folder).rglob("*.xplane.pb"))
        lines = device_lines(jax.profiler.ProfileData.from_file(str(file)))
    total, count, busy, wall = busy_time(lines)
    for op, spent in sorted(total.items(), key=lambda each: -each[1])[:10]:
        yield {"program": name, "op": op[:80], "ms": spent / 1e6, "count": count[op], "share": spent / sum(total.values())}
    yield {"program": name, "op": "(idle)", "ms": (wall - busy) / 1e6, "share": 1 - busy / wall}


Event = tuple[float, float, str]
"""(start, end, name), in nanoseconds."""


def device_lines(profile: Any) -> list[list[Event]]:
    """What ran on the device: on a GPU its streams, on a CPU XLA's threads, without what its runtime says of itself ("::")."""
    plane, line = ("/device:GPU", "Stream") if on_gpu() else ("/host:CPU", "tf_XLA")
    return [
        [
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for event in row.events
            if on_gpu() or "::" not in event.name
        ]
        for each in profile.planes
        if each.name.startswith(plane)
        for row in each.lines
        if row.name.startswith(line)
    ]


def busy_time(lines: Iterable[Iterable[Event]]) -> tuple[dict[str, float], collections.Counter, float, float]:
    """(time of each name without what runs inside of it, its count, time with anything running, time from first to last)."""
    total: dict[str, float] = collections.defaultdict(float)
    count: collections.Counter = collections.Counter()
    lines = [sorted(line, key=lambda event: (event[0], -event[1])) for line in lines]
    for line in lines:
        around: list[Event] = []
        for start, end, name in line:
            while around and around[-1][1] <= start:
                around.pop()
            if around:
                total[around[-1][2]] -= end - start
            total[name] += end - start
            count[name] += 1
            around.append((start, end, name))
    events = sorted(event for line in lines for event in line)
    if not events:
        raise RuntimeError("the trace has nothing that ran on the device")
    busy, reached = 0.0, events[0][0]
    for start, end, _ in events:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total, count, busy, reached - events[0][0]

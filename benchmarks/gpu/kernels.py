"""Parts of gpu_suite.py that need no model: the device's peaks, kernels of attention, lowerings of a convolution."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.setting import GPU_ONLY, TEXT, Case, Row, Setting, Video, measured, normal, on_gpu, seconds, videos
from cosmos3_jax.config import TransformerConfig, VAEConfig
from cosmos3_jax.gpus import named
from cosmos3_jax.models.convolution import SAME, quartered, repeated, side_by_side, summed, winograd
from cosmos3_jax.models.layers import chunked_attention, cudnn_attention

FLOAT8 = jnp.float8_e4m3fn

# The peaks


def peaks(setting: Setting) -> Iterator[Row]:
    """The device's rates: matrix products with weights [out, in] in bf16 and FP8, and a copy in its memory."""
    sheet = named(jax.devices()[0].device_kind)
    config, _ = setting.configs
    square = 8192 if on_gpu() else 256
    tokens = 2 * videos()["480p"].tokens(*setting.configs)
    shapes = [(square, square, square), (tokens, config.hidden_size, config.intermediate_size)]

    def product(m: int, k: int, n: int, operands: Any, result: Any) -> Row:
        x, w = normal(0, m, k, dtype=operands), normal(1, n, k, dtype=operands)
        contract = ((1,), (1,)), ((), ())
        multiply = jax.jit(lambda x, w: jax.lax.dot_general(x, w, contract, preferred_element_type=result))
        rate = 2 * m * k * n / seconds(lambda: multiply(x, w))
        return {"TFLOP/s": rate / 1e12} | ({"share of bf16 sheet": rate / sheet.bfloat16} if sheet else {})

    def move(function: Callable) -> Row:
        x, moved = normal(0, 2**30 if on_gpu() else 2**20, dtype=jnp.bfloat16), jax.jit(function)
        rate = 2 * x.nbytes / seconds(lambda: moved(x))
        return {"GB/s": rate / 1e9} | ({"share of sheet": rate / sheet.bandwidth} if sheet else {})

    types = [
        ("bf16 -> bf16", jnp.bfloat16, jnp.bfloat16),
        ("e4m3 -> bf16", FLOAT8, jnp.bfloat16),
        ("e4m3 -> f32", FLOAT8, jnp.float32),
    ]
    cases: list[Case] = [
        ({"what": f"[{m}, {k}] x [{n}, {k}], {name}"}, functools.partial(product, m, k, n, operands, result))
        for m, k, n in shapes
        for name, operands, result in types
    ]
    cases += [({"what": "copy"}, lambda: move(jnp.copy)), ({"what": "negative"}, lambda: move(jnp.negative))]
    yield from measured(setting, cases)


# Attention


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute attention of (q_BQNH, k_BMKH, v_BMKH, length_B)."""

    run: Callable[..., jax.Array]
    lengths: bool = False  # whether it knows them; else all keys count
    multiple: int = 1  # of queries and keys
    gpu_only: bool = True


def _cudnn_fp8(q, k, v, length):
    """JAX has no public name for it. What is scaled would underflow: weights of many keys, and their mean of values."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    scales: Any = {name: jnp.ones((1, 1, 1, 1)) for name in (*cudnn.fp8_params_keys_fwd, *cudnn.fp8_params_keys_bwd)}
    scales |= {"scale_s": 256 * scales["scale_s"], "descale_s": scales["descale_s"] / 256, "scale_o": 64 * scales["scale_o"]}
    scale = q.shape[-1] ** -0.5
    q8, k8, v8 = (x.astype(FLOAT8) for x in (q, k, v))
    out, *_ = cudnn.dot_product_attention(q8, k8, v8, fp8_params=scales, scale=scale, qkv_layout="BTNH", use_fp8=True)
    return (out.astype(jnp.float32) / 64).astype(q.dtype)


def _pallas_triton(q, k, v, length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return mha(q, k, v, segment_ids=None, sm_scale=q.shape[-1] ** -0.5, interpret=not on_gpu())


def _mosaic(q, k, v, length, *, block_q: int, block_kv: int):
    from jax.experimental.pallas.ops.gpu import attention_mgpu as mosaic

    config = mosaic.TuningConfig(block_q=block_q, block_kv=block_kv, max_concurrent_steps=2)
    return mosaic.attention(q * q.shape[-1] ** -0.5, k, v, config)  # it does not scale


KERNELS = {
    "cuDNN, lengths": Kernel(functools.partial(cudnn_attention, causal=False), lengths=True),
    "cuDNN": Kernel(lambda q, k, v, length: jax.nn.dot_product_attention(q, k, v, implementation="cudnn")),
    "cuDNN, e4m3": Kernel(_cudnn_fp8, multiple=128),
    "chunked, lengths": Kernel(chunked_attention, lengths=True, gpu_only=False),
    "Pallas Triton, heads repeated": Kernel(_pallas_triton, multiple=128),
    "Mosaic 64x128": Kernel(functools.partial(_mosaic, block_q=64, block_kv=128), multiple=128),
    "Mosaic 128x128": Kernel(functools.partial(_mosaic, block_q=128, block_kv=128), multiple=256),
}


def attention(setting: Setting) -> Iterator[Row]:
    """Attention of a step, both branches, by each kernel that there is; the difference is from float32 (`from_float32`)."""
    config, _ = setting.configs
    sizes = sorted({videos()[name].tokens(*setting.configs) for name in ("256p", "480p", "720p")})
    cases: list[Case] = []
    for name, kernel in KERNELS.items():
        for tokens in sizes if name != "chunked, lengths" else sizes[:1]:
            queries, keys = (-(-count // kernel.multiple) * kernel.multiple for count in (tokens, tokens + TEXT))
            run = functools.partial(_attend, kernel, config, queries, keys)
            cases.append(({"kernel": name, "queries": queries, "keys": keys}, run))
    yield from measured(setting, cases)


def _attend(kernel: Kernel, config: TransformerConfig, queries: int, keys: int) -> Row:
    if kernel.gpu_only and not on_gpu():
        return GPU_ONLY
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = normal(0, 2, queries, N, H), normal(1, 2, keys, K, H), normal(2, 2, keys, K, H)
    length = jnp.array([keys - 100, keys - 400] if kernel.lengths else [keys, keys], jnp.int32)
    run = jax.jit(kernel.run)
    took = seconds(lambda: run(q, k, v, length))
    rate = 4 * queries * int(length.sum()) * N * H / took
    return {"ms": 1e3 * took, "TFLOP/s": rate / 1e12, "difference": from_float32(kernel, q, k, v, length)}


def from_float32(kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array) -> float:
    """The largest difference from float32 for the first queries, as a share of the standard deviation."""
    out = jax.jit(kernel.run)(q, k, v, length)[:, :256].astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(chunked_attention)(*(x.astype(jnp.float32) for x in (q[:, :256], k, v)), length)
    return float(jnp.max(jnp.abs(out - exact)) / jnp.std(exact))


# The decoder's convolutions


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A way to compute a causal 3x3x3 convolution of frames [t + 2, h, w, in] with weights [3, 3, 3, in, out]."""

    run: Callable[[jax.Array, jax.Array], jax.Array]
    frames_order: tuple[int, ...] = (0, 1, 2, 3)  # in which it takes them
    weight_order: tuple[int, ...] = (0, 1, 2, 3, 4)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of XLA, for GPUs
    multiple: int = 1  # of frames


def _windows(frames: jax.Array) -> list[jax.Array]:
    return [frames[i : frames.shape[0] - 2 + i] for i in range(3)]


def _two_d(frames: jax.Array, weight: jax.Array, add_up: Callable = side_by_side) -> jax.Array:
    return add_up(_windows(frames), weight, SAME)


def _two_d_channels_first(frames: jax.Array, weight: jax.Array) -> jax.Array:
    x, kernel = jnp.concatenate(_windows(frames), axis=1), jnp.concatenate(weight, axis=1)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=("NCHW", "OIHW", "NCHW"))


def _three_d(frames: jax.Array, weight: jax.Array, layout: tuple[str, str, str] = ("NDHWC", "DHWIO", "NDHWC")) -> jax.Array:
    padding = ((0, 0), *SAME)
    return jax.lax.conv_general_dilated(frames[None], weight, (1, 1, 1), padding, dimension_numbers=layout)[0]


NHWC, NCHW = {"xla_gpu_force_conv_nhwc": True}, {"xla_gpu_force_conv_nchw": True}
CONVOLUTIONS = {
    "2-D, side by side": Convolution(_two_d),
    "2-D, summed": Convolution(functools.partial(_two_d, add_up=summed)),
    "2-D, Winograd over time": Convolution(functools.partial(_two_d, add_up=winograd), multiple=2),
    "3-D": Convolution(_three_d),
    "3-D, channels first": Convolution(
        functools.partial(_three_d, layout=("NCDHW", "OIDHW", "NCDHW")), (3, 0, 1, 2), (4, 3, 0, 1, 2)
    ),
    "2-D, channels first": Convolution(_two_d_channels_first, (0, 3, 1, 2), (0, 4, 3, 1, 2)),
    "2-D, side by side, NHWC forced": Convolution(_two_d, options=NHWC),
    "2-D, side by side, NCHW forced": Convolution(_two_d, options=NCHW),
    "3-D, NHWC forced": Convolution(_three_d, options=NHWC),
}


DOUBLED = {"of repeated pixels": repeated, "quartered": quartered}
"""Ways to compute a 3x3 convolution of frames [t, h, w, c] whose pixels are repeated twice in rows and columns."""


def decoder_shapes(vae: VAEConfig, video: Video) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of the decoder's up blocks, (t, h, w, in, out) of the 3x3x3 convolutions, and (t, h, w, c) of what is doubled.

    The most arithmetic comes first.
    """
    widths = [vae.decoder_base_dim * factor for factor in (vae.dim_mult[-1], *reversed(vae.dim_mult))]
    (_, h, w), t = vae.latent_shape(video.frames, video.height, video.width), 1
    causal: dict[tuple[int, ...], None] = {}
    doubled: list[tuple[int, ...]] = []
    for inputs, outputs, in_time in zip(widths, widths[1:], (*reversed(vae.temperal_downsample), False), strict=False):
        causal |= dict.fromkeys([(t, h, w, inputs, outputs), (t, h, w, outputs, outputs)])
        t = t * (2 if in_time else 1)
        doubled.append((t, h, w, outputs))
        h, w = 2 * h, 2 * w
    return sorted(causal, key=_convolution_flops, reverse=True), doubled[-2::-1]  # the last block doubles nothing


def _convolution_flops(shape: tuple[int, ...]) -> int:
    t, h, w, inputs, outputs = shape
    return 2 * t * h * w * 27 * inputs * outputs


def convolutions(setting: Setting) -> Iterator[Row]:
    """The VAE decoder's convolutions at 480p, a latent frame at a time."""
    causal, doubled = decoder_shapes(setting.configs[1], videos()["480p"])
    cases: list[Case] = [
        ({"t h w in out": " ".join(map(str, shape)), "how": name}, functools.partial(_convolve, how, shape))
        for shape in causal
        for name, how in CONVOLUTIONS.items()
        if shape[0] % how.multiple == 0
    ]
    cases += [
        ({"t h w in out": " ".join(map(str, (*shape, shape[-1]))), "how": name}, functools.partial(_double, way, shape))
        for shape in doubled
        for name, way in DOUBLED.items()
    ]
    yield from measured(setting, cases)


def _convolve(how: Convolution, shape: tuple[int, ...]) -> Row:
    if how.options and not on_gpu():
        return GPU_ONLY
    t, h, w, inputs, outputs = shape
    frames = normal(0, t + 2, h, w, inputs).transpose(how.frames_order)
    weight = normal(1, 3, 3, 3, inputs, outputs).transpose(how.weight_order)
    program = jax.jit(how.run).lower(frames, weight).compile(compiler_options=dict(how.options))
    took = seconds(lambda: program(frames, weight))
    return {"ms": 1e3 * took, "TFLOP/s": _convolution_flops(shape) / took / 1e12}


def _double(way: Callable, shape: tuple[int, ...]) -> Row:
    t, h, w, c = shape
    frames, weight, run = normal(0, *shape), normal(1, 3, 3, c, c), jax.jit(way)
    took = seconds(lambda: run(frames, weight))
    return {"ms": 1e3 * took, "TFLOP/s": 2 * t * 2 * h * 2 * w * 9 * c * c / took / 1e12}

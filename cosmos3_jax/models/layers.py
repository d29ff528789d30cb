"""What both towers are made of: norms, rotary positions, attention, MLPs, the timestep embedding.

Statistics, angles, softmax and the timestep embedding are float32 whatever the dtype of the activations; matrix products run
in the activations' dtype.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx, struct

from cosmos3_jax.axes import current_mesh, spec
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.weights import product, vector, weight

SCORE_ROWS = 512  # rows of scores at a time: at 720p 90 MB of them, not 505 GB, and on CPUs what stays in the cache


@struct.dataclass
class Rotary:
    """cos and sin of every position's angles, float32, one column for each pair of channels (half of H)."""

    cos: jax.Array
    sin: jax.Array


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, which has the letter `dim`, rounded once at the end.

    Unlike diffusers, which does so for Edge alone and elsewhere rounds before the scale: one formula, one rounding fewer.
    """

    def __init__(self, config: TransformerConfig, dim: str):
        self.scale = vector(config, dim, mean=1.0)
        self.epsilon = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """Gated SiLU (Nano, Super) or squared ReLU (Edge), without biases."""

    def __init__(self, config: TransformerConfig):
        self.gate = weight(config, "FD") if config.hidden_act == "silu" else None
        self.up = weight(config, "FD")
        self.down = weight(config, "DF")

    def __call__(self, x_BQD: jax.Array) -> jax.Array:
        hidden_BQF = product("BQD,FD->BQF", x_BQD, self.up)
        if self.gate is None:
            hidden_BQF = jnp.square(jax.nn.relu(hidden_BQF))
        else:
            hidden_BQF = jax.nn.silu(product("BQD,FD->BQF", x_BQD, self.gate)) * hidden_BQF
        return product("BQF,DF->BQD", hidden_BQF, self.down)


class TimestepEmbedding(nnx.Module):
    """A timestep in [0, 1000] as a vector of width D. Float32 throughout, its weights too."""

    def __init__(self, config: TransformerConfig):
        self.scale = config.timestep_scale
        self.w_in = weight(config, "DE", float32=True)
        self.b_in = vector(config, "D", float32=True)
        self.w_out = weight(config, "DD", float32=True)
        self.b_out = vector(config, "D", float32=True)

    def __call__(self, timestep: jax.Array) -> jax.Array:
        half = self.w_in.shape[-1] // 2
        frequency_E = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
        angle_E = timestep.astype(jnp.float32) * self.scale * frequency_E
        wave_E = jnp.concatenate([jnp.cos(angle_E), jnp.sin(angle_E)])
        times = functools.partial(jnp.matmul, precision="highest")  # else GPUs round float32 to TF32, 10 bits
        return times(self.w_out[...], jax.nn.silu(times(self.w_in[...], wave_E) + self.b_in[...])) + self.b_out[...]


def rotate(x_BQNH: jax.Array, rotary: Rotary) -> jax.Array:
    """x turned by its position: channel i pairs with channel i + H/2 (the NeoX order). rotary is [B or 1, Q, H/2].

    Unlike diffusers, which rounds cos, sin and both products to the activations' dtype: rounded once, at the end.
    """
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    left, right = jnp.split(x_BQNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_BQNH.dtype)


def attention(q_BQNH: jax.Array, k_BMKH: jax.Array, v_BMKH: jax.Array, length_B: jax.Array, *, causal: bool = False):
    """softmax(q k / sqrt(H)) v in [B, Q, N, H]: each query head with its group's key/value head, without repeating it.

    Only the first `length_B` keys count. Heads are divided over `tp` and branches over `cfg`: no device talks to another.
    """
    core = cudnn_attention if _cudnn_can(q_BQNH) else chunked_attention
    core = functools.partial(core, causal=causal)
    mesh = current_mesh()
    if mesh is None:
        return core(q_BQNH, k_BMKH, v_BMKH, length_B)
    q, kv, length = (spec(dims, mesh) for dims in ("BQNH", "BMKH", "B"))
    return jax.shard_map(core, in_specs=(q, kv, kv, length), out_specs=q, check_vma=False)(q_BQNH, k_BMKH, v_BMKH, length_B)


def _cudnn_can(q: jax.Array) -> bool:
    head_dim = q.shape[-1]
    return jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


def cudnn_attention(q_BQNH, k_BMKH, v_BMKH, length_B, *, causal: bool):
    """The fused kernel. Lengths, never a mask: a mask or bias would put all the scores in memory."""
    return jax.nn.dot_product_attention(
        q_BQNH, k_BMKH, v_BMKH, is_causal=causal, key_value_seq_lengths=length_B, implementation="cudnn"
    )


def chunked_attention(q_BQNH, k_BMKH, v_BMKH, length_B, *, causal: bool = False):
    """Exact attention anywhere, one key/value head at a time, and of its query heads a chunk of SCORE_ROWS queries."""
    B, Q, N, H = q_BQNH.shape
    M, K = k_BMKH.shape[1:3]
    count = -(-Q * N // K // SCORE_ROWS)
    chunk = -(-Q // count)
    padded = jnp.pad(q_BQNH, ((0, 0), (0, count * chunk - Q), (0, 0), (0, 0)))
    q = padded.reshape(B, count, chunk, K, N // K, H).transpose(0, 3, 1, 2, 4, 5).reshape(B * K, count, -1, H)
    k, v = (x.transpose(0, 2, 1, 3).reshape(B * K, M, H) for x in (k_BMKH, v_BMKH))
    key_M, query_q = jnp.arange(M), jnp.arange(chunk * N // K) // (N // K)

    def head(inputs):
        q, k_MH, v_MH, length = inputs

        def attend(inputs):
            start, q_qH = inputs
            score_qM = jnp.einsum("qH,MH->qM", q_qH, k_MH, preferred_element_type=jnp.float32) * H**-0.5
            seen = key_M < length
            if causal:
                seen = seen & (key_M <= (start + query_q)[:, None])
            score_qM = jnp.where(seen, score_qM, -jnp.inf)
            weight_qM = jnp.exp(score_qM - jnp.max(score_qM, axis=-1, keepdims=True))
            mean_qH = jnp.einsum("qM,MH->qH", weight_qM.astype(v.dtype), v_MH, preferred_element_type=jnp.float32)
            return (mean_qH / jnp.sum(weight_qM, axis=-1, keepdims=True)).astype(q_qH.dtype)

        return jax.lax.map(attend, (jnp.arange(count) * chunk, q))

    out = jax.lax.map(head, (q, k, v, jnp.repeat(length_B, K)))
    return out.reshape(B, K, count * chunk, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, count * chunk, N, H)[:, :Q]

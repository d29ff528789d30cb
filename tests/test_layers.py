"""Attention against its formula, rotation as a rotation, norms and the timestep embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from metrics import random

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.config import TINY
from cosmos3_jax.models.layers import SCORE_ROWS, RMSNorm, Rotary, TimestepEmbedding, attention, rotate
from cosmos3_jax.weights import random_weights, split


def filled(module: nnx.Module) -> nnx.Module:
    network = split(module, make_mesh(), jnp.float32)
    return network.replace(weights=random_weights(network.weights)).merge()


def plain_attention(q, k, v, length, causal):
    """Softmax attention, one branch and one head at a time, in float64."""
    B, Q, N, H = q.shape
    out = np.zeros(q.shape)
    for b in range(B):
        for n in range(N):
            kv = n // (N // k.shape[2])
            score = q[b, :, n].astype(np.float64) @ k[b, :, kv].T / H**0.5
            score[:, length[b] :] = -np.inf
            if causal:
                score[np.arange(k.shape[1])[None] > np.arange(Q)[:, None]] = -np.inf
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            out[b, :, n] = weight / weight.sum(axis=1, keepdims=True) @ v[b, :, kv]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["equal_heads", "grouped_heads"])
@pytest.mark.parametrize("queries", [1, 60, SCORE_ROWS // 4, SCORE_ROWS, SCORE_ROWS + 1])
@pytest.mark.parametrize("mesh", [False, True], ids=["alone", "in_mesh"])
def test_attention_is_softmax(queries, heads, causal, mesh):
    (N, K), M = heads, queries + 5
    q, k, v = random(2, queries, N, 8), random(2, M, K, 8, seed=1), random(2, M, K, 8, seed=2)
    length = np.array([M, 3], np.int32)
    with jax.set_mesh(make_mesh()) if mesh else jax.default_device(None):
        out = jax.jit(lambda *x: attention(*x, causal=causal))(q, k, v, length)
    np.testing.assert_allclose(out, plain_attention(q, k, v, length, causal), atol=2e-6)


def test_keys_past_the_length_do_not_exist():
    q, k, v, length = random(1, 9, 2, 8), random(1, 12, 2, 8), random(1, 12, 2, 8), np.array([7], np.int32)
    whole = attention(q, np.where(np.arange(12)[:, None, None] < 7, k, 1e6), v, length)
    np.testing.assert_array_equal(whole, attention(q, k, v, length))


def test_rotation_keeps_lengths_and_depends_on_differences():
    angle = random(1, 6, 4)

    def turn(x, by):
        return rotate(x, Rotary(jnp.cos(angle + by), jnp.sin(angle + by)))

    q, k = random(1, 6, 2, 8), random(1, 6, 2, 8, seed=1)
    np.testing.assert_allclose(jnp.linalg.norm(turn(q, 0.0), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)
    scores = [jnp.einsum("bqnh,bknh->bnqk", turn(q, by), turn(k, by)) for by in (0.0, 1.7)]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_norm_has_unit_mean_square_and_rounds_once():
    x = 100 * random(3, 64)
    norm = filled(RMSNorm(TINY, "D"))
    np.testing.assert_allclose(np.mean(np.square(norm(x)), axis=-1), 1, rtol=1e-5)
    exact = norm(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(jnp.asarray(x, jnp.bfloat16)), exact)


def test_timesteps_are_told_apart():
    # 1/1000 apart after scaling: float32 keeps them distinct, bf16 would not.
    embed = filled(TimestepEmbedding(TINY))
    assert np.abs(embed(jnp.float32(999)) - embed(jnp.float32(998))).max() > 1e-4


def test_timesteps_are_float32_on_gpus_too():
    # Told to the compiler, since only a GPU would round otherwise.
    embed = filled(TimestepEmbedding(TINY))
    assert jax.jit(lambda t: embed(t)).lower(jnp.float32(999)).as_text().count("precision = [HIGHEST, HIGHEST]") == 2

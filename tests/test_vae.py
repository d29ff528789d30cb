"""The video VAE: every block equals the reference's as a clip streams through, and it is causal."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from metrics import errors, random

from cosmos3_jax.models.vae import average_down, fold, repeat_up, stream, uint8, unfold, unit
from cosmos3_jax.pipeline import decode, encode
from cosmos3_jax.weights import Network, Weight, by_path, map_weights


@pytest.fixture
def vae(pipes):
    """A small VAE."""
    return pipes("small").residence.bring("vae")


@pytest.mark.parametrize("name", cases.BLOCKS)
def test_block_equals_reference(name, vae, goldens):
    block = vae.merge()
    for part in name.split("."):
        block = block[int(part)] if part.isdigit() else getattr(block, part)
    inputs = cases.block_inputs(block.resnets[0].conv1.weight.shape[-2], cases.BLOCKS[name])
    graph, tree = nnx.split(block)
    out = jax.jit(lambda tree, x: stream(nnx.merge(graph, tree), x, cases.BLOCKS[name]))(tree, inputs)
    assert errors(np.asarray(out), goldens("vae")[name])[1] < 1e-5  # sums of up to 1,300 products in other orders


def test_encoder_is_causal(vae):
    # So the latents of given frames need no later frame, and an image needs one frame only.
    frames = random(9, 32, 48, 3)
    whole = encode(vae, frames)
    assert whole.shape == (3, 2, 3, cases.VAE.z_dim)
    for latents in (1, 2):
        np.testing.assert_allclose(encode(vae, frames[: 4 * latents - 3]), whole[:latents], atol=1e-5)


def test_decoder_is_causal(vae):
    latents = random(3, 2, 3, cases.VAE.z_dim)
    whole = decode(vae, latents, unit)
    assert whole.shape == (9, 32, 48, 3)
    for count in (1, 2):
        np.testing.assert_allclose(decode(vae, latents[:count], unit), whole[: 4 * count - 3], atol=1e-5)


def test_nan_in_any_weight_reaches_the_output(vae):
    # No weight is dead or forgotten. The middle of a kernel: of the smallest frames, one pixel, it sees the most.
    frames, latents = random(5, 16, 16, 3), random(2, 1, 1, cases.VAE.z_dim)

    def output(path: str, vae: Network) -> np.ndarray:
        return encode(vae, frames) if path.startswith(("encoder", "quant_conv")) else decode(vae, latents, unit)

    for path in by_path(vae.weights):
        poisoned = vae.replace(weights=map_weights(functools.partial(poison, path), vae.weights))
        assert np.isfinite(output(path, vae)).all()
        assert np.isnan(output(path, poisoned)).any(), path


def poison(target: str, path: str, w: Weight) -> jax.Array:
    middle = tuple(size // 2 for size in w.shape[:-2]) + (0,) * min(w.ndim, 2)
    return w[...].at[middle].set(np.nan) if path == target else w[...]


def test_uint8_is_the_rounded_unit():
    x = jnp.linspace(-1.2, 1.2, 1001)
    assert uint8(x).dtype == jnp.uint8
    np.testing.assert_array_equal(uint8(x), np.round(np.asarray(unit(x)) * 255))
    assert (unit(x).min(), unit(x).max()) == (0, 1)


def test_unfold_undoes_fold():
    x = random(2, 4, 6, 3)
    assert fold(x, 2).shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(unfold(fold(x, 2), 2), x)


def test_averages_of_repeats_are_the_original():
    x = random(3, 2, 5, 8)
    np.testing.assert_allclose(average_down(repeat_up(x, 4, 2, 2), 8, 2, 2), x, rtol=1e-6)

"""What Nano needs for 189 frames of 720p on one device, read off the compiled programs; nothing is allocated or run.

`pytest tests/test_memory.py -s` prints the table. In float32: for bf16, XLA's CPU backend keeps float32 copies of the weights,
which says nothing about a GPU.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos3_jax import make_mesh, sampler
from cosmos3_jax.axes import sharding
from cosmos3_jax.config import NANO, WAN_VAE
from cosmos3_jax.models.layers import Rotary
from cosmos3_jax.models.transformer import Prefix
from cosmos3_jax.models.vae import uint8
from cosmos3_jax.pipeline import abstract_networks, decode, prefill, velocity

MESH = make_mesh()
B, S = 2, 512  # branches, text tokens
T, H, W = WAN_VAE.latent_shape(189, 720, 1280)
G = T * math.ceil(H / 2) * math.ceil(W / 2)


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding(MESH, ""))


@pytest.fixture(scope="module")
def networks():
    return abstract_networks(NANO, WAN_VAE, MESH, "float32")


def memory(name: str, lowered) -> tuple[int, int]:
    """(scratch memory, largest single array) of a compiled program in bytes; prints them."""
    compiled = lowered.compile()
    needs = compiled.memory_analysis()
    arrays = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    largest = max(4 * math.prod(map(int, sizes.split(","))) for sizes in arrays)
    gigabytes = (needs.argument_size_in_bytes, needs.output_size_in_bytes, needs.temp_size_in_bytes, largest)
    print(
        "{:>20}: arguments {:6.2f}  results {:5.2f}  scratch {:6.2f}  largest array {:5.2f} GB".format(
            name, *(b / 1e9 for b in gigabytes)
        )
    )
    return needs.temp_size_in_bytes, largest


def test_prefill(networks):
    rotary = Rotary(shape(1, S, 64), shape(1, S, 64))
    with jax.set_mesh(MESH):
        lowered = prefill.lower(networks.und, shape(B, S, dtype=jnp.int32), shape(B, dtype=jnp.int32), rotary)
        scratch, _ = memory("prefill", lowered)
    assert scratch < 2e9


def test_step_never_holds_the_scores(networks):
    # Whole, they are 505 GB; of one group of four heads 63 GB. The largest array is the MLP's hidden layer or a weight.
    latents = shape(T, H, W, 48)
    state, given = sampler.State(*[latents] * 4), sampler.Given(latents, shape(T, dtype=jnp.bool_))
    cache = shape(NANO.num_hidden_layers, B, S, NANO.num_key_value_heads, NANO.head_dim)
    prefix = Prefix(cache, cache, shape(B, dtype=jnp.int32))
    inputs = networks.gen, Rotary(shape(B, G, 64), shape(B, G, 64)), prefix
    steps = sampler.unipc_steps(np.array([0.9]))
    with jax.set_mesh(MESH):
        lowered = sampler.run_steps.lower(velocity, inputs, state, steps, given)
        scratch, largest = memory("denoising step", lowered)
    hidden = 4 * B * G * NANO.intermediate_size
    stacked_weight = 4 * NANO.num_hidden_layers * NANO.intermediate_size * NANO.hidden_size
    assert largest <= max(hidden, stacked_weight)
    assert scratch < 4 * hidden


def test_decoder_holds_one_latent_frame(networks):
    # As much scratch for 48 latent frames as for 3: the first, and two of those that are scanned.
    with jax.set_mesh(MESH):
        needs = [memory(f"decode {t} latents", decode.lower(networks.vae, shape(t, H, W, 48), uint8))[0] for t in (3, T)]
    assert needs[1] < 1.02 * needs[0]

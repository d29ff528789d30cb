"""The two towers: a layer of each family equals the reference's, and what must not matter does not."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from metrics import random

from cosmos3_jax import Cosmos3Pipeline, positions
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.config import TINY_VAE, TransformerConfig
from cosmos3_jax.cost import flops
from cosmos3_jax.latents import Latents
from cosmos3_jax.models.layers import Rotary
from cosmos3_jax.models.transformer import Prefix, patchify, unpatchify
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.pipeline import prefill, velocity
from cosmos3_jax.weights import Network, Weight, by_path, map_weights

SHAPE = (3, 5, 6)  # latent frames, rows (odd, so that patches are padded), columns
PATCHES = 3 * 3 * 3
SOUND = 7  # sound latents
NOTHING_GIVEN = np.zeros(3, bool)

compiled_velocity = jax.jit(velocity)


class Towers:
    """Both towers of a family, and one request through them."""

    def __init__(self, pipe: Cosmos3Pipeline):
        self.config = pipe.checkpoint.transformer
        self.und, self.gen = pipe.residence.bring("und"), pipe.residence.bring("gen")

    def prefix(self, ids_BS: np.ndarray, length_B: list[int], und: Network | None = None) -> Prefix:
        text, _ = positions.layout(self.config, np.array(length_B), ids_BS.shape[1], SHAPE, 24.0)
        return prefill(und or self.und, ids_BS, np.array(length_B, np.int32), Rotary(*text))

    def latents(self, seed: int = 1) -> Latents:
        """Those of a video and of its sound."""
        video = random(*SHAPE, self.config.latent_channel, seed=seed)
        return Latents(video, random(SOUND, self.config.sound_dim, seed=seed + 50))

    def rotary(self, length_B: np.ndarray) -> Rotary:
        """Where the tokens of `latents` stand."""
        return Rotary(*positions.layout(self.config, length_B, 1, SHAPE, 24.0, SOUND)[1])

    def velocity(
        self,
        prefix: Prefix,
        x: Latents | None = None,
        *,
        timestep: float = 700.0,
        is_given_t: np.ndarray = NOTHING_GIVEN,
        gen: Network | None = None,
        rotary: Rotary | None = None,
    ) -> Latents:
        x, rotary = x or self.latents(), rotary or self.rotary(np.asarray(prefix.length_B))
        rotary = Rotary(*(angles[:, : PATCHES + (0 if x.sound is None else SOUND)] for angles in (rotary.cos, rotary.sin)))
        return jax.tree.map(np.asarray, compiled_velocity((gen or self.gen, rotary, prefix), x, timestep, is_given_t))


def assert_close(found: Latents, expected: Latents, atol: float = 0) -> None:
    """The same shapes, and values as close; without `atol` the same to the bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, x in vars(expected).items():
        if x is not None:
            np.testing.assert_allclose(getattr(found, name), x, rtol=0, atol=atol, strict=True, err_msg=name)


def apart(x: Latents, y: Latents) -> list[float]:
    """The largest difference of each: video, and sound if there is one."""
    return [float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)]


@pytest.fixture(params=["small", "edge"])
def towers(request, pipes) -> Towers:
    return Towers(pipes(request.param))


def prompts(*lengths: int, bucket: int) -> np.ndarray:
    ids_BS = np.zeros((len(lengths), bucket), np.int32)
    for row, length in zip(ids_BS, lengths, strict=True):
        row[:length] = 1 + np.arange(length)
    return ids_BS


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_layer_equals_reference(family, pipes, goldens):
    # The second of the layers, merged from its slice of the stack; und first, whose keys and values the gen layer reads.
    expected, pipe = goldens(family), pipes(family)
    und, gen = (x[None] for x in cases.layer_inputs(pipe.checkpoint.transformer.hidden_size))
    cos, sin = expected["layer.cos"][None], expected["layer.sin"][None]
    text, vision = (Rotary(cos[:, part], sin[:, part]) for part in (slice(cases.TEXT), slice(cases.TEXT, None)))
    und_layer, gen_layer = (layer_of(network, 1) for network in map(pipe.residence.bring, ("und", "gen")))
    und, (k, v) = und_layer(und, text)
    gen = gen_layer(gen, vision, Prefix(k, v, np.array([cases.TEXT], np.int32)))
    for ours, theirs in ((und, expected["layer.und"]), (gen, expected["layer.gen"])):
        np.testing.assert_allclose(ours[0], theirs, atol=1e-5 * theirs.std())  # sums of up to 384 products in other orders


def layer_of(network, i: int) -> nnx.Module:
    graph, tree = nnx.split(network.merge().layers)
    return nnx.merge(graph, map_weights(lambda _, w: w[...][i], tree))


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_angles_equal_reference(family, goldens):
    # At position 15,000 one unit in the last place of a frequency is 1e-3 of a radian.
    config, expected = cases.FAMILIES[family], goldens(family)
    shape = tuple(np.multiply(cases.GRID, (1, config.latent_patch_size, config.latent_patch_size)))
    text, vision = positions.layout(config, np.array([cases.TEXT]), cases.TEXT, shape, 16.0)
    for ours, name in zip(zip(text, vision, strict=True), ("cos", "sin"), strict=True):
        np.testing.assert_allclose(np.concatenate(ours, axis=1)[0], expected[f"layer.{name}"], atol=2e-3)


def test_padding_the_text_changes_nothing(towers):
    short, long = (towers.velocity(towers.prefix(prompts(9, bucket=bucket), [9])) for bucket in (9, 24))
    assert_close(short, long, atol=1e-5)  # the sums are split otherwise


def test_branches_do_not_see_each_other(towers):
    both = towers.velocity(towers.prefix(prompts(9, 4, bucket=16), [9, 4]))
    alone = [towers.velocity(towers.prefix(prompts(length, bucket=16), [length])) for length in (9, 4)]
    assert_close(both, jax.tree.map(lambda *rows: np.concatenate(rows), *alone), atol=1e-5)  # nor do other shapes round alike
    assert min(apart(*(jax.tree.map(lambda x, row=row: x[row], both) for row in (0, 1)))) > 1e-2


def test_text_is_causal(towers):
    ids_BS = prompts(9, bucket=9)
    changed = ids_BS.copy()
    changed[0, 5] += 7
    before, after = (towers.prefix(ids, [9]).v for ids in (ids_BS, changed))
    np.testing.assert_array_equal(before[:, :, :5], after[:, :, :5])
    assert (np.abs(before[:, :, 5:] - after[:, :, 5:]).max(axis=(1, 3, 4))[1:] > 0).all()


def test_given_frames_have_no_timestep(towers):
    prefix, video = towers.prefix(prompts(9, bucket=9), [9]), dataclasses.replace(towers.latents(), sound=None)
    given = [towers.velocity(prefix, video, timestep=float(t), is_given_t=~NOTHING_GIVEN) for t in (1, 900)]
    assert_close(*given)
    assert min(apart(*(towers.velocity(prefix, video, timestep=float(t)) for t in (1, 900)))) > 1e-2


def test_sound_has_a_timestep_whatever_is_given(towers):
    prefix = towers.prefix(prompts(9, bucket=9), [9])
    given = [towers.velocity(prefix, timestep=float(t), is_given_t=~NOTHING_GIVEN) for t in (1, 900)]
    assert apart(*given)[1] > 1e-2


def test_nan_in_any_weight_reaches_the_velocity(towers):
    # No weight is dead or forgotten. Of a stack it is the last layer's; each layer is used if one of a stack is.
    ids_BS, clean = prompts(9, bucket=9), towers.prefix(prompts(9, bucket=9), [9])
    assert spoiled(towers.velocity(clean)) == set()
    for path in by_path(towers.und.weights):
        prefix = towers.prefix(ids_BS, [9], und=poisoned(towers.und, path))
        assert spoiled(towers.velocity(prefix)) == {"video", "sound"}, path
    last = {"vision.w_out": {"video"}, "vision.b_out": {"video"}, "sound.w_out": {"sound"}, "sound.b_out": {"sound"}}
    assert last.keys() <= by_path(towers.gen.weights).keys()
    for path in by_path(towers.gen.weights):
        reached = spoiled(towers.velocity(clean, gen=poisoned(towers.gen, path)))
        assert reached == last.get(path, {"video", "sound"}), path


def spoiled(x: Latents) -> set[str]:
    """What has any NaN in it."""
    return {name for name, value in vars(x).items() if value is not None and np.isnan(value).any()}


def poisoned(network: Network, target: str) -> Network:
    index = (1, 0) if target == "embed" else -1  # token 1, which the prompt holds

    def poison(path: str, w: Weight) -> jax.Array:
        return w[...].at[index].set(np.nan) if path == target else w[...]

    return network.replace(weights=map_weights(poison, network.weights))


# Video and sound


def test_video_and_sound_hear_of_each_other(towers):
    prefix, x, y = towers.prefix(prompts(9, bucket=9), [9]), towers.latents(), towers.latents(seed=2)
    whole = towers.velocity(prefix, x)
    assert min(apart(whole, towers.velocity(prefix, dataclasses.replace(x, video=y.video)))) > 1e-3
    assert min(apart(whole, towers.velocity(prefix, dataclasses.replace(x, sound=y.sound)))) > 1e-3
    silent = towers.velocity(prefix, dataclasses.replace(x, sound=None))
    assert silent.sound is None
    assert np.abs(silent.video - whole.video).max() > 1e-3


def test_every_sound_latent_matters_to_every_token(towers):
    prefix, x = towers.prefix(prompts(9, bucket=9), [9]), towers.latents()
    for i in range(SOUND):
        x.sound[i] = np.nan
        holed = towers.velocity(prefix, x)
        assert np.isnan(holed.video).all()
        assert np.isnan(holed.sound).all()
        x = towers.latents()


def test_sound_tokens_stand_where_their_position_says_and_nowhere_else(towers):
    # In another order, positions along with them: the same velocities in that order. Positions as they were: others.
    prefix, x = towers.prefix(prompts(9, 4, bucket=9), [9, 4]), towers.latents()
    order = np.roll(np.arange(SOUND), 2)
    rotary = towers.rotary(np.array([9, 4]))
    tokens = np.concatenate([np.arange(PATCHES), PATCHES + order])
    moved = Rotary(*(angles[:, tokens] for angles in (rotary.cos, rotary.sin)))
    shuffled, before = dataclasses.replace(x, sound=x.sound[order]), towers.velocity(prefix, x)
    after = towers.velocity(prefix, shuffled, rotary=moved)
    assert_close(after, dataclasses.replace(before, sound=before.sound[:, order]), atol=1e-5)  # sums in another order
    stayed = towers.velocity(prefix, shuffled, rotary=rotary)
    assert min(apart(stayed, dataclasses.replace(before, sound=before.sound[:, order]))) > 1e-3


def test_equal_sound_latents_differ_by_their_position_alone(towers):
    prefix, x = towers.prefix(prompts(9, bucket=9), [9]), towers.latents()
    x.sound[:] = x.sound[0]
    counted = towers.rotary(np.array([9]))
    at_once = Rotary(counted.cos.copy(), counted.sin.copy())
    for angles in (at_once.cos, at_once.sin):
        angles[:, PATCHES:] = angles[:, PATCHES : PATCHES + 1]
    alike = towers.velocity(prefix, x, rotary=at_once).sound[0]
    np.testing.assert_allclose(alike, np.broadcast_to(alike[0], alike.shape), atol=1e-5)  # rows of a product round otherwise
    found = towers.velocity(prefix, x).sound[0]
    assert np.abs(np.diff(found, axis=0)).max(axis=1).min() > 1e-4


# Without sound


def test_no_weight_of_the_sound_is_read_without_sound(towers):
    prefix, video = towers.prefix(prompts(9, bucket=9), [9]), dataclasses.replace(towers.latents(), sound=None)
    clean, gen = towers.velocity(prefix, video), towers.gen
    heads = [path for path in by_path(gen.weights) if path.startswith("sound.")]
    assert len(heads) == 5
    for path in heads:
        gen = poisoned(gen, path)
    assert_close(towers.velocity(prefix, video, gen=gen), clean)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_a_request_without_sound_costs_what_it_does_without_heads(family):
    """The same operations on the same shapes, one after the other, and none that XLA would have to remove."""
    config = cases.FAMILIES[family]
    without = dataclasses.replace(config, sound_gen=False, sound_dim=None)
    ours, bare = (traced(config, sound=0) for config in (config, without))
    assert list(operations(ours.jaxpr)) == list(operations(bare.jaxpr))
    assert flops(ours.jaxpr) == flops(bare.jaxpr) > 0
    compiled = [each.lower().compile() for each in (ours, bare)]
    (ours_flops, bare_flops), (ours_dots, bare_dots) = zip(
        *((c.cost_analysis()["flops"], dots(c.as_text())) for c in compiled), strict=True
    )
    assert ours_flops == bare_flops > 0
    assert ours_dots == bare_dots > 0
    assert flops(traced(config, sound=SOUND).jaxpr) > flops(ours.jaxpr)  # with sound there is more of it


def traced(config: TransformerConfig, sound: int) -> Any:
    """A step of two branches over so many sound latents, from shapes alone."""
    shape = jax.ShapeDtypeStruct
    B, S, G, half = 2, 16, PATCHES + sound, config.head_dim // 2
    angles = shape((B, G, half), jnp.float32)
    keys = shape((config.num_hidden_layers, B, S, config.num_key_value_heads, config.head_dim), jnp.float32)
    gen = abstract_networks(config, TINY_VAE, make_mesh(), "float32").gen
    x = Latents(
        shape((*SHAPE, config.latent_channel), jnp.float32), shape((sound, config.sound_dim), jnp.float32) if sound else None
    )
    inputs = gen, Rotary(angles, angles), Prefix(keys, keys, shape((B,), jnp.int32))
    return jax.jit(velocity).trace(inputs, x, shape((), jnp.float32), shape((SHAPE[0],), bool))


def operations(jaxpr: Any) -> Iterator[tuple[str, list]]:
    """Every operation of a program, and the shapes that it makes."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, [variable.aval.shape for variable in equation.outvars]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


def dots(hlo: str) -> int:
    """The matrix products of a compiled program, as CPUs write them."""
    return sum(" dot(" in line or ("custom-call" in line and "matmul" in line) for line in hlo.splitlines())


@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (3, 5, 6, 2), (2, 4, 7, 1)])
def test_unpatchify_undoes_patchify(shape):
    x = random(*shape)
    patches = patchify(x, 2)
    assert patches.shape == (shape[0] * -(-shape[1] // 2) * -(-shape[2] // 2), 4 * shape[3])
    np.testing.assert_array_equal(unpatchify(patches[None], shape, 2)[0], x)

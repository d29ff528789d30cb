"""The two towers: a layer of each family equals the reference's, and what must not matter does not."""

import cases
import jax
import numpy as np
import pytest
from flax import nnx
from metrics import random

from cosmos3_jax import Cosmos3Pipeline, positions
from cosmos3_jax.models.layers import Rotary
from cosmos3_jax.models.transformer import Prefix, patchify, unpatchify
from cosmos3_jax.pipeline import prefill, velocity
from cosmos3_jax.weights import Network, Weight, by_path, map_weights

SHAPE = (3, 5, 6)  # latent frames, rows (odd, so that patches are padded), columns
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

    def velocity(
        self, prefix: Prefix, *, timestep: float = 700.0, is_given_t: np.ndarray = NOTHING_GIVEN, gen: Network | None = None
    ) -> np.ndarray:
        _, vision = positions.layout(self.config, np.asarray(prefix.length_B), 1, SHAPE, 24.0)
        x_thwc = random(*SHAPE, self.config.latent_channel, seed=1)
        return np.asarray(compiled_velocity((gen or self.gen, Rotary(*vision), prefix), x_thwc, timestep, is_given_t))


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
    np.testing.assert_allclose(short, long, atol=1e-5)  # the sums are split otherwise


def test_branches_do_not_see_each_other(towers):
    both = towers.velocity(towers.prefix(prompts(9, 4, bucket=16), [9, 4]))
    alone = [towers.velocity(towers.prefix(prompts(length, bucket=16), [length])) for length in (9, 4)]
    np.testing.assert_allclose(both, np.concatenate(alone), atol=1e-5)  # nor do sums of other shapes round alike
    assert np.abs(both[0] - both[1]).max() > 1e-2


def test_text_is_causal(towers):
    ids_BS = prompts(9, bucket=9)
    changed = ids_BS.copy()
    changed[0, 5] += 7
    before, after = (towers.prefix(ids, [9]).v for ids in (ids_BS, changed))
    np.testing.assert_array_equal(before[:, :, :5], after[:, :, :5])
    assert (np.abs(before[:, :, 5:] - after[:, :, 5:]).max(axis=(1, 3, 4))[1:] > 0).all()


def test_given_frames_have_no_timestep(towers):
    prefix = towers.prefix(prompts(9, bucket=9), [9])
    given = [towers.velocity(prefix, timestep=float(t), is_given_t=~NOTHING_GIVEN) for t in (1, 900)]
    np.testing.assert_array_equal(*given)
    assert np.abs(towers.velocity(prefix, timestep=1.0) - towers.velocity(prefix, timestep=900.0)).max() > 1e-2


def test_nan_in_any_weight_reaches_the_velocity(towers):
    # No weight is dead or forgotten. Of a stack it is the last layer's; each layer is used if one of a stack is.
    ids_BS, clean = prompts(9, bucket=9), towers.prefix(prompts(9, bucket=9), [9])
    assert np.isfinite(towers.velocity(clean)).all()
    for path in by_path(towers.und.weights):
        assert np.isnan(towers.velocity(towers.prefix(ids_BS, [9], und=poisoned(towers.und, path)))).any(), path
    for path in by_path(towers.gen.weights):
        assert np.isnan(towers.velocity(clean, gen=poisoned(towers.gen, path))).any(), path


def poisoned(network: Network, target: str) -> Network:
    index = (1, 0) if target == "embed" else -1  # token 1, which the prompt holds

    def poison(path: str, w: Weight) -> jax.Array:
        return w[...].at[index].set(np.nan) if path == target else w[...]

    return network.replace(weights=map_weights(poison, network.weights))


@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (3, 5, 6, 2), (2, 4, 7, 1)])
def test_unpatchify_undoes_patchify(shape):
    x = random(*shape)
    patches = patchify(x, 2)
    assert patches.shape == (shape[0] * -(-shape[1] // 2) * -(-shape[2] // 2), 4 * shape[3])
    np.testing.assert_array_equal(unpatchify(patches[None], shape, 2)[0], x)

"""The loss and its gradients, beside torch's through the reference."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.checkpoint import Checkpoint, load
from cosmos3_jax.latents import Latents
from cosmos3_jax.models.transformer import GenTower, UndTower
from cosmos3_jax.published import disarrange, names_of
from cosmos3_jax.training.batches import Drawn, collate
from cosmos3_jax.training.objective import draw_noise, loss
from cosmos3_jax.weights import Network, by_path, is_stacked, split

FPS, SHAPE, SOUND = 16.0, (3, 5, 4, 16), 4  # odd rows: patches are cut off


def rows(*, sound: bool = True) -> list[Drawn]:
    """A clip of noise, one whose first frame is given, and one whose first two are."""
    random = np.random.default_rng(3)
    made = []
    for given, length, sigma in ((0, 9, 0.9), (1, 30, 0.3), (2, 17, 0.6)):
        latents = Latents(random.standard_normal(SHAPE).astype(np.float32))
        if sound:
            latents = dataclasses.replace(latents, sound=random.standard_normal((SOUND, 8)).astype(np.float32))
        ids = random.integers(5, 500, length).tolist()
        made.append(Drawn(latents, ids, np.float32(sigma), np.arange(SHAPE[0]) < given, np.uint32(given)))
    return made


def towers(checkpoint: Checkpoint) -> dict[str, Network]:
    modules = {"und": UndTower(checkpoint.transformer), "gen": GenTower(checkpoint.transformer)}
    networks = {part: split(module, make_mesh(), jnp.float32) for part, module in modules.items()}
    weights = checkpoint.audited(networks)
    return {part: load(weights, part, network) for part, network in networks.items()}


def by_published_name(part: str, network: Network, config) -> dict[str, np.ndarray]:
    names, found = names_of(part, network, config), {}
    for path, w in by_path(network.weights).items():
        values = np.asarray(w.get_value())
        for name, value in zip(names[path], values if is_stacked(w) else [values], strict=True):
            found[name] = disarrange(value, w)
    return found


@pytest.fixture(scope="module")
def small(folders) -> tuple[Checkpoint, dict[str, Network]]:
    checkpoint = Checkpoint.open(folders("small"))
    return checkpoint, towers(checkpoint)


def loss_of(small, drawn: list[Drawn], noise: Latents | None = None) -> tuple[float, float]:
    """Of the video and of the sound."""
    checkpoint, networks = small
    batch = collate(drawn, checkpoint.transformer, FPS, 128)
    found = loss(networks["und"], networks["gen"], batch, noise or draw_noise(batch.latents, batch.seed_B), train_und=False)
    return float(found.video), float(found.sound)


def test_every_row_counts_alike_whatever_is_beside_it(small):
    alone = [loss_of(small, [row]) for row in rows()]
    assert len({round(video, 3) for video, _ in alone}) == 3
    np.testing.assert_allclose(loss_of(small, rows()), np.mean(alone, axis=0), rtol=1e-5)


def test_noise_of_given_frames_does_nothing(small):
    drawn = rows()
    latents = collate(drawn, small[0].transformer, FPS, 128).latents
    noise = jax.tree.map(np.array, draw_noise(latents, np.array([row.seed for row in drawn])))
    expected = loss_of(small, drawn, noise)
    noise.video[1, 0] = noise.video[2, :2] = 100
    assert loss_of(small, drawn, noise) == pytest.approx(expected, rel=1e-6)
    noise.video[1, 1] += 1
    assert loss_of(small, drawn, noise)[0] != pytest.approx(expected[0], rel=1e-3)


def test_a_perfect_velocity_has_no_loss(small, monkeypatch):
    drawn = rows()
    latents = collate(drawn, small[0].transformer, FPS, 128).latents
    noise = draw_noise(latents, np.array([row.seed for row in drawn]))
    monkeypatch.setattr(GenTower, "velocities", lambda self, *_, **__: jax.tree.map(lambda x, e: e - x, latents, noise))
    assert loss_of(small, drawn, noise) == (0, 0)
    monkeypatch.setattr(GenTower, "velocities", lambda self, *_, **__: jax.tree.map(lambda x, e: e - x + 2, latents, noise))
    assert loss_of(small, drawn, noise) == pytest.approx((4, 4), rel=1e-5)


@pytest.mark.live
@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_gradients_are_those_of_the_reference(folders, family, sound):
    pytest.importorskip("diffusers")
    import reference

    checkpoint = Checkpoint.open(folders(family))
    networks = towers(checkpoint)
    batch = collate(rows(sound=sound), checkpoint.transformer, FPS, 128)
    noise = draw_noise(batch.latents, batch.seed_B)

    def total(weights):
        both = {part: Network(networks[part].graph, weights[part]) for part in networks}
        return loss(both["und"], both["gen"], batch, noise, train_und=True).total

    value, gradient = jax.jit(jax.value_and_grad(total))({part: network.weights for part, network in networks.items()})
    expected, reference_gradient = reference.gradients(
        reference.load(folders(family)), batch, jax.tree.map(np.array, noise), FPS
    )
    assert value == pytest.approx(expected, rel=1e-5)
    for part in networks:
        found = by_published_name(part, Network(networks[part].graph, gradient[part]), checkpoint.transformer)
        for name, ours in found.items():
            if name.startswith("audio_") and not sound:
                assert not ours.any(), name
                continue
            theirs = reference_gradient.pop(name)
            apart = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert apart < 1e-5, name  # 4.5e-6 at most: float32, added in another order
    assert not any(left.any() for left in reference_gradient.values())  # of what we do not load: it reaches no output

"""Which networks are on the devices: no more than there is room for, and the same video in any case."""

import functools
import gc
import math

import cases
import jax
import numpy as np
import pytest

from cosmos3_jax import Cosmos3Pipeline, InputError, make_mesh, networks, pipeline
from cosmos3_jax.config import TINY_SOUND
from cosmos3_jax.networks import ROOM, Networks, Residence, abstract_networks
from cosmos3_jax.weights import Network, by_path, nbytes

MESHES = [(1, 1), (2, 4)]
BASE = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "seed": 3, "progress": False}
MODES = {"text_to_video": {}, "image_to_video": {"image": cases.IMAGE}}
SOUND = {"enable_sound": True}


def abstract(cfg: int = 1, tp: int = 1) -> Networks:
    return abstract_networks(cases.FAMILIES["small"], cases.VAE, make_mesh(cfg, tp), "float32", TINY_SOUND)


def residence(text_tower: str = "auto", cfg: int = 1, tp: int = 1) -> Residence:
    """One that was not asked for a network yet."""
    return Residence(None, abstract(cfg, tp), make_mesh(cfg, tp), text_tower)


def short_of(monkeypatch, nbytes: float | None) -> None:
    """Makes the devices say that they have so many bytes; CPUs say nothing."""
    monkeypatch.setattr(networks, "device_memory", lambda mesh: nbytes)


@pytest.fixture
def opened(folders, monkeypatch):
    """`opened(text_tower, cfg, tp)`: a fresh pipeline, and a list of the networks that it reads from the folder."""
    read, lists = pipeline.load, [[]]

    def note(weights, part: str, *rest, **how) -> Network:
        lists[-1].append(part)
        return read(weights, part, *rest, **how)

    def open_(text_tower: str, cfg: int = 1, tp: int = 1) -> tuple[Cosmos3Pipeline, list[str]]:
        lists.append([])
        mesh = make_mesh(cfg, tp)
        return Cosmos3Pipeline.from_pretrained(folders("small"), mesh=mesh, text_tower=text_tower, progress=False), lists[-1]

    monkeypatch.setattr(pipeline, "load", note)
    return open_


@pytest.fixture(scope="module")
def kept(pipes):
    """`kept(mode, cfg, tp)`: the video of a pipeline that has everything on its devices, made once."""
    return functools.cache(lambda mode, cfg, tp: video(pipes("small", cfg=cfg, tp=tp), mode))


def video(pipe: Cosmos3Pipeline, mode: str = "text_to_video", on_step=lambda step, timestep, latents: None) -> np.ndarray:
    return pipe(cases.PROMPT, **BASE, **MODES[mode], callback_on_step_end=on_step).video


def both(pipe: Cosmos3Pipeline) -> list[np.ndarray]:
    """A video and its sound."""
    result = pipe(cases.PROMPT, **BASE, **SOUND)
    return [result.video, result.sound]


class Devices:
    """What came to the devices since this was made."""

    def __init__(self, cfg: int, tp: int):
        gc.collect()
        self.before = jax.live_arrays()  # held, so that no other array takes the place of one of them
        self.parts = abstract(cfg, tp).by_name()

    def arrays(self) -> list[jax.Array]:
        old = set(map(id, self.before))
        return [x for x in jax.live_arrays() if id(x) not in old and x.sharding.memory_kind != networks.HOST]

    def networks(self) -> set[str]:
        """The networks of which any weight is there that the others have none like."""
        found = {(x.shape, x.dtype) for x in self.arrays()}
        own = {part: kinds(network) for part, network in self.parts.items()}
        return {part for part in own if found & own[part] - set().union(*(own[other] for other in own if other != part))}

    def nbytes(self) -> int:
        """Of all arrays that could be weights, by shape and dtype."""
        alike = set().union(*map(kinds, self.parts.values()))
        return sum(x.nbytes for x in self.arrays() if (x.shape, x.dtype) in alike)


def kinds(network: Network) -> set[tuple]:
    return {(w.shape, w.dtype) for w in by_path(network.weights).values()}


def test_every_network_is_known_by_its_weights():
    """Else the tests below would see nothing: most weights of a network are of a shape that the others have not."""
    parts = abstract().by_name()
    assert list(parts) == ["und", "gen", "vae", "sound"]
    for part, network in parts.items():
        others = set().union(*(kinds(other) for name, other in parts.items() if name != part))
        own = [w for w in by_path(network.weights).values() if (w.shape, w.dtype) not in others]
        assert sum(math.prod(w.shape) for w in own) * 4 > 0.9 * nbytes(network)


# The text tower


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text_tower", ["keep", "drop", "host"])
@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_the_text_tower_leaves_after_the_prompt_and_the_video_is_the_same(cfg, tp, text_tower, mode, opened, kept):
    expected, devices = kept(mode, cfg, tp), Devices(cfg, tp)
    (pipe, _), during = opened(text_tower, cfg, tp), []
    found = video(pipe, mode, on_step=lambda *_: during.append((devices.networks(), devices.nbytes())))
    np.testing.assert_array_equal(found, expected)
    stays = {"und"} if text_tower == "keep" else set()
    encoded = {"vae"} if text_tower == "keep" or mode == "image_to_video" else set()
    assert [there for there, _ in during] == [{"gen"} | stays | encoded] * 2
    assert devices.networks() == {"gen", "vae"} | stays
    assert pipe.residence.on_devices.keys() == {"gen", "vae"} | stays
    assert pipe.residence.text_tower == text_tower
    expected_nbytes = sum(nbytes(devices.parts[part]) for part in {"gen"} | stays | encoded)
    for _, total in during:  # not a weight more, of whatever shape; a few small activations are shaped like a norm's scale
        assert 0 <= total - expected_nbytes < 0.01 * nbytes(devices.parts["und"])


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
@pytest.mark.parametrize(
    ("text_tower", "at_once", "first", "second"),
    [
        ("keep", ["und", "gen", "vae"], [], []),
        ("auto", ["und", "gen", "vae"], [], []),  # CPUs do not say what they have
        ("drop", [], ["und", "gen", "vae"], ["und"]),
        ("host", [], ["und", "gen", "vae"], []),
    ],
)
def test_what_is_read_from_the_folder(cfg, tp, text_tower, at_once, first, second, opened, kept):
    whole = kept("text_to_video", cfg, tp)  # first, for it reads the folder, too
    pipe, loads = opened(text_tower, cfg, tp)
    for expected in (at_once, first, second):
        assert loads == expected
        loads.clear()
        np.testing.assert_array_equal(video(pipe), whole)
    assert loads == second


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_on_the_host_it_is_pinned_and_whole(cfg, tp, opened, pipes):
    pipe, _ = opened("host", cfg, tp)
    video(pipe)
    parked = by_path(pipe.residence.on_host["und"].weights)
    assert pipe.residence.on_host.keys() == {"und"}
    assert {w.get_value().sharding.memory_kind for w in parked.values()} == {"pinned_host"}
    for path, w in by_path(pipes("small", cfg=cfg, tp=tp).residence.bring("und").weights).items():
        assert parked[path].get_value().sharding.spec == w.get_value().sharding.spec
        np.testing.assert_array_equal(np.asarray(parked[path].get_value()), np.asarray(w.get_value()), err_msg=path)


def test_an_interrupted_run_leaves_a_pipeline_that_works(opened, kept):
    def interrupt(*_):
        raise KeyboardInterrupt

    devices = Devices(1, 1)
    pipe, _ = opened("drop")
    with pytest.raises(KeyboardInterrupt):
        video(pipe, on_step=interrupt)
    assert devices.networks() == {"gen"}
    np.testing.assert_array_equal(video(pipe), kept("text_to_video", 1, 1))


# Short of memory

# What the devices have, as a function of the networks' sizes; and what is then read for a prompt with an image, for one
# without, and for one with an image again.
LIMITS = {
    "all but the text tower": (lambda und, gen, vae, sound: 1.5 * (gen + vae), ["vae", "und", "gen"], ["und"], ["und"]),
    "one beside the text tower": (
        lambda und, gen, vae, sound: 1.5 * vae,
        ["vae", "und", "gen", "vae"],
        ["und", "gen", "vae"],
        ["und", "gen", "vae"],
    ),
    "one at a time": (
        lambda und, gen, vae, sound: (und + vae) / 0.9 - 1,
        ["vae", "und", "gen", "vae"],
        ["und", "gen", "vae"],
        ["und", "gen", "vae"],
    ),
    "not even one": (
        lambda und, gen, vae, sound: 1,
        ["vae", "und", "gen", "vae"],
        ["und", "gen", "vae"],
        ["und", "gen", "vae"],
    ),
}


def whenever_brought(pipe: Cosmos3Pipeline, devices: Devices, monkeypatch) -> list[tuple[str, set[str]]]:
    """A list that grows, for every network that is brought, by it and all that are then on the devices."""
    seen, bring = [], pipe.residence.bring

    def spy(part: str, **how) -> Network:
        network = bring(part, **how)
        seen.append((part, devices.networks()))
        return network

    monkeypatch.setattr(pipe.residence, "bring", spy)
    return seen


@pytest.mark.parametrize("text_tower", ["auto", "drop", "host"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_networks_leave_for_one_another_where_memory_is_short(cfg, tp, limit, text_tower, opened, kept, monkeypatch):
    memory = LIMITS[limit][0](**residence("keep", cfg, tp).sizes)
    short_of(monkeypatch, memory)
    devices, (pipe, _) = Devices(cfg, tp), opened(text_tower, cfg, tp)
    sizes, seen = pipe.residence.sizes, whenever_brought(pipe, devices, monkeypatch)
    for mode in ("image_to_video", "text_to_video", "image_to_video"):
        np.testing.assert_array_equal(video(pipe, mode), kept(mode, cfg, tp))
    assert [part for part, _ in seen] == ["vae", "und", "gen", "vae", "und", "gen", "vae", "vae", "und", "gen", "vae"]
    for part, there in seen:
        assert there == {part} or sum(sizes[each] for each in there) <= ROOM[part] * memory
    assert pipe.residence.text_tower == ("host" if text_tower == "host" else "drop")


@pytest.mark.parametrize("text_tower", ["drop", "host"])
@pytest.mark.parametrize("limit", LIMITS)
def test_what_is_read_again_where_memory_is_short(limit, text_tower, opened, monkeypatch):
    memory, *prompts = LIMITS[limit]
    short_of(monkeypatch, memory(**residence("keep").sizes))
    pipe, loads = opened(text_tower)
    seen: list[str] = []
    for mode, expected in zip(("image_to_video", "text_to_video", "image_to_video"), prompts, strict=True):
        video(pipe, mode)
        if text_tower == "host":  # what left waits there
            expected = [part for part in dict.fromkeys(expected) if part not in seen]
        assert loads == expected
        seen += loads
        loads.clear()


def test_what_is_kept_stays_however_short_memory_is(opened, kept, monkeypatch):
    short_of(monkeypatch, 1)
    pipe, loads = opened("keep")
    np.testing.assert_array_equal(video(pipe, "image_to_video"), kept("image_to_video", 1, 1))
    assert loads == ["und", "gen", "vae"]


# The sound decoder


@pytest.mark.parametrize(("cfg", "tp"), MESHES)
@pytest.mark.parametrize(
    ("text_tower", "at_once", "silent", "first", "second"),
    [
        ("keep", ["und", "gen", "vae"], [], ["sound"], []),
        ("drop", [], ["und", "gen", "vae"], ["und", "sound"], ["und"]),
        ("host", [], ["und", "gen", "vae"], ["sound"], []),
    ],
)
def test_the_sound_decoder_comes_at_the_first_sound_and_stays(
    cfg, tp, text_tower, at_once, silent, first, second, opened, pipes
):
    expected = both(pipes("small", cfg=cfg, tp=tp))
    devices, (pipe, loads) = Devices(cfg, tp), opened(text_tower, cfg, tp)
    assert loads == at_once
    loads.clear()
    video(pipe)
    assert loads == silent
    assert "sound" not in devices.networks()
    for again in (first, second):
        loads.clear()
        found = both(pipe)
        assert loads == again
        assert devices.networks() == {"gen", "vae", "sound"} | ({"und"} if text_tower == "keep" else set())
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("text_tower", ["auto", "drop", "host"])
@pytest.mark.parametrize(("cfg", "tp"), MESHES)
def test_the_sound_decoder_takes_its_turn_where_memory_is_short(cfg, tp, text_tower, opened, pipes, monkeypatch):
    expected = both(pipes("small", cfg=cfg, tp=tp))
    short_of(monkeypatch, 1)
    devices, (pipe, loads) = Devices(cfg, tp), opened(text_tower, cfg, tp)
    seen = whenever_brought(pipe, devices, monkeypatch)
    for _ in range(2):
        for x, y in zip(both(pipe), expected, strict=True):
            np.testing.assert_array_equal(x, y)
    order = ["und", "gen", "vae", "sound"] * 2
    assert seen == [(part, {part}) for part in order]
    assert loads == (order[:4] if text_tower == "host" else order)
    if text_tower == "host":
        assert pipe.residence.on_host.keys() == {"und", "gen", "vae", "sound"}


def test_the_sound_decoder_makes_room_and_leaves_for_others(opened, monkeypatch):
    """Two thirds of the memory hold the decoders of the video and of the sound, but no tower beside them."""
    sizes = residence("keep").sizes
    assert sizes["sound"] < min(sizes["und"], sizes["gen"])
    short_of(monkeypatch, 1.5 * (sizes["vae"] + sizes["sound"]) + 2)
    pipe, loads = opened("drop")
    both(pipe)
    assert pipe.residence.on_devices.keys() == {"vae", "sound"}
    loads.clear()
    video(pipe)
    assert loads == ["und", "gen", "vae"]
    assert "sound" not in pipe.residence.on_devices


def test_the_sound_decoder_is_counted(monkeypatch):
    without = abstract()._replace(sound=None)
    assert list(without.by_name()) == ["und", "gen", "vae"]
    total = sum(nbytes(network) for network in without.by_name().values())
    short_of(monkeypatch, 1.5 * total + 2)
    assert Residence(None, without, make_mesh()).text_tower == "keep"
    assert residence().text_tower == "drop"


def test_the_sound_decoder_is_float32_whatever_the_dtype():
    parts = abstract_networks(cases.FAMILIES["small"], cases.VAE, make_mesh(), "bfloat16", TINY_SOUND).by_name()
    assert {w.dtype.name for w in by_path(parts["sound"].weights).values()} == {"float32"}


def test_a_pipeline_without_sound_has_no_sound_decoder(folders, monkeypatch):
    pipe = Cosmos3Pipeline.from_pretrained(folders("small"), mesh=make_mesh(), sound=False, progress=False)
    assert pipe.residence.sizes.keys() == {"und", "gen", "vae"}
    with pytest.raises(InputError, match="no sound tokenizer, or was loaded with sound=False"):
        both(pipe)


# What is chosen, and said


@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (1, 2), (2, 4), (1, 8)])
def test_auto_keeps_what_fits_into_two_thirds(cfg, tp, monkeypatch):
    total = sum(residence("keep", cfg, tp).sizes.values())
    for memory, expected in [
        (None, "keep"),
        (1.5 * total + 2, "keep"),
        (1.5 * total - 2, "drop"),
        (total, "drop"),
        (1, "drop"),
    ]:
        short_of(monkeypatch, memory)
        assert residence("auto", cfg, tp).text_tower == expected
        for text_tower in ("keep", "drop", "host"):
            assert residence(text_tower, cfg, tp).text_tower == text_tower  # what was asked for is not judged


def test_sizes_are_those_of_one_device():
    whole, part = residence(), residence(cfg=2, tp=4)
    assert whole.sizes == {name: nbytes(network) for name, network in abstract().by_name().items()}
    assert (part.sizes["vae"], part.sizes["sound"]) == (whole.sizes["vae"], whole.sizes["sound"])
    assert all(whole.sizes[tower] / 4 < part.sizes[tower] < whole.sizes[tower] for tower in ("und", "gen"))


@pytest.mark.parametrize("text_tower", ["", "Keep", "gpu", "auto ", None, True, 0, ["keep"]], ids=repr)
def test_another_word_is_refused_before_anything_is_read(text_tower, opened, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match=r"^text_tower=.*: one of auto, keep, host, drop is expected$"):
        opened(text_tower)


def test_host_needs_memory_that_the_devices_reach(opened, monkeypatch):
    monkeypatch.setattr(networks, "HOST", "nowhere")
    with pytest.raises(
        InputError, match=r'^text_tower="host": these devices cannot reach memory of the kind nowhere; use "drop"'
    ):
        opened("host")


@pytest.mark.parametrize(
    ("text_tower", "memory", "words"),
    [
        ("auto", None, "keep (all weights take 0.00849 GB of each device)"),
        ("drop", None, "drop (all weights take 0.00849 GB of each device)"),
        ("auto", 80e9, "keep (all weights take 0.00849 of 80 GB of each device)"),
    ],
)
def test_the_reason_in_words(text_tower, memory, words, monkeypatch):
    short_of(monkeypatch, memory)
    assert str(residence(text_tower)) == words

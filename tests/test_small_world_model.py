"""How the small world's model is trained and written; the training itself takes hours, and is no test."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.small_world import autoencoders, measure, train
from benchmarks.small_world.film import CLIP
from benchmarks.small_world.film import sound as tone
from benchmarks.small_world.judge import look, right
from benchmarks.small_world.prompts import prompts
from benchmarks.small_world.scene import TWO, is_held_out, read
from cosmos3_jax import Cosmos3Pipeline
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.checkpoint import BUILT_IN, Checkpoint, load
from cosmos3_jax.flags import BUILT_IN_DEFAULTS
from cosmos3_jax.networks import abstract_networks, abstract_sound_encoder


def quadratic(x, batch, key):
    return jnp.mean(jnp.square(x["a"] - batch + 0.01 * jax.random.normal(key)))


def draw(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(4).astype(np.float32) + 3


def test_a_fit_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoders, "EVERY", 7)
    start = {"a": jnp.zeros(4)}
    whole = autoencoders.fit(start, quadratic, draw, 40, 0.3, kept=tmp_path / "whole.fit")

    def stops(step: int) -> np.ndarray:
        if step == 17:
            raise KeyboardInterrupt
        return draw(step)

    with pytest.raises(KeyboardInterrupt):
        autoencoders.fit(start, quadratic, stops, 40, 0.3, kept=tmp_path / "stopped.fit")
    began = []
    gone_on = autoencoders.fit(
        start, quadratic, lambda step: began.append(step) or draw(step), 40, 0.3, kept=tmp_path / "stopped.fit"
    )
    assert began[0] == 14
    assert np.array_equal(gone_on["a"], whole["a"])
    assert np.any(np.asarray(whole["a"]) > 0.1)  # on the way to 3; the average of the weights is slow


def test_what_is_written_is_what_was_trained(tmp_path):
    modules = {
        "und": train.UndTower(train.TRANSFORMER_CONFIG),
        "gen": train.GenTower(train.TRANSFORMER_CONFIG),
        "vae": train.VAE(train.VAE_CONFIG),
        "sound": train.SoundDecoder(train.SOUND_CONFIG),
        "sound_encoder": train.SoundEncoder(train.SOUND_CONFIG.encoder),
    }
    trained = {part: train.values(train.fresh(module, seed)) for seed, (part, module) in enumerate(modules.items())}
    random = np.random.default_rng(0)  # biases begin with 0, which is what a file has where nothing is written
    trained = jax.tree.map(lambda x: np.asarray(x) + 0.1 * random.standard_normal(x.shape, np.float32), trained)
    train.write(tmp_path / "made", train.VAE_CONFIG, trained, BUILT_IN / "text_tokenizer")
    checkpoint = Checkpoint.open(tmp_path / "made", sound_encoder=True)
    mesh, sound = make_mesh(), checkpoint.sound
    networks = abstract_networks(checkpoint.transformer, checkpoint.vae, mesh, "float32", sound).by_name()
    networks["sound_encoder"] = abstract_sound_encoder(sound.encoder, mesh)
    weights = checkpoint.audited(networks)
    for part, network in networks.items():
        read = train.values(load(weights, part, network))
        assert read.keys() == trained[part].keys()
        for path, expected in trained[part].items():
            np.testing.assert_allclose(read[path], expected, rtol=0.02, atol=1e-6, err_msg=path)  # bfloat16, twice in a norm
    assert sum(file.stat().st_size for file in (tmp_path / "made").rglob("*") if file.is_file()) < 12e6


def test_a_stage_goes_on_and_its_times_add_up(tmp_path):
    work = train.Work(tmp_path)

    def stopped():
        raise KeyboardInterrupt

    work.tell("vae", 100)
    with pytest.raises(KeyboardInterrupt):
        work.stage("vae", stopped)
    assert [file.name for file in tmp_path.iterdir()] == [train.RECORD]
    made = work.stage("vae", lambda: {"w": jnp.arange(3.0), "n": 2})
    again = train.Work(tmp_path).stage("vae", stopped)
    for each in (made, again):
        np.testing.assert_array_equal(each["w"], [0, 1, 2])
        assert each["n"] == 2
    work.tell("vae", 20)
    assert json.loads((tmp_path / train.RECORD).read_text())["seconds"] == {"vae": 120}


@pytest.mark.parametrize(("seed", "two", "share"), [(4, TWO, 0.2), (8, 1, 1)], ids=["films", "pairs"])
def test_nothing_that_is_held_out_is_trained_on(seed, two, share):
    drawn = list(train.scenes(100, seed, two))
    assert np.mean([len(scene.things) == 2 for scene, _, _ in drawn]) == pytest.approx(share, abs=0.1)
    for scene, text, film_thwc in drawn:
        assert not is_held_out(scene)
        assert not is_held_out(read(text))
        assert film_thwc.shape == (CLIP.num_frames, CLIP.height, CLIP.width, 3)


def test_the_first_video_shows_what_its_prompt_says():
    result = Cosmos3Pipeline.from_pretrained(BUILT_IN, progress=False)(**BUILT_IN_DEFAULTS, progress=False)
    assert right(read(BUILT_IN_DEFAULTS["prompt"]), look(measure.frames_of(result)))["all"]


def test_crops_are_of_the_things_mostly():
    crops = autoencoders.crops(40, autoencoders.SHORT, seed=0, step=0)
    assert crops.shape == (40, autoencoders.SHORT, autoencoders.CROP, autoencoders.CROP, 3)
    assert np.abs(crops).max() <= 1
    assert np.array_equal(crops, autoencoders.crops(40, autoencoders.SHORT, seed=0, step=0))
    assert not np.array_equal(crops, autoencoders.crops(40, autoencoders.SHORT, seed=0, step=1))
    bright = (crops.max(axis=-1) > autoencoders.BRIGHT).any(axis=(1, 2, 3))
    assert bright.mean() > 0.6


class Told:
    """A model that does what it is told, but for guidance: without it everything is upside down, and silent."""

    @classmethod
    def from_pretrained(cls, folder, *, progress):
        return cls()

    def __call__(self, text, *, image, guidance_scale, seed, **settings):
        (prompt,) = (prompt for prompt in prompts() if (prompt.text, prompt.seed) == (text, seed))
        video, loud = prompt.film() / np.float32(255), np.float32(guidance_scale > 1)
        assert (settings["num_frames"], settings["height"], settings["width"]) == (CLIP.num_frames, CLIP.height, CLIP.width)
        assert image is None or np.array_equal(np.asarray(image), prompt.first_frame())
        return types.SimpleNamespace(
            video=video if loud else video[:, ::-1], sound=loud * tone(prompt.scene, 16_000), sample_rate=16_000
        )


def test_what_is_measured_goes_into_a_table_and_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "Cosmos3Pipeline", Told)
    record, sheet = tmp_path / "world.json", tmp_path / "world.webp"
    measure.main(["--every", "6", "--out", str(record), "--sheet", str(sheet)])
    found, printed = json.loads(record.read_text()), capsys.readouterr().out
    assert (found["kind"], found["sheet"]) == ("small_world", "world.webp")
    for name, row in found["rows"].items():
        assert [int(group.split()[0]) for group in row] == [10, 6, 3, 1]
        if "guidance scale 1" not in name:
            assert set(row.values()) == {100}, name
            assert f"| {name} | 100 % | 100 % | 100 % | 100 % |" in printed
    unguided = {name.split(": ")[1]: row["10 prompts"] for name, row in found["rows"].items() if "scale 1" in name}
    assert unguided["pitch"] == 0
    assert unguided["direction"] < 80  # what moves up moves down
    with Image.open(sheet) as picture:
        assert picture.width > 5 * CLIP.width

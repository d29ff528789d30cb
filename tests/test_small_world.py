"""The small world: what is drawn is what is told, and the judge finds it, though not where it is not."""

import collections
import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from PIL import Image

from benchmarks.small_world import show, validate
from benchmarks.small_world.film import (
    CLIP,
    OUTLINES,
    PITCH,
    PIXELS_PER_SECOND,
    STEP,
    Clip,
    background,
    coverage,
    frames,
    sound,
)
from benchmarks.small_world.judge import largest_part, look, pitch, right, semitones
from benchmarks.small_world.prompts import prompts
from benchmarks.small_world.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    VALUES,
    WORDS,
    Scene,
    Thing,
    caption,
    draw_scene,
    is_held_out,
    read,
)

BALL = Thing("ball", "red", "right", "small", "fast")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def alone(thing: Thing, behind: str = "plain", **changes: str | None) -> Scene:
    return Scene((dataclasses.replace(thing, **changes),), behind)


def kinds() -> list[Scene]:
    """All combinations of shape, colour and direction."""
    return [Scene((Thing(*values),)) for values in itertools.product(SHAPES, COLOURS, DIRECTIONS)]


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    random = rng()
    return [draw_scene(random) for _ in range(2000)]


def amounts(film_thwc: np.ndarray) -> np.ndarray:
    """How far each pixel is from a plain background, of a film of one thing."""
    return np.abs(film_thwc.astype(float) - background("plain", *film_thwc.shape[1:3])).sum(axis=-1)


# Scenes


def test_what_is_held_out_is_never_drawn(drawn):
    assert not any(is_held_out(scene) for scene in drawn)


def test_a_seventh_is_held_out_and_no_pair_of_values_more_than_once():
    held_out = [dataclasses.astuple(scene.things[0])[:3] for scene in kinds() if is_held_out(scene)]
    assert 0.12 < len(held_out) / len(kinds()) < 0.15
    for place, values in enumerate((SHAPES, COLOURS, DIRECTIONS)):
        others = [combination[:place] + combination[place + 1 :] for combination in held_out]
        assert len(set(others)) == len(others)
        assert {combination[place] for combination in held_out} == set(values)


def test_one_thing_held_out_holds_the_scene_out():
    held_out = next(scene.things[0] for scene in kinds() if is_held_out(scene))
    assert not is_held_out(Scene((BALL,)))
    assert is_held_out(Scene((BALL, held_out)))
    assert is_held_out(Scene((held_out, BALL)))


def test_every_value_and_every_pair_is_drawn_often(drawn):
    things = [thing for scene in drawn for thing in scene.things]
    for values, name in [(SIZES, "size"), (SPEEDS, "speed")]:
        often = collections.Counter(getattr(thing, name) for thing in things if thing.direction != "still")
        assert set(often) == set(values)
        assert min(often.values()) > 0.45 * often.total()
    assert {thing.speed for thing in things if thing.direction == "still"} == {None}
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert 0.2 < np.mean([len(scene.things) == 2 for scene in drawn]) < 0.3
    for one, other in [("shape", "colour"), ("shape", "direction"), ("colour", "direction")]:
        often = collections.Counter((getattr(thing, one), getattr(thing, other)) for thing in things)
        assert min(often.values()) > 0.6 * np.mean(list(often.values()))


def test_two_things_have_two_colours(drawn):
    assert all(len({thing.colour for thing in scene.things}) == len(scene.things) for scene in drawn)


# Captions


def test_captions_say_what_is_there_and_no_more(drawn):
    """What is read back is the scene, but for what is free, which is told about half of the time."""
    random, told, possible = rng(), collections.Counter(), collections.Counter()
    for scene in drawn:
        said = read(caption(scene, random))
        assert len(said.things) == len(scene.things)
        for part, whole in [(said, scene), *zip(said.things, scene.things, strict=True)]:
            for field in dataclasses.fields(part):
                if field.name != "things":
                    value, true = getattr(part, field.name), getattr(whole, field.name)
                    assert value == true or (value is None and field.name in ("size", "speed", "background"))
                    told[field.name] += value is not None
                    possible[field.name] += true is not None
    assert all(told[name] == possible[name] for name in ("shape", "colour", "direction"))
    assert all(0.45 < told[name] / possible[name] < 0.55 for name in ("size", "speed", "background"))


def test_every_word_is_used(drawn):
    random = rng()
    text = "\n".join(f" {caption(scene, random).lower().rstrip('.')}\n" for scene in drawn)
    assert all(f" {word}" in text for words in WORDS.values() for word in words)
    assert len(VALUES) == sum(map(len, WORDS.values()))  # no word has two meanings


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("a red ball rolls to the right", Scene((Thing("ball", "red", "right"),))),
        (
            "A red ball rolls slowly to the right over a striped background.",
            Scene((Thing("ball", "red", "right", None, "slow"),), "striped"),
        ),
        ("A little blue square moves up.", Scene((Thing("square", "blue", "up", "small"),))),
        (
            "On a plain background, a green star stands still while a big white triangle goes left quickly",
            Scene((Thing("star", "green", "still"), Thing("triangle", "white", "left", "large", "fast")), "plain"),
        ),
    ],
)
def test_captions_are_read(text, scene):
    assert read(text) == scene


def test_the_first_prompt_of_the_readme_is_a_caption_of_what_was_trained_on():
    random = rng()
    scene = alone(BALL, speed="slow")
    assert not is_held_out(scene)
    assert "a red ball rolls to the right" in {caption(scene, random) for _ in range(500)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a ball",
        "a red ball",
        "a red ball rolls",
        "a pink ball rolls up",
        "a red ball rolls up and",
        "a red ball slides up slowly slowly down",
        "a red ball moves up and a blue ball moves up and a white ball moves up",
    ],
)
def test_what_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="not a caption of the small world"):
        read(text)


# Films


def test_the_same_seed_gives_the_same_film_and_words(drawn):
    for scene in drawn[:5]:
        assert np.array_equal(frames(scene, rng(1)), frames(scene, rng(1)))
        assert not np.array_equal(frames(scene, rng(1)), frames(scene, rng(2)))
        assert caption(scene, rng(1)) == caption(scene, rng(1))
    assert draw_scene(rng(3)) == draw_scene(rng(3))


@pytest.mark.parametrize("clip", [CLIP, Clip(9, 64, 96, 12.0), Clip(1, 32, 48)])
def test_films_have_the_size_that_is_asked_for(clip):
    film_thwc = frames(alone(BALL, "striped"), rng(), clip)
    assert film_thwc.shape == (clip.num_frames, clip.height, clip.width, 3)
    assert film_thwc.dtype == np.uint8


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_smooth_and_where_they_should_be(shape):
    """Beside eight by eight points in each pixel; half a pixel's corner is what one distance cannot tell."""
    place = (np.arange(48 * 8) + 0.5) / 8 - 24.3
    sharp = coverage(shape, 8 * 36, 8 * place[None], 8 * place[:, None]) > 0.5
    expected = sharp.reshape(48, 8, 48, 8).mean(axis=(1, 3))
    place = place.reshape(48, 8).mean(axis=1)
    covered = coverage(shape, 36, place[None], place[:, None])
    assert np.abs(covered - expected).max() < 0.35
    assert np.abs(covered - expected).mean() < 0.0025
    assert covered.sum() == pytest.approx(OUTLINES[shape].area * 36**2, rel=0.01)


@pytest.mark.parametrize("clip", [CLIP, Clip(25, 256, 192, 24.0), Clip(13, 128, 128, 12.0)])
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("direction", [direction for direction in DIRECTIONS if direction != "still"])
def test_things_move_as_told(direction, speed, clip):
    amount_thw = amounts(frames(alone(BALL, direction=direction, speed=speed), rng(), clip))
    y_t = amount_thw.sum(axis=2) @ np.arange(clip.height) / amount_thw.sum(axis=(1, 2))
    x_t = amount_thw.sum(axis=1) @ np.arange(clip.width) / amount_thw.sum(axis=(1, 2))
    seconds = (clip.num_frames - 1) / clip.fps
    velocity = np.array([x_t[-1] - x_t[0], y_t[-1] - y_t[0]]) / seconds / clip.scale
    np.testing.assert_allclose(velocity, PIXELS_PER_SECOND[speed] * np.array(STEP[direction]), atol=0.1)


def test_what_stands_still_does():
    film_thwc = frames(alone(BALL, direction="still", speed=None), rng())
    assert (film_thwc == film_thwc[0]).all()


@pytest.mark.parametrize("clip", [CLIP, Clip(25, 96, 160)])
@pytest.mark.parametrize(("shape", "direction"), itertools.product(SHAPES, DIRECTIONS))
def test_things_stay_in_the_picture(shape, direction, clip):
    """None of a thing is ever lost: the background is at all edges, and the area is the same in all frames."""
    speed = None if direction == "still" else "fast"
    for seed in range(5):
        thing = Thing(shape, "red", direction, "large", speed)
        amount_thw = amounts(frames(Scene((thing,), "plain"), rng(seed), clip))
        assert not amount_thw[:, [0, -1]].any()
        assert not amount_thw[:, :, [0, -1]].any()
        area_t = amount_thw.sum(axis=(1, 2))
        np.testing.assert_allclose(area_t, area_t[0], rtol=0.02)  # of the corners, see above


def test_too_long_a_way_begins_in_the_picture_and_leaves_it():
    for direction in STEP:
        amount_thw = amounts(frames(alone(BALL, direction=direction), rng(), Clip(num_frames=73)))
        assert amount_thw[0].sum() == pytest.approx(amount_thw[10].sum(), rel=0.02)
        assert amount_thw[-1].any() == (direction == "still")


def test_two_things_do_not_hide_each_other(drawn):
    """As both of them are as large as on their own; in the few scenes where there is no room they may touch."""
    pairs = [scene for scene in drawn if len(scene.things) == 2][:60]
    hidden = 0
    for scene in pairs:
        pair = Scene(tuple(dataclasses.replace(thing, colour="white") for thing in scene.things), "plain")
        singles = [Scene((thing,), "plain") for thing in pair.things]
        area = sum(amounts(frames(single, rng(), Clip(1))).sum() for single in singles)
        hidden += (amounts(frames(pair, rng())).sum(axis=(1, 2)) < 0.97 * area).any()
    assert hidden <= 3


def test_what_a_scene_leaves_free_cannot_be_painted():
    with pytest.raises(KeyError):
        frames(read("a red ball rolls to the right over a plain background"), rng())


# Sounds


@pytest.mark.parametrize("sample_rate", [16_000, 48_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sound_is_as_high_as_the_first_thing_says(shape, sample_rate):
    wave_cn = sound(Scene((Thing(shape, "red", "left"), BALL)), sample_rate, sample_rate)
    assert wave_cn.shape == (2, sample_rate)
    assert wave_cn.dtype == np.float32
    assert 0.4 < np.abs(wave_cn).max() < 0.6
    assert (wave_cn[0] == wave_cn[1]).all()
    assert abs(semitones(pitch(wave_cn, sample_rate), PITCH[shape])) < 0.1
    np.testing.assert_allclose(wave_cn[:, sample_rate // 25 :], wave_cn[:, : -sample_rate // 25], atol=1e-4)  # float32
    assert len(sound(alone(BALL), 100, channels=1)) == 1


def test_pitches_are_more_than_two_semitones_apart():
    pitches = sorted(PITCH.values())
    assert min(semitones(low, high) for low, high in itertools.pairwise(pitches)) > 2
    assert all(hertz % 25 == 0 for hertz in pitches)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loud", [(1.0, 0.0, 0.0), (0.3, 1.0, 0.2), (0.3, 0.4, 1.0)])
def test_a_pitch_is_told_by_the_lowest_harmonic_in_noise_too(shape, loud):
    phase = 2 * np.pi * PITCH[shape] * np.arange(16_667) / 16_000
    wave = sum(each * np.sin(times * phase + times) for times, each in enumerate(loud, 1)) + 0.2 * rng().standard_normal(16_667)
    assert abs(semitones(pitch(wave[None] / 4 + 0.1, 16_000), PITCH[shape])) < 0.1


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(16_000),
        np.ones(16_000),
        np.full(16_000, np.nan),
        rng().standard_normal(16_000),
        np.cumsum(rng().standard_normal(16_000)) / 100,
        np.sin(np.cumsum(np.linspace(0.1, 0.3, 16_000))),
        np.sin(0.1 * np.arange(800)),
    ],
    ids=["silence", "constant", "nan", "white", "brown", "rising", "short"],
)
def test_what_has_no_clear_tone_has_no_pitch(wave):
    assert pitch(wave[None], 16_000) is None


# The judge


@pytest.mark.parametrize("things", [1, 2])
@pytest.mark.parametrize("damage", [name for name in validate.DAMAGES if name != "H.264"])
def test_the_judge_finds_what_is_there(damage, things):
    """All of it. `validate` measures this on more scenes, and after H.264."""
    share, wrong = validate.accuracy(validate.DAMAGES[damage], 12, things)
    assert share == 1, wrong


@pytest.mark.parametrize("kind", [name for name in validate.NO_SCENES if name != "another scene"])
def test_what_is_not_there_is_not_found(kind):
    assert validate.mistaken(validate.NO_SCENES[kind], 12)["all"] == 0


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"shape": "star"}, "shape"),
        ({"colour": "blue"}, "colour"),
        ({"direction": "left"}, "direction"),
        ({"direction": "still", "speed": None}, "direction"),
        ({"size": "large"}, "size"),
        ({"speed": "slow"}, "speed"),
        ({"behind": "striped"}, "background"),
    ],
)
def test_one_wrong_answer_is_told_apart(change, wrong):
    answers = right(alone(BALL), look(frames(alone(BALL, **change), rng())))
    names = {"shape", "colour", "direction", "size", "speed", "background", "all"}
    allowed = {wrong, "all"} | ({"speed"} if change.get("direction") == "still" else set())
    assert set(answers) == names
    assert {name for name, answer in answers.items() if not answer} == allowed


def test_what_a_caption_leaves_free_may_be_anything():
    for size, speed, behind in itertools.product(SIZES, SPEEDS, BACKGROUNDS):
        view = look(frames(alone(BALL, behind, size=size, speed=speed), rng()))
        assert right(read("a red ball rolls right"), view) == dict.fromkeys(("shape", "colour", "direction", "all"), True)


def test_the_number_of_things_must_be_right():
    two = Scene((BALL, Thing("star", "blue", "still", "large")), "plain")
    assert not any(right(Scene((BALL,)), look(frames(two, rng()))).values())
    answers = right(two, look(frames(alone(BALL), rng())))
    assert [name for name, answer in answers.items() if answer] == ["background"]


@pytest.mark.parametrize("shown", [slice(0, 12), slice(4, 20)], ids=["goes", "comes_and_goes"])
def test_what_is_there_for_a_part_of_the_time_is_not_right(shown):
    film_thwc = np.repeat(background("plain", 128, 128)[None], 25, axis=0)
    film_thwc[shown] = frames(alone(BALL), rng())[shown]
    assert not any(right(Scene((BALL,)), look(film_thwc)).values())


def test_what_is_missed_in_a_few_frames_is_found():
    film_thwc = frames(alone(BALL), rng())
    film_thwc[10:14] = background("plain", 128, 128)
    view = look(film_thwc)
    assert right(alone(BALL), view)["all"]
    np.testing.assert_allclose(view.things[0].velocity, (PIXELS_PER_SECOND["fast"], 0), atol=0.5)


def test_another_thing_for_a_part_of_the_time_is_not_right():
    film_thwc = frames(alone(BALL), rng())
    film_thwc[5:15, 90:110, 10:30] = 44, 106, 240
    assert not any(right(Scene((BALL,)), look(film_thwc)).values())
    film_thwc[8:15, 90:110, 10:30] = film_thwc[0, 0, 0]
    assert right(Scene((BALL,)), look(film_thwc))["all"]  # three frames are nothing


@pytest.mark.parametrize(("before", "after"), itertools.permutations(SHAPES, 2))
def test_what_becomes_another_shape_has_none(before, after):
    films = [frames(alone(dataclasses.replace(BALL, shape=shape)), rng()) for shape in (before, after)]
    film_thwc = np.concatenate([films[0][:13], films[1][13:]])
    assert not any(right(alone(dataclasses.replace(BALL, shape=shape)), look(film_thwc))["shape"] for shape in SHAPES)


def test_two_alike_leave_open_which_one_is_meant():
    film_thwc = frames(alone(BALL), rng())
    film_thwc = np.where(amounts(film_thwc)[..., None] > 0, film_thwc, np.roll(film_thwc, 50, axis=1))
    assert not any(right(Scene((BALL,)), look(film_thwc)).values())


@pytest.mark.parametrize(
    "covers",
    [
        lambda x, y: (np.hypot(x, y) < 18) & (np.hypot(x, y) > 9),
        lambda x, y: (abs(x) < 24) & (abs(y) < 7),
        lambda x, y: ((abs(x) < 18) & (abs(y) < 6)) | ((abs(y) < 18) & (abs(x) < 6)),
        lambda x, y: (y > -12) & (y < 12) & (abs(x) < (12 - y) * 0.6),
        lambda x, y: np.hypot(x / 1.3, y * 1.3) < 18,
        lambda x, y: (abs(x) < 17) & (abs(y) < 12),
    ],
    ids=["ring", "bar", "cross", "triangle_on_its_tip", "ellipse", "oblong"],
)
def test_what_is_none_of_the_shapes_has_no_shape(covers):
    y, x = np.mgrid[:128, :128] - 60
    film_thwc = (
        np.where(covers(x, y)[..., None], (226, 52, 48), background("plain", 128, 128)).astype(np.uint8)[None].repeat(5, 0)
    )
    (seen,) = look(film_thwc).things
    assert (seen.shape, seen.colour, seen.direction) == (None, "red", "still")


def test_an_oblique_or_uneven_motion_has_no_direction():
    down = frames(alone(BALL, direction="down"), rng())
    oblique = [np.roll(frame, 2 * number, axis=1) for number, frame in enumerate(down)]
    there_and_back = [*down[:16], *down[14:5:-1]]
    for film in (oblique, there_and_back):
        assert look(np.stack(film)).things[0].direction is None


def test_one_frame_tells_all_but_motion():
    view = look(frames(alone(BALL), rng())[:1])
    assert right(alone(BALL), view) == {
        **dict.fromkeys(("shape", "colour", "size", "background"), True),
        **dict.fromkeys(("direction", "speed", "all"), False),
    }


def test_the_largest_part_of_each_frame():
    rows = (
        ["###..#.", "#.#..#.", "###.##.", "......#"],
        [".......", "..#....", ".#.....", "......."],
        ["##.##..", "##.##.."] + 2 * ["......."],
    )
    mask_thw = np.array([[[pixel == "#" for pixel in row] for row in picture] for picture in rows])
    part_thw, clear_t = largest_part(mask_thw, 2)
    assert clear_t.tolist() == [False, False, False]
    expected = np.zeros_like(mask_thw)
    expected[0, :3, :3] = mask_thw[0, :3, :3]
    expected[2, :2, :2] = True
    assert (part_thw == expected).all()
    mask_thw[0, 2, 4:] = False
    assert largest_part(mask_thw, 2)[1].tolist() == [True, False, False]


# Prompts


def test_prompts_are_forty_and_twenty_held_out():
    assert [prompt.held_out for prompt in prompts()] == [False] * 40 + [True] * 20
    assert all(prompt.held_out == is_held_out(prompt.told) for prompt in prompts())
    assert len({prompt.text for prompt in prompts()}) == 60
    assert sum(len(prompt.told.things) == 2 for prompt in prompts()) == 4


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_balanced(held_out):
    things = [prompt.told.things[0] for prompt in prompts() if prompt.held_out == held_out]
    for name, values in [("shape", SHAPES), ("colour", COLOURS), ("direction", DIRECTIONS)]:
        often = collections.Counter(getattr(thing, name) for thing in things)
        assert set(often) == set(values)
        assert max(often.values()) <= 2 * min(often.values())


def test_prompts_can_be_done_and_begin_with_their_first_frames():
    for prompt in prompts()[::3]:
        film_thwc = prompt.film()
        assert (prompt.first_frame() == film_thwc[0]).all()
        assert right(prompt.told, look(film_thwc))["all"]


def test_prompts_are_always_the_same():
    """What was measured is comparable only while they are: a new number here is a new set of prompts."""
    assert hashlib.sha256("\n".join(prompt.text for prompt in prompts()).encode()).hexdigest()[:12] == "9171afa8963f"


# What is shown


def test_a_sheet_and_videos_are_written(tmp_path):
    show.main([str(tmp_path / "sheet.png"), "--count", "3"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 2 * show.SHOWN * 128
    show.main([str(tmp_path / "films"), "--count", "2"])
    assert len(list((tmp_path / "films").glob("0[01] *.mp4"))) == 2

"""Defaults by mode, and a sentence for every value that cannot be used."""

import ast
import dataclasses
import math
import re

import numpy as np
import pytest

from cosmos3_jax.config import (
    EDGE,
    NANO,
    SOUND_TOKENIZER,
    UNIPC,
    WAN_VAE,
    InputError,
    SchedulerConfig,
    SoundConfig,
    TransformerConfig,
)
from cosmos3_jax.errors import shown
from cosmos3_jax.request import Request, ResolvedRequest, resolve


def ask(transformer: TransformerConfig = NANO, sound: SoundConfig | None = SOUND_TOKENIZER, **settings) -> ResolvedRequest:
    return resolve(Request(**{"prompt": "a ball"} | settings), transformer, WAN_VAE, UNIPC, sound)


@pytest.mark.parametrize(("num_frames", "steps", "guidance", "shift"), [(189, 35, 6, 10), (5, 35, 6, 10), (1, 50, 4, 3)])
def test_defaults_of_a_video_and_of_an_image(num_frames, steps, guidance, shift):
    request = ask(num_frames=num_frames)
    assert (request.num_inference_steps, request.guidance_scale, request.flow_shift) == (steps, guidance, shift)
    assert request.metadata.is_image == (num_frames == 1)


def test_the_published_clip_is_asked_for():
    request = ask()
    assert dataclasses.astuple(request.metadata) == (189, 720, 1280, 24.0)
    assert (request.seed, request.sigmas, request.prompt_style, request.output_type) == (42, "native", "native", "np")


GIVEN = {
    "negative_prompt": "",
    "height": 32,
    "width": 48,
    "fps": 30,
    "num_inference_steps": 7,
    "guidance_scale": 2.5,
    "flow_shift": 1.5,
    "sigmas": "linear",
    "seed": 0,
    "prompt_style": "diffusers",
    "output_type": "latent",
    "steps_per_call": 3,
    "enable_sound": True,
}


@pytest.mark.parametrize("num_frames", [1, 5])
def test_what_was_asked_for_is_kept(num_frames):
    given = GIVEN | {"num_frames": num_frames, "latents": np.zeros((1, 48, 1 + num_frames // 4, 2, 3))}
    given["sound_latents"] = np.zeros((64, 1 if num_frames == 1 else 5))  # 25 a second, at 30 frames a second
    request = ask(**given)
    assert {name: getattr(request, name) for name in given} == given


@pytest.mark.parametrize(("scale", "guided"), [(-1, False), (0, False), (1, False), (1.001, True), (6, True)])
def test_guidance_is_on_above_one(scale, guided):
    assert ask(guidance_scale=scale).guided == guided


def test_a_resolved_request_is_itself():
    request = ask(num_frames=1)
    assert resolve(request, NANO, WAN_VAE) is request


@pytest.mark.parametrize(("name", "sizes"), [("num_frames", range(1, 100, 4)), ("height", range(16, 100, 16))])
def test_a_refused_size_offers_its_neighbours(name, sizes):
    for value in sizes:
        assert getattr(ask(**{name: value}), name) == value
    for value in set(range(1, 80)) - set(sizes):
        neighbours = [size for size in sizes if size < value][-1:] + [size for size in sizes if size > value][:1]
        with pytest.raises(InputError, match=f"^{name}={value}\\b.*; use {' or '.join(map(str, neighbours))}$"):
            ask(**{name: value})


NO_NUMBERS = [True, "8", math.nan, math.inf, -math.inf, [5], 5j]


@pytest.mark.parametrize("name", ["num_frames", "height", "width", "num_inference_steps", "steps_per_call", "seed"])
def test_whole_numbers(name):
    least = 0 if name == "seed" else 1
    for value in [least - 1, -7, 5.0, *NO_NUMBERS]:
        expected = f"{name}={value!r}: a whole number of at least {least} is expected"
        with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
            ask(**{name: value})


@pytest.mark.parametrize(
    ("name", "low", "high", "values"),
    [
        ("fps", 0.1, 1000, [0, -24.0, 1e300, np.float32("inf")]),
        ("flow_shift", 0.01, 1000, [0.0, -1, 10**400]),
        ("guidance_scale", -1000, 1000, [1e300, np.float32("nan")]),
    ],
)
def test_numbers_within_a_range(name, low, high, values):
    assert getattr(ask(**{name: np.float32(2.5)}), name) == 2.5
    for value in values + NO_NUMBERS:
        expected = f"{name}={shown(value)}: a number from {low} to {high} is expected"
        with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
            ask(**{name: value})


@pytest.mark.parametrize("name", ["num_frames", "height", "width", "fps", "seed", "steps_per_call", "sigmas", "prompt"])
def test_only_what_has_a_default_by_mode_may_be_none(name):
    with pytest.raises(InputError, match=rf"^{name}\b.* expected"):
        ask(**{name: None})


CLIP = {"video": "clip.mp4", "num_frames": 9}
REFUSED = [
    ({"num_frames": 10}, "num_frames=10: one frame and then groups of 4 are made; use 9 or 13"),
    ({"height": 100}, "height=100 is not a multiple of 16; use 96 or 112"),
    ({"width": 8}, "width=8 is not a multiple of 16; use 16"),
    ({"seed": 2**32}, "seed=4294967296: at most 4294967295 is possible"),
    ({"sigmas": "cosine"}, "sigmas='cosine': one of native, linear, karras is expected"),
    ({"prompt_style": ""}, "prompt_style='': one of native, diffusers is expected"),
    ({"output_type": "pt"}, "output_type='pt': one of np, pil, latent is expected"),
    ({"condition_video_keep": "middle"}, "condition_video_keep='middle': one of first, last is expected"),
    ({"prompt": ["a ball"]}, "prompt: a string is expected, not list"),
    ({"negative_prompt": b"rain"}, "negative_prompt: a string is expected, not bytes"),
    (CLIP | {"image": "a.png"}, "image and video together: give an image to start from, or a clip to go on from, not both"),
    ({"image": "a.png", "num_frames": 1}, "image with num_frames=1 leaves nothing to generate; ask for 5 frames or more"),
    ({"video": "a.mp4", "num_frames": 1}, "video with num_frames=1 leaves nothing to generate; ask for 5 frames or more"),
    (CLIP | {"condition_frame_indexes_vision": (0, 3)}, "[0, 3]: 9 frames have the latent frames 0 to 2"),
    ({"num_frames": 5, "latents": np.zeros((48, 2, 45, 80))}, "shape [48, 2, 45, 80] should be [1, 48, 2, 45, 80]"),
    ({"num_frames": 5, "latents": np.zeros((1, 48, 5, 45, 80))}, "[1, 48, 5, 45, 80] should be [1, 48, 2, 45, 80]"),
    ({"latents": "noise"}, "latents: an array of finite real numbers is expected"),
    ({"latents": [[1.0], [1.0, 2.0]]}, "latents: an array of finite real numbers is expected"),
    ({"latents": np.full((1, 48, 48, 45, 80), np.nan)}, "latents: an array of finite real numbers is expected"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refused(settings, sentence):
    with pytest.raises(InputError, match=f"{re.escape(sentence)}$"):
        ask(**settings)


# Sound

SOUND = {"enable_sound": True}
TOO_SHORT = {"num_frames": 1, "fps": 1000, "sound": SoundConfig(sampling_rate=999)}
NO_SOUND = [
    (SOUND | {"transformer": EDGE}, "this checkpoint has no sound heads; leave it out, or take Cosmos3-Nano or -Super"),
    (SOUND | {"sound": None}, "this checkpoint has no sound tokenizer, or was loaded with sound=False; leave it out"),
    (
        SOUND | {"num_frames": 40_001, "height": 16, "width": 16, "fps": 0.1},
        "num_frames=40001 at fps=0.1 are 10000250 sound latents, 1048576 are possible; take a higher fps",
    ),
    (SOUND | TOO_SHORT, "num_frames=1 at fps=1000 are too short for any sound"),
]
NO_SOUND_IDS = "no heads", "no tokenizer", "too long", "too short"


@pytest.mark.parametrize(("settings", "reason"), NO_SOUND, ids=NO_SOUND_IDS)
@pytest.mark.parametrize("latents", [None, np.zeros((64, 197))], ids=["noise", "latents"])
def test_sound_that_cannot_be_made(settings, reason, latents):
    with pytest.raises(InputError, match=f"^enable_sound: {re.escape(reason)}"):
        ask(**settings, sound_latents=latents)


@pytest.mark.parametrize("settings", [settings for settings, _ in NO_SOUND], ids=NO_SOUND_IDS)
def test_who_asks_for_no_sound_is_not_told_of_it(settings):
    request = ask(**settings | {"enable_sound": False})
    assert request.sound_frames(settings.get("sound", SOUND_TOKENIZER)) == 0


@pytest.mark.parametrize("value", [None, 0, 1, "yes", "", [True], np.array([True, False])], ids=repr)
def test_sound_is_asked_for_by_true_or_false(value):
    with pytest.raises(InputError, match=f"^{re.escape(f'enable_sound={value!r}: True or False is expected')}$"):
        ask(enable_sound=value)


@pytest.mark.parametrize("value", [True, np.True_], ids=repr)
def test_numpys_true_is_true(value):
    assert ask(enable_sound=value).sound_frames(SOUND_TOKENIZER) == 197


@pytest.mark.parametrize("settings", [{}, {"transformer": EDGE}, {"sound": None}], ids=["nano", "edge", "no tokenizer"])
def test_sound_latents_alone_are_refused(settings):
    with pytest.raises(InputError, match=r"^sound_latents without enable_sound: ask for sound, or leave them out$"):
        ask(**settings, sound_latents=np.zeros((64, 197)))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.zeros((64, 196)), "shape [64, 196] should be [64, 197]"),
        (np.zeros((197, 64)), "shape [197, 64] should be [64, 197]"),
        (np.zeros((1, 64, 197)), "shape [1, 64, 197] should be [64, 197]"),
        (0.5, "shape [] should be [64, 197]"),
        (np.full((64, 197), np.nan), "an array of finite real numbers is expected"),
        (np.full((64, 197), np.inf), "an array of finite real numbers is expected"),
        (np.full((64, 197), 1e39), "an array of finite real numbers is expected"),  # as float32, which it becomes
        (np.zeros((64, 197), complex), "an array of finite real numbers is expected"),
        (np.zeros((64, 197), bool), "an array of finite real numbers is expected"),
        ([[1.0], [1.0, 2.0]], "an array of finite real numbers is expected"),
        ("noise", "an array of finite real numbers is expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sound_latents_of_the_wrong_kind(value, sentence):
    with pytest.raises(InputError, match=f"^{re.escape(f'sound_latents: {sentence}')}$"):
        ask(**SOUND, sound_latents=value)


def test_sound_latents_have_the_tokenizers_channels():
    value = np.zeros((8, 197))
    assert ask(**SOUND, sound=SoundConfig(vocoder_input_dim=8), sound_latents=value).sound_latents is value


@pytest.mark.parametrize(
    "sound", [SOUND_TOKENIZER, SoundConfig(hop_size=1920), SoundConfig(44100, hop_size=1000), SoundConfig(dec_strides=(2, 3))]
)
def test_sound_lasts_as_long_as_the_reference_makes_it(sound):
    # pipeline_cosmos3_omni.py, `prepare_latents`, and `_hop_size` of the audio tokenizer, to the letter.
    hop_size = sound.hop_size if sound.hop_size is not None else math.prod(sound.dec_strides)
    for num_frames in [*range(1, 400, 4), 1001, 14_401]:
        # The last ones: a sample more than whole latents, which rounding makes or does not.
        a_sample_more = [sound.sampling_rate * num_frames / (k * hop_size + 1) for k in range(1, 10)]
        for fps in [0.1, 1, 7.3, 12, 16, 23.976, 24, 24.0, 25, 29.97, 30, 59.94, 60, 1000, *a_sample_more]:
            n_audio_samples = int(num_frames / fps * sound.sampling_rate)
            frames = (n_audio_samples + hop_size - 1) // hop_size
            assert sound.latent_frames(num_frames, fps) == frames
    assert ask(**SOUND, num_frames=97, fps=29.97, sound=sound).sound_frames(sound) == sound.latent_frames(97, 29.97)


@pytest.mark.parametrize(
    ("num_frames", "fps", "frames"), [(189, 24, 197), (1, 24, 2), (121, 30, 101), (121, 24, 127), (25, 25, 25), (97, 29.97, 81)]
)
def test_25_latents_a_second_that_cover_the_video(num_frames, fps, frames):
    assert ask(**SOUND, num_frames=num_frames, fps=fps).sound_frames(SOUND_TOKENIZER) == frames


def test_without_sound_there_are_no_sound_latents():
    assert ask().sound_frames(SOUND_TOKENIZER) == ask(**SOUND).sound_frames(None) == 0


@pytest.mark.parametrize("indexes", [(), (-1,), (0, 1.0), "01", ("0",), 0, None], ids=repr)
def test_indexes_that_are_no_latent_frames(indexes):
    expected = f"condition_frame_indexes_vision={indexes!r}: latent frames are expected, such as [0, 1]"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        ask(**CLIP, condition_frame_indexes_vision=indexes)


@pytest.mark.parametrize("indexes", [(0,), [2], range(3), np.array([0, 2])], ids=repr)
def test_indexes_of_latent_frames(indexes):
    assert ask(**CLIP, condition_frame_indexes_vision=indexes).condition_frame_indexes_vision == tuple(indexes)


def test_karras_says_that_flow_shift_has_no_effect():
    with pytest.warns(UserWarning, match=r'^flow_shift=5.0 has no effect with sigmas="karras"$'):
        ask(sigmas="karras", flow_shift=5.0)
    ask(sigmas="karras")  # nothing to say: a warning would be an error here


DISTILLED = SchedulerConfig(distilled_sigmas=(1.0, 0.9375, 0.8333333333333334, 0.625))


@pytest.mark.parametrize("num_frames", [1, 189])
@pytest.mark.parametrize("settings", [{}, {"num_inference_steps": 4, "guidance_scale": 1}], ids=["left out", "as it is"])
def test_a_distilled_checkpoint_fixes_steps_and_guidance(num_frames, settings):
    request = resolve(Request("a ball", num_frames=num_frames, **settings), NANO, WAN_VAE, DISTILLED)
    assert (request.num_inference_steps, request.guidance_scale, request.guided) == (4, 1, False)


@pytest.mark.parametrize("setting", ["num_inference_steps=35", "guidance_scale=6.0", "flow_shift=3.0", "sigmas='linear'"])
def test_a_distilled_checkpoint_takes_nothing_else(setting):
    name, value = setting.split("=")
    request = Request("a ball", **{name: ast.literal_eval(value)})
    with pytest.raises(InputError, match=rf"^{re.escape(setting)}: this checkpoint is distilled for .*; leave it out$"):
        resolve(request, NANO, WAN_VAE, DISTILLED)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_bytes_that_are_no_text_are_refused(name):
    with pytest.raises(InputError, match=f"^{name}: not valid UTF-8 text"):
        ask(**{name: "caf\udce9"})
    assert getattr(ask(**{name: "café 漢字 🙂"}), name) == "café 漢字 🙂"

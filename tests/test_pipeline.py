"""The whole plot: equal to the reference in every mode, compiled once, and what comes back."""

import dataclasses
import functools
import inspect
import wave
from unittest import mock

import cases
import jax
import numpy as np
import pytest
from metrics import errors, outputs, random, sample

from cosmos3_jax import (
    BlockedError,
    Cosmos3Pipeline,
    InputError,
    OutOfMemoryError,
    Request,
    RunError,
    ffmpeg,
    media,
    pipeline,
    result_files,
    sampler,
)
from cosmos3_jax.models.transformer import UndTower
from cosmos3_jax.pipeline import encode

SMALL = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 3, "progress": False}
WITH_SOUND = SMALL | {"enable_sound": True}
SOUND = (8, 6)  # 5 frames of 24 a second are 5.2 latents of 25 a second, of 1,920 samples each


@pytest.fixture(scope="module")
def ours(pipes):
    """`ours(family, dtype, case)`: what a case gives (metrics.outputs), run once."""

    @functools.cache
    def run(family: str, dtype: str, case: str) -> dict[str, np.ndarray]:
        return outputs(pipes(family, dtype), (cases.DISTILLED_CASES if family == "distilled" else cases.CASES)[case])

    return run


@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_equals_reference(family, case, ours, goldens):
    # Both sides add float32 in other orders; over four guided steps that comes to about 1e-5 of the standard deviation.
    expected = goldens(family)
    for output in cases.outputs_of(case):
        limit = 1e-4 if output == "sound" else 5e-5  # the sound decoder's sines amplify an error of its latents
        assert errors(ours(family, "float32", case)[output], expected[f"{case}.{output}"])[1] < limit


@pytest.mark.parametrize("case", cases.DISTILLED_CASES)
def test_distilled_equals_reference(case, ours, goldens):
    for output in ("latents", "video"):
        assert errors(ours("distilled", "float32", case)[output], goldens("distilled")[f"{case}.{output}"])[1] < 5e-5


@pytest.mark.parametrize("case", cases.BF16_CASES)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_bf16_errs_no_more_than_the_reference(family, case, ours, goldens):
    # Errors against the float32 reference, ours over the reference's own: rms, which is stable, and the largest, which is not.
    expected = goldens(family)
    for output in cases.outputs_of(case):
        error = errors(ours(family, "bfloat16", case)[output], expected[f"{case}.{output}"])
        rms, largest = error / expected[f"{case}.{output}.bf16"]
        assert rms < 1.25
        assert largest < 2


def test_another_prompt_compiles_nothing(pipes, compilations):
    pipe = pipes("small")
    pipe("short", **SMALL)
    compilations.clear()
    pipe("a prompt of another length, " * 3, "and a negative one", guidance_scale=3.0, seed=1, sigmas="linear", **SMALL)
    assert compilations == []
    pipe("a prompt of another bucket, " * 30, **SMALL)
    assert len(compilations) > 0


def test_text_tower_runs_once_a_prompt(pipes, monkeypatch):
    # The prefill is traced when its program is made: one trace for the request, and none within the steps.
    traced = []
    prefill = UndTower.prefill
    monkeypatch.setattr(UndTower, "prefill", lambda self, *args: traced.append(1) or prefill(self, *args))
    jax.clear_caches()
    pipes("small")("text", **SMALL)
    assert len(traced) == 1


def test_steps_per_call_changes_nothing(pipes):
    one = pipes("small")("text", **SMALL, output_type="latent").video
    all_at_once = pipes("small")("text", **SMALL, output_type="latent", steps_per_call=3).video
    np.testing.assert_allclose(all_at_once, one, atol=1e-5)  # another program may fuse, and so round, otherwise


def test_guidance_off_is_the_conditional_branch(pipes):
    # Without guidance the negative prompt cannot matter; with it, it does.
    off = [pipes("small")("text", no, guidance_scale=1.0, **SMALL).video for no in ("rain", "snow")]
    on = [pipes("small")("text", no, guidance_scale=3.0, **SMALL).video for no in ("rain", "snow")]
    np.testing.assert_array_equal(*off)
    assert np.abs(on[0] - on[1]).max() > 1e-3


def test_same_seed_same_video(pipes):
    videos = [pipes("small")("text", seed=seed, **SMALL).video for seed in (3, 3, 4)]
    np.testing.assert_array_equal(videos[0], videos[1])
    assert np.abs(videos[0] - videos[2]).max() > 1e-2


def test_seed_is_numpys_noise(pipes):
    noise = np.random.RandomState(3).standard_normal((1, 16, 2, 2, 2)).astype(np.float32)
    given = pipes("small")("text", latents=noise, **SMALL).video
    np.testing.assert_array_equal(given, pipes("small")("text", seed=3, **SMALL).video)


def test_output_types(pipes):
    pipe = functools.partial(pipes("small"), "text", **SMALL)
    video, pictures, latents = (pipe(output_type=kind).video for kind in ("np", "pil", "latent"))
    assert (video.shape, video.dtype) == ((5, 32, 32, 3), np.float32)
    assert (latents.shape, latents.dtype) == ((1, 16, 2, 2, 2), np.float32)
    assert 0 <= video.min() < video.max() <= 1
    np.testing.assert_array_equal(np.stack(pictures), np.round(video * 255).astype(np.uint8))


def test_given_frames_are_kept(pipes):
    # The first latent frame is the encoded image, exactly, after every step; the rest is not.
    steps = []

    def keep(step, timestep, latents):
        steps.append(np.asarray(latents))

    pipes("small")("text", image=cases.IMAGE, callback_on_step_end=keep, **SMALL)
    assert len(steps) == 3
    frame = media.fit_image(cases.IMAGE, 32, 32)[None]
    encoded = np.moveaxis(np.asarray(encode(pipes("small").residence.bring("vae"), frame)), -1, 0)
    for latents in steps:
        np.testing.assert_array_equal(latents[0, :, :1], encoded)
    assert np.abs(steps[0][:, :, 1] - steps[2][:, :, 1]).max() > 1e-2


def test_callback_replaces_latents_and_ends_the_run(pipes):
    calls = []

    def callback(step, timestep, latents):
        calls.append((step, timestep))
        return np.zeros(latents.shape) if step == 0 else False

    result = pipes("small")("text", callback_on_step_end=callback, output_type="latent", **SMALL)
    assert [step for step, _ in calls] == [0, 1]
    assert 1000 > calls[0][1] > calls[1][1] > 0
    plain = pipes("small")("text", output_type="latent", **SMALL).video
    assert np.abs(result.video - plain).max() > 1e-2


def test_callback_with_another_shape_is_refused(pipes):
    with pytest.raises(InputError, match=r"callback_on_step_end returned an array of shape \(3,\); latents"):
        pipes("small")("text", callback_on_step_end=lambda *_: np.zeros(3), **SMALL)


def test_short_clip_is_held(pipes):
    # A clip that ends before the given latent frames do goes on with its last picture.
    short, held = cases.CLIP[:2], [*cases.CLIP[:2], *[cases.CLIP[1]] * 3]
    videos = [pipes("small")("text", video=clip, **SMALL).video for clip in (short, held)]
    np.testing.assert_array_equal(*videos)


def test_seconds_by_stage(pipes):
    assert list(pipes("small")("text", **SMALL).seconds) == ["tokenize", "load", "prefill", "denoise", "decode"]


def test_latents_are_no_file(pipes, tmp_path):
    with pytest.raises(InputError, match="latents cannot be saved"):
        pipes("small")("text", output_type="latent", **SMALL).save(tmp_path / "x.mp4")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dtype": "float16"}, "dtype='float16': one of float32, bfloat16"),
        ({"dtype": np.zeros(2)}, r"dtype=array\(.*\): one of float32, bfloat16"),
        ({"text_tower": np.zeros(2)}, r"text_tower=array\(.*\): one of auto, keep"),
        ({"quantize": np.zeros(2)}, r"quantize=array\(.*\): None or "),
        ({"mesh": 10**5000}, "mesh: one that make_mesh.* not a value of type int"),
        ({"path": "nowhere"}, "nowhere: there is no such folder"),
    ],
)
def test_from_pretrained_refuses(settings, sentence, folders, pipes):
    with pytest.raises(InputError, match=sentence):
        type(pipes("small")).from_pretrained(**({"path": folders("small")} | settings))


def test_settings_have_the_defaults_of_a_request(pipes):
    parameters = inspect.signature(pipes("small").__call__).parameters
    for field in dataclasses.fields(Request)[1:]:
        assert parameters[field.name].default == field.default
    assert parameters.keys() - {field.name for field in dataclasses.fields(Request)} == {"callback_on_step_end", "progress"}


def test_a_callback_that_cannot_be_called_is_refused(pipes):
    with pytest.raises(InputError, match="callback_on_step_end: a function is expected, not str"):
        pipes("small")("text", callback_on_step_end="stop", **SMALL)


def test_a_callback_with_numbers_that_are_none_is_refused(pipes):
    with pytest.raises(InputError, match="callback_on_step_end returned latents that are NaN or infinite"):
        pipes("small")("text", callback_on_step_end=lambda step, timestep, x: x * np.nan, **SMALL)


def test_a_callback_shows_what_there_is(pipes):
    """A preview of the last step is the result; one of the first latent frames, the beginning of it."""
    pipe, shown = pipes("small"), []
    result = pipe(
        "text", callback_on_step_end=lambda step, timestep, x: shown.append((pipe.decode(x), pipe.decode(x[:, :, :1]))), **SMALL
    )
    assert [(whole.shape, first.shape) for whole, first in shown] == [((5, 32, 32, 3), (1, 32, 32, 3))] * 3
    np.testing.assert_array_equal(shown[-1][0], result.video)
    np.testing.assert_allclose(shown[-1][1], result.video[:1], atol=1e-5)  # another program rounds otherwise
    assert np.abs(shown[0][0] - result.video).max() > 1e-2
    np.testing.assert_array_equal(result.video, pipe("text", **SMALL).video)


@pytest.mark.parametrize("shape", [(16, 2, 2, 2), (1, 16, 2, 2), (1, 48, 2, 2, 2), (1, 16, 0, 2, 2)])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_a_preview_of_what_are_no_latents_is_refused(pipes, shape, kind):
    with pytest.raises(InputError, match=r"^latents: floats \[1, 16, t, h, w\] are expected, not "):
        pipes("small").decode(np.zeros(shape, kind))
    with pytest.raises(InputError, match=r"not \[\] of object"):
        pipes("small").decode(None)
    with pytest.raises(InputError, match="latents: list is no array"):
        pipes("small").decode([[1.0], [1.0, 2.0]])


class CancelledError(Exception):
    pass


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_callback_that_raises_ends_the_run(pipes, step):
    """With its own exception, after that step; the pipeline goes on with the next as if nothing had been."""
    seen = []

    def cancel(at, timestep, latents):
        seen.append(at)
        if at == step:
            raise CancelledError

    with pytest.raises(CancelledError):
        pipes("small")("text", callback_on_step_end=cancel, **SMALL)
    assert seen == list(range(step + 1))
    np.testing.assert_array_equal(*(pipes("small")("text", **SMALL).video for _ in range(2)))


def test_memory_that_ends_is_told_with_its_stage(pipes, monkeypatch):
    """And the pipeline goes on with the next request."""
    whole = pipes("small")("text", **SMALL).video
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    for where, stage in (
        ("denoise", "denoise"),
        ("prefill", "prefill"),
        ("decode", "decode"),
        ("noise", "noise"),
        ("fit_image", "encode"),
    ):
        with monkeypatch.context() as patch:
            home = {"denoise": sampler, "fit_image": media}.get(where, pipeline)
            patch.setattr(home, where, mock.Mock(side_effect=error))
            with pytest.raises(OutOfMemoryError, match=rf"^{stage}: out of memory \(RESOURCE_EXHAUSTED: .* 9 bytes\.\)$"):
                pipes("small")("text", image=cases.IMAGE, **SMALL)
    np.testing.assert_array_equal(pipes("small")("text", **SMALL).video, whole)


# A safety checker


class Checker:
    """Refuses the word "bad", and videos when it is told to; blackens a corner."""

    def __init__(self, *, blocks_video: bool = False, blackens: bool = False):
        self.blocks_video, self.blackens, self.seen = blocks_video, blackens, []

    def check_prompt(self, text):
        self.seen.append(text)
        return "bad" not in text

    def check_video(self, frames):
        self.seen.append((frames.shape, frames.dtype))
        if self.blackens:
            frames[:, :4, :4] = 0
        return None if self.blocks_video else frames


@pytest.fixture
def checked(folders):
    """`checked(**how)`: a pipeline with a checker."""

    def make(**how):
        checker = Checker(**how)
        return Cosmos3Pipeline.from_pretrained(
            folders("small"), dtype="float32", safety_checker=checker, progress=False
        ), checker

    return make


def test_a_blocked_prompt_runs_nothing(checked, monkeypatch):
    pipe, checker = checked()
    monkeypatch.setattr(pipeline, "token_ids", lambda *_: pytest.fail("it ran"))
    with pytest.raises(BlockedError, match=r"^prompt: blocked by Checker \(.*\); ask for something else$"):
        pipe("a bad thing", "a negative", **SMALL)
    assert checker.seen == ["a bad thing"]


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_a_blocked_video_is_not_given(checked, output_type):
    pipe, checker = checked(blocks_video=True)
    with pytest.raises(BlockedError, match=r"^video: blocked by Checker"):
        pipe("text", output_type=output_type, **SMALL)
    assert checker.seen == ["text", ((5, 32, 32, 3), np.uint8)]


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_frames_are_those_that_the_checker_lets_pass(checked, pipes, output_type):
    result = checked(blackens=True)[0]("text", output_type=output_type, **SMALL)
    plain = pipes("small")("text", output_type=output_type, **SMALL)
    found, expected = (np.stack(each.video) for each in (result, plain))
    assert (found[:, :4, :4] == 0).all()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    expected[:, :4, :4] = 0
    np.testing.assert_array_equal(found, expected)
    assert result.metadata == plain.metadata | {"guardrails": "Checker"}


def test_latents_are_not_checked(checked):
    pipe, checker = checked(blocks_video=True)
    assert pipe("text", output_type="latent", **SMALL).video.shape == (1, 16, 2, 2, 2)
    assert checker.seen == ["text"]


def test_a_checker_that_fails_lets_nothing_pass(checked):
    pipe, checker = checked()
    checker.check_video = mock.Mock(side_effect=ZeroDivisionError)
    with pytest.raises(RunError, match=r"^video: Checker failed, "):
        pipe("text", **SMALL)


# Sound


def both(result) -> dict[str, np.ndarray]:
    return {"video": result.video, "sound": result.sound}


MORE_SOUND_CASES = {
    "text_to_image": cases.CASES["text_to_image"],
    "video_to_video": cases.CASES["video_to_video"],
    "no_guidance": cases.CASES["no_guidance"],
    "odd_rows_slow": cases.CASES["odd_rows_slow"],
}


@pytest.mark.live
@pytest.mark.parametrize("case", MORE_SOUND_CASES)
def test_sound_in_every_mode_equals_the_reference(case, pipes, folders):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import reference

    asked = MORE_SOUND_CASES[case] | {"enable_sound": True}
    expected = reference.run(reference.load(folders("small")), asked)
    for output, value in outputs(pipes("small"), asked).items():
        exact = sample(expected[output]) if output in ("video", "sound") else expected[output]
        assert errors(value, exact)[1] < (1e-4 if output == "sound" else 5e-5)


def test_sound_of_a_result(pipes):
    result = pipes("small")("text", **WITH_SOUND)
    assert list(result.seconds) == ["tokenize", "load", "prefill", "denoise", "decode", "decode_sound"]
    assert (result.sound.shape, result.sound.dtype, result.sample_rate) == ((2, SOUND[1] * 1920), np.float32, 48000)
    assert -1 <= result.sound.min() < -0.1 < 0.1 < result.sound.max() <= 1
    assert (result.video.shape, result.video.dtype) == ((5, 32, 32, 3), np.float32)
    pictures = pipes("small")("text", output_type="pil", **WITH_SOUND)
    np.testing.assert_array_equal(pictures.sound, result.sound)
    np.testing.assert_array_equal(np.stack(pictures.video), np.round(result.video * 255).astype(np.uint8))


def test_sound_latents_of_a_result(pipes):
    result = pipes("small")("text", output_type="latent", **WITH_SOUND)
    assert (result.sound.shape, result.sound.dtype) == (SOUND, np.float32)
    assert list(result.seconds) == ["tokenize", "load", "prefill", "denoise"]


def test_without_sound_no_decoder_is_loaded(folders):
    pipe = Cosmos3Pipeline.from_pretrained(folders("small"), dtype="float32", progress=False)
    result = pipe("text", **SMALL)
    assert (result.sound, result.sample_rate) == (None, None)
    assert "sound" not in pipe.residence.on_devices
    pipe("text", output_type="latent", **WITH_SOUND)
    assert "sound" not in pipe.residence.on_devices
    pipe("text", **WITH_SOUND)
    assert "sound" in pipe.residence.on_devices


def test_sound_that_was_not_loaded_is_refused(folders):
    pipe = Cosmos3Pipeline.from_pretrained(folders("small"), dtype="float32", sound=False, progress=False)
    with pytest.raises(InputError, match="no sound tokenizer, or was loaded with sound=False"):
        pipe("text", **WITH_SOUND)
    assert pipe("text", **SMALL).sound is None


def test_a_checkpoint_without_sound_refuses_it(pipes):
    with pytest.raises(InputError, match=r"^enable_sound: this checkpoint has no sound heads"):
        pipes("distilled")("text", num_frames=5, height=32, width=32, enable_sound=True, progress=False)


def test_seed_is_numpys_noise_of_the_sound_too(pipes):
    # Each from the beginning of its own stream, so that the video's size says nothing about the sound's noise.
    pipe = functools.partial(pipes("small"), "text", **WITH_SOUND)
    noise = np.random.RandomState(3).standard_normal(SOUND).astype(np.float32)
    seeded, given, other = pipe(seed=3), pipe(seed=3, sound_latents=noise), pipe(seed=3, sound_latents=random(*SOUND, seed=4))
    for name in both(seeded):
        np.testing.assert_array_equal(both(given)[name], both(seeded)[name])
        # both are denoised together, and each attends to the other
        assert errors(both(other)[name], both(seeded)[name])[1] > 1e-2
    video = pipe(seed=3, latents=random(1, 16, 2, 2, 2))
    assert errors(video.sound, seeded.sound)[1] > 1e-2


def test_sound_changes_the_video(pipes):
    assert errors(*(pipes("small")("text", **settings).video for settings in (WITH_SOUND, SMALL)))[1] > 1e-2


def test_guidance_off_is_the_conditional_branch_of_the_sound_too(pipes):
    pipe = functools.partial(pipes("small"), "text", **WITH_SOUND)
    off = [pipe(no, guidance_scale=1.0).sound for no in ("rain", "snow")]
    on = [pipe(no, guidance_scale=3.0).sound for no in ("rain", "snow")]
    np.testing.assert_array_equal(*off)
    assert np.abs(on[0] - on[1]).max() > 1e-3
    assert np.abs(on[0] - off[0]).max() > 1e-3


def test_steps_per_call_changes_no_sound(pipes):
    pipe = functools.partial(pipes("small"), "text", output_type="latent", **WITH_SOUND)
    one = both(pipe())
    for name, value in both(pipe(steps_per_call=3)).items():
        np.testing.assert_allclose(value, one[name], atol=1e-5)  # another program may fuse, and so round, otherwise


def test_callback_ends_video_and_sound(pipes):
    # As far as a run of one step goes: the sample after the first of three is not yet the prediction.
    pipe, seen = functools.partial(pipes("small"), "text", output_type="latent", **WITH_SOUND), []
    ended = pipe(callback_on_step_end=lambda step, timestep, latents: seen.append(np.asarray(latents)) or False)
    assert len(seen) == 1
    np.testing.assert_array_equal(ended.video, seen[0])
    whole = pipe()
    noise = np.random.RandomState(42).standard_normal(SOUND)
    # a third of the way: nearer to the noise than the end is
    assert 0 < np.abs(ended.sound - noise).mean() < np.abs(whole.sound - noise).mean()


def test_another_prompt_with_sound_compiles_nothing(pipes, compilations):
    pipe = functools.partial(pipes("small"), sigmas="linear", **WITH_SOUND)
    pipe("short")
    compilations.clear()
    pipe("a prompt of another length, " * 3, "and a negative one", guidance_scale=3.0, seed=1)
    assert compilations == []


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio leaves its pipes to the collector
@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_result_is_saved_with_its_sound(output_type, pipes, tmp_path):
    result = pipes("small")("text", output_type=output_type, **WITH_SOUND)
    result.save(tmp_path / "a.wav")
    result.save(tmp_path / "a.mp4")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 48000, result.sound.shape[1])
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2).T / 32767
    np.testing.assert_allclose(samples, result.sound, atol=0.5001 / 32767)
    heard = ffmpeg.run("-i", str(tmp_path / "a.mp4"), "-map", "0:a:0", "-f", "s16le", "-")
    assert 0 <= len(heard) // 4 - round(5 / 24 * 48000) < result_files.AAC_FRAME  # two bytes, two channels
    assert len(media.open_clip(tmp_path / "a.mp4", 100)) == 5


@pytest.mark.parametrize("path", [None, 5, b"a.mp4", ["a.mp4"]])
def test_what_is_no_path(pipes, path):
    with pytest.raises(InputError, match=r"the path of a file is expected$"):
        pipes("small")("text", **SMALL).save(path)


def test_what_cannot_be_saved(pipes, tmp_path):
    with pytest.raises(InputError, match=r"a.wav: 5 frames cannot be written as .wav; use .mp4$"):
        pipes("small")("text", **SMALL).save(tmp_path / "a.wav")
    latents = pipes("small")("text", output_type="latent", **WITH_SOUND)
    for name in ("a.wav", "a.mp4"):
        with pytest.raises(InputError, match=f"{name}: latents cannot be saved"):
            latents.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []

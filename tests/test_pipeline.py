"""The whole plot: equal to the reference in every mode, compiled once, and what comes back."""

import dataclasses
import functools
import inspect

import cases
import jax
import numpy as np
import pytest
from metrics import errors, outputs

from cosmos3_jax import InputError, Request, media
from cosmos3_jax.models.transformer import UndTower
from cosmos3_jax.pipeline import encode

SMALL = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 3, "progress": False}


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
        assert errors(ours(family, "float32", case)[output], expected[f"{case}.{output}"])[1] < 5e-5


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
    with pytest.raises(InputError, match="latents cannot be saved as frames"):
        pipes("small")("text", output_type="latent", **SMALL).save(tmp_path / "x.mp4")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dtype": "float16"}, "dtype='float16': one of float32, bfloat16"),
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

"""Positions: the published numbers, and what they must not depend on."""

import dataclasses

import numpy as np
import pytest

from cosmos3_jax.config import EDGE, NANO, TINY, WAN_VAE, TransformerConfig
from cosmos3_jax.positions import cos_sin, layout, text_ids, vision_ids

SOUND_LATENTS = 197  # 7.875 s
SHAPE_720P = WAN_VAE.latent_shape(189, 720, 1280)
START = 70 + 15000  # of the generated tokens, for a prompt of 70 tokens


def same(left, right):
    """Both cos and sin are equal, to the bit."""
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def test_720p_stands_where_the_reference_puts_it():
    ids_3G = vision_ids(NANO, SHAPE_720P, START, fps=24.0)
    assert ids_3G.shape == (3, 44_160)
    assert ids_3G[:, 0].tolist() == [15070, 0, 0]
    assert ids_3G[:, -1].tolist() == [15117, 22, 39]


@pytest.mark.parametrize("shape_thw", [(1, 2, 2), (3, 4, 6), (2, 45, 80), (2, 5, 7)], ids=str)
def test_tokens_run_over_columns_then_rows_then_frames(shape_thw):
    # A row or column that is left over makes a patch of its own.
    t, h, w = shape_thw
    t, h, w = np.indices((t, (h + 1) // 2, (w + 1) // 2)).reshape(3, -1)
    np.testing.assert_array_equal(vision_ids(NANO, shape_thw, START, fps=24.0), [START + t, h, w])


@pytest.mark.parametrize(("fps", "base_fps", "step"), [(24, 24, 1), (16, 24, 1.5), (30, 24, 0.8), (16, 16, 1), (60, 24, 0.4)])
def test_a_clip_spans_its_real_duration(fps, base_fps, step):
    config = dataclasses.replace(NANO, base_fps=base_fps)
    time_t = vision_ids(config, (48, 2, 2), START, fps)[0]
    np.testing.assert_allclose(time_t, START + step * np.arange(48), atol=2**-10)  # float32 above 8192 counts in 2^-10


@pytest.mark.parametrize(
    ("config", "frames"),
    [(NANO, 1), (dataclasses.replace(NANO, enable_fps_modulation=False), 3)],
    ids=["image", "switched_off"],
)
def test_fps_does_not_matter(config, frames):
    np.testing.assert_array_equal(
        vision_ids(config, (frames, 4, 4), START, 7.0), vision_ids(config, (frames, 4, 4), START, 24.0)
    )


def test_rows_and_columns_may_start_where_time_does():
    config = dataclasses.replace(NANO, unified_3d_mrope_reset_spatial_ids=False)
    expected = vision_ids(NANO, (2, 4, 6), 0, 24.0) + START
    np.testing.assert_array_equal(vision_ids(config, (2, 4, 6), START, 24.0), expected)


@pytest.mark.parametrize(
    ("config", "axes"),
    [(NANO, "thw" * 20 + "tttt"), (EDGE, "thw" * 20 + "tttt"), (TINY, "thwthwtt")],
    ids=["nano", "edge", "tiny"],
)
def test_rotary_slots_take_turns(config, axes):
    # A token that is off the origin along one axis only is turned in the slots of this axis only.
    _, sin_BTH = cos_sin(config, np.eye(3)[:, :, None])
    for axis, turned_H in zip("thw", sin_BTH[:, 0] != 0, strict=True):
        assert turned_H.tolist() == [slot == axis for slot in axes]


@pytest.mark.parametrize("config", [NANO, EDGE], ids=["nano", "edge"])
def test_frequencies_fall_from_1_to_almost_1_over_theta(config):
    cos, sin = cos_sin(config, np.ones((1, 3, 1)))
    frequency = config.rope_theta ** (-np.arange(64) / 64)
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0], frequency, rtol=1e-6)  # float32
    assert cos.dtype == sin.dtype == np.float32


def test_positions_near_15000_keep_their_phase():
    # One position on, the fastest slot turns by one radian. In bf16 15070 and 15071 are the same number.
    cos, sin = cos_sin(NANO, vision_ids(NANO, (4, 2, 2), START, 24.0)[None])
    turn = np.diff(np.unwrap(np.arctan2(sin, cos)[0, :, 0]))
    np.testing.assert_allclose(turn, 1, atol=1e-6)  # float32 rounding of the phase
    np.testing.assert_allclose(cos[0, :, 0], np.cos(START + np.arange(4.0)), atol=1e-6)


def test_text_counts_up_on_every_axis():
    np.testing.assert_array_equal(text_ids(8), [range(8)] * 3)
    text, _ = layout(NANO, np.array([5]), 8, (1, 2, 2), 24.0)
    same(text, cos_sin(NANO, text_ids(8)[None]))


def test_each_branch_starts_after_its_own_text():
    # Generated tokens of a branch stand where they would if it were alone, 15000 after its real length.
    lengths = np.array([70, 64], np.int32)
    _, both = layout(NANO, lengths, 128, (3, 4, 6), 16.0)
    for row, length in enumerate(lengths):
        _, alone = layout(NANO, lengths[row : row + 1], 128, (3, 4, 6), 16.0)
        same([part[row : row + 1] for part in both], alone)
        same(alone, cos_sin(NANO, vision_ids(NANO, (3, 4, 6), length + 15000, 16.0)[None]))


def test_padding_of_the_text_does_not_matter():
    (text_128, vision_128), (text_256, vision_256) = (layout(NANO, np.array([70, 64]), n, (2, 4, 4), 24.0) for n in (128, 256))
    same(vision_128, vision_256)
    same(text_128, [part[:, :128] for part in text_256])


# Sound


def by_formula(config: TransformerConfig, frames: int, start: int) -> np.ndarray:
    """[3, frames]: float32, each operation rounded, in the order of the reference."""
    time = np.arange(frames, dtype=np.float32)
    if config.enable_fps_modulation:
        time = time / np.float32(config.sound_latent_fps) * np.float32(config.base_fps)
    corner = np.full(frames, 0 if config.unified_3d_mrope_reset_spatial_ids else start, np.float32)
    return np.stack([time + np.float32(start), corner, corner])


def by_reference(config: TransformerConfig, frames: int, start: int) -> np.ndarray:
    pytest.importorskip("diffusers")
    import reference

    ids, _ = reference.omni.get_3d_mrope_ids_vae_tokens(
        frames,
        1,
        1,
        start,
        config.unified_3d_mrope_reset_spatial_ids,
        fps=config.sound_latent_fps if config.enable_fps_modulation else None,
        base_fps=config.base_fps,
        temporal_compression_factor=1,
    )
    return ids.numpy().astype(np.float32)


def sound_part(config: TransformerConfig, frames: int, *, fps: float = 24.0, lengths: tuple[int, ...] = (70,)):
    """cos and sin of the sound's tokens, beside a video of two latent frames of one patch each."""
    _, generated = layout(config, np.array(lengths), 128, (2, 2, 2), fps, frames)
    assert all(part.shape[1] == 2 + frames for part in generated)
    return [part[:, 2:] for part in generated]


@pytest.mark.parametrize("expected", [by_formula, pytest.param(by_reference, marks=pytest.mark.live)])
@pytest.mark.parametrize("frames", [1, 2, SOUND_LATENTS])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base_fps": 16.0},
        {"sound_latent_fps": 21.5},
        {"enable_fps_modulation": False},
        {"unified_3d_mrope_reset_spatial_ids": False},
        {"unified_3d_mrope_temporal_modality_margin": 0},
    ],
    ids=str,
)
def test_sound_stands_where_the_reference_puts_it(changes, frames, expected):
    config = dataclasses.replace(NANO, **changes)
    start = 70 + config.unified_3d_mrope_temporal_modality_margin
    ids_3s = expected(config, frames, start)
    np.testing.assert_array_equal(vision_ids(config, (frames, 1, 1), start, config.sound_latent_fps), ids_3s)
    same(sound_part(config, frames), cos_sin(config, ids_3s[None]))


def test_25_sound_latents_take_as_long_as_24_positions():
    time_s, *corner = by_formula(NANO, SOUND_LATENTS, START)
    np.testing.assert_allclose(time_s, START + 0.96 * np.arange(SOUND_LATENTS), atol=2**-10)  # float32 above 8192
    assert not np.any(corner)
    same(sound_part(NANO, SOUND_LATENTS), cos_sin(NANO, np.stack([time_s, *corner])[None]))


@pytest.mark.parametrize("fps", [7.0, 16.0, 30.0, 120.0])
def test_sound_does_not_depend_on_the_videos_fps(fps):
    same(sound_part(NANO, SOUND_LATENTS, fps=fps), sound_part(NANO, SOUND_LATENTS))


def test_a_second_of_sound_is_base_fps_positions():
    # A position is a frame at base_fps, whatever the latents' own rate; those of the video count four frames each.
    for rate in (10, 25, 50):
        config = dataclasses.replace(NANO, sound_latent_fps=float(rate))
        time_s = vision_ids(config, (2 * rate, 1, 1), START, config.sound_latent_fps)[0]
        np.testing.assert_allclose(time_s[[0, rate]], [START, START + 24], atol=2**-10)  # float32 above 8192


def test_sound_of_each_branch_starts_after_its_own_text():
    both = sound_part(NANO, 5, lengths=(70, 64))
    for row, length in enumerate((70, 64)):
        same([part[row : row + 1] for part in both], sound_part(NANO, 5, lengths=(length,)))
    assert np.abs(both[1][0] - both[1][1]).max() > 0.1


def test_without_sound_there_is_none():
    silent, sounding = (layout(NANO, np.array([70, 64]), 128, (3, 4, 6), 24.0, frames) for frames in (0, 9))
    same(silent[1], layout(NANO, np.array([70, 64]), 128, (3, 4, 6), 24.0)[1])
    same(silent[0], sounding[0])
    same(silent[1], [part[:, :-9] for part in sounding[1]])

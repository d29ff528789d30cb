"""Where tokens stand: the 3-D rotary positions (time, row, column) of text and of generated tokens. numpy only.

Text tokens count up on all three axes. Vision and sound both begin at the real length of their branch's text + 15000, so each
branch has positions of its own. Reference: diffusers 0.42.1, pipelines/cosmos/pipeline_cosmos3_omni.py.
"""

import numpy as np

from cosmos3_jax.config import TransformerConfig

CosSin = tuple[np.ndarray, np.ndarray]  # float32 [B, n, H/2] each, of n tokens


def layout(
    config: TransformerConfig,
    length_B: np.ndarray,
    bucket: int,
    shape_thw: tuple[int, int, int],
    fps: float,
    sound_frames: int = 0,
) -> tuple[CosSin, CosSin]:
    """cos and sin of text tokens ([1, bucket, H/2], all branches alike) and of vision and then sound tokens ([B, G, H/2]).

    `length_B`: real text lengths; `shape_thw`: latent frames, rows, columns; `fps`: of the video; `sound_frames`: of latents.
    """
    generated = []
    for length in length_B:
        start = int(length) + config.unified_3d_mrope_temporal_modality_margin
        vision = vision_ids(config, shape_thw, start, fps)
        sound = vision_ids(config, (sound_frames, 1, 1), start, config.sound_latent_fps)
        generated.append(np.concatenate([vision, sound], axis=1))
    return cos_sin(config, text_ids(bucket)[None]), cos_sin(config, np.stack(generated))


def text_ids(length: int) -> np.ndarray:
    """[3, length]: 0, 1, 2, … on every axis."""
    return np.tile(np.arange(length, dtype=np.float32), (3, 1))


def vision_ids(config: TransformerConfig, shape_thw: tuple[int, int, int], start: int, fps: float) -> np.ndarray:
    """[3, G] positions of latent patches, frames outermost: time from `start`, rows and columns from 0.

    A latent frame is one position at base_fps, more where frames last longer: a clip spans its real duration. A sound latent is
    a frame of one patch; a second of sound spans base_fps positions, one of video a quarter of that.
    """
    t, h, w = shape_thw
    size = config.latent_patch_size
    frame = np.arange(t, dtype=np.float32)
    if config.enable_fps_modulation:
        frame = frame / np.float32(fps) * np.float32(config.base_fps)
    corner = 0 if config.unified_3d_mrope_reset_spatial_ids else start
    row = np.arange(-(-h // size), dtype=np.float32) + corner
    column = np.arange(-(-w // size), dtype=np.float32) + corner
    return np.stack(np.meshgrid(frame + np.float32(start), row, column, indexing="ij")).reshape(3, -1)


def cos_sin(config: TransformerConfig, ids_B3n: np.ndarray) -> CosSin:
    """cos and sin of position x frequency, [B, n, H/2].

    Slots go to the axes in turn (t, h, w, t, h, w, …) while h and w have slots left, then to t. Float32 here and on the
    device: bf16 cannot tell 15,000 from 15,001.
    """
    slots = config.head_dim // 2
    axis = np.zeros(slots, np.int64)
    for dimension in (1, 2):
        axis[dimension : 3 * config.rope_axes_dim[dimension] : 3] = dimension
    exponent = np.arange(slots, dtype=np.float64) / slots
    frequency = np.float32(1) / (config.rope_theta**exponent).astype(np.float32)
    angle = np.moveaxis(ids_B3n[:, axis], 1, 2).astype(np.float32) * frequency
    return np.cos(angle), np.sin(angle)

"""The small checkpoints and the requests on which this project is held against the reference (diffusers 0.42.1).

Shared by the tests, which run them here, and by make_goldens.py, which records what the reference makes of them.
"""

import dataclasses

import numpy as np
from PIL import Image

from cosmos3_jax.config import TINY, TINY_FULL_SOUND, TINY_SOUND, TINY_VAE

# small: as many key/value heads as query heads; wide: grouped-query attention as in Nano; edge: the Edge family
FAMILIES = {
    "small": TINY,
    "wide": dataclasses.replace(
        TINY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=32,
        head_dim=32,
        rope_axes_dim=(6, 5, 5),
    ),
    "edge": dataclasses.replace(
        TINY,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_act="relu2",
        rms_norm_eps=1e-5,
        qk_norm_for_text=False,
        use_und_k_norm_for_gen=True,
        rope_theta=1e8,
    ),
}
_random = np.random.RandomState(7)
VAE = dataclasses.replace(
    TINY_VAE,
    latents_mean=tuple(np.round(0.3 * _random.standard_normal(16), 4).tolist()),
    latents_std=tuple(np.round(0.5 + _random.random_sample(16), 4).tolist()),
)
IMAGE = Image.fromarray(_random.randint(0, 256, (100, 150, 3)).astype(np.uint8))
CLIP = [Image.fromarray(_random.randint(0, 256, (70, 110, 3)).astype(np.uint8)) for _ in range(7)]

PROMPT = "A red sports car driving along a coastal road at sunset."
BASE = {
    "prompt": PROMPT,
    "num_frames": 9,
    "height": 64,
    "width": 96,
    "num_inference_steps": 4,
    "guidance_scale": 6.0,
    "sigmas": "linear",
    "seed": 5,
    "prompt_style": "diffusers",
}
# Every mode and every setting that changes the arithmetic.
CASES = {
    "text_to_video": BASE,
    "text_to_image": BASE | {"num_frames": 1, "guidance_scale": 4.0, "flow_shift": 3.0},
    "image_to_video": BASE | {"image": IMAGE, "sigmas": "native"},
    "video_to_video": BASE | {"video": CLIP},
    "video_last_frame_0_2": BASE
    | {"video": CLIP, "condition_frame_indexes_vision": (0, 2), "condition_video_keep": "last", "sigmas": "karras"},
    "odd_rows_slow": BASE | {"height": 80, "fps": 16.0, "sigmas": "native", "negative_prompt": "blurry, low quality. " * 30},
    "no_guidance": BASE | {"prompt": PROMPT * 12, "guidance_scale": 1.0, "sigmas": "karras", "fps": 30.0},
    "one_step": BASE | {"prompt": "ocean", "num_inference_steps": 1, "negative_prompt": "rain"},
    "many_steps": BASE | {"num_inference_steps": 12, "sigmas": "native", "flow_shift": 5.0},
}
# With sound, which counts its own frames whatever those of the video.
SOUND_CASES = {
    f"{mode}_with_sound_at_{fps}": CASES[mode] | {"enable_sound": True, "fps": float(fps)}
    for mode in ("text_to_video", "image_to_video")
    for fps in (12, 24, 30)
}
CASES |= SOUND_CASES
SOUND_LENGTHS = (1, 7, 200)  # latents that the sound decoder is tried on
FULL_SOUND = TINY_FULL_SOUND  # of the checkpoint "full_sound", which is "small" with a sound encoder
WAVE_LENGTHS = (1, 1920, 5000, 48_000)  # samples that it is tried on; a latent is 1,920
# A four-step checkpoint has its own noise levels and no guidance; this one counts its frames in sixteenths, as I2V-4Step does.
DISTILLED = dataclasses.replace(FAMILIES["wide"], base_fps=16.0, sound_gen=False, sound_dim=None)
DISTILLED_BASE = {name: BASE[name] for name in ("prompt", "num_frames", "height", "width", "seed", "prompt_style")}
DISTILLED_CASES = {
    "text_to_video": DISTILLED_BASE,
    "text_to_image": DISTILLED_BASE | {"num_frames": 1},
    "image_to_video": DISTILLED_BASE | {"image": IMAGE},
    "video_to_video": DISTILLED_BASE | {"video": CLIP, "fps": 16.0},
}
BF16_CASES = (
    "text_to_video",
    "text_to_image",
    "image_to_video",
    "video_to_video",
    "no_guidance",
    "text_to_video_with_sound_at_24",
)

TEXT, GRID = 7, (2, 2, 3)  # one transformer layer: text tokens; frames, rows and columns of vision tokens
CHUNKS = 2  # one block of the VAE: chunks after the first frame
BLOCKS = {  # and the frames in each
    "encoder.down_blocks.0": 4,
    "encoder.down_blocks.1": 4,
    "encoder.down_blocks.2": 2,
    "encoder.down_blocks.3": 1,
    "encoder.mid_block": 1,
    "decoder.mid_block": 1,
    "decoder.up_blocks.0": 1,
    "decoder.up_blocks.1": 2,
    "decoder.up_blocks.2": 4,
    "decoder.up_blocks.3": 4,
}
SIZES = [(64, 96), (80, 80), (112, 176)]  # height and width that IMAGE and CLIP are fitted to


def layer_inputs(width: int) -> tuple[np.ndarray, ...]:
    """Random und and gen tokens, [TEXT, width] and [tokens of GRID, width]."""
    random = np.random.RandomState(11)
    return tuple(random.standard_normal((n, width)).astype(np.float32) for n in (TEXT, int(np.prod(GRID))))


def block_inputs(channels: int, frames: int) -> np.ndarray:
    """Random frames [1 + CHUNKS x frames, 4, 6, channels]."""
    return np.random.RandomState(13).standard_normal((1 + CHUNKS * frames, 4, 6, channels)).astype(np.float32)


def sound_latents(length: int) -> np.ndarray:
    """Random sound latents [length, channels]."""
    return np.random.RandomState(17).standard_normal((length, TINY_SOUND.vocoder_input_dim)).astype(np.float32)


def wave(length: int) -> np.ndarray:
    """A random waveform [length, 2], seldom beyond [-1, 1]."""
    return (0.3 * np.random.RandomState(19).standard_normal((length, 2))).astype(np.float32)


def spectra(channels: int) -> np.ndarray:
    """Random input of one layer of the sound encoder, [12, channels]."""
    return np.random.RandomState(23).standard_normal((12, channels)).astype(np.float32)


def outputs_of(case: str) -> tuple[str, ...]:
    """What a case gives."""
    return ("latents", "video", *(("sound_latents", "sound") if case in SOUND_CASES else ()))

"""The script that writes checkpoints: the published layout, and the same numbers each time."""

import dataclasses
import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import random_checkpoint
from cosmos3_jax.checkpoint import Checkpoint
from cosmos3_jax.config import PRESETS, SOUND_TOKENIZER, TINY, TINY_FULL_SOUND, TINY_SOUND, WAN_VAE, SoundEncoderConfig
from cosmos3_jax.prompt import load_tokenizer

FILE = "diffusion_pytorch_model.safetensors"
PARTS = "transformer", "vae", "sound_tokenizer"
WRITTEN = {"transformer": "6561f4306ab4e9ec", "vae": "c4360deaae35610d", "sound_tokenizer": "4ee9fc109ac21ac3"}  # checksums
TOKENS = [37, 416, 378, 31, 427, 405, 18]


def published(data, name: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((data / "tensors" / f"{name}.json").read_text())
    return {tensor: tuple(shape) for tensor, (shape, _) in tensors.items()}


@pytest.mark.parametrize("name", ["nano", "super", "edge"])
def test_shapes_are_the_published_ones(name, data):
    assert random_checkpoint.transformer_shapes(PRESETS[name]) == published(data, f"transformer_{name}")


def test_shapes_of_the_vae_are_the_published_ones(data):
    assert random_checkpoint.vae_shapes(WAN_VAE) == published(data, "vae")


def test_shapes_of_the_sound_tokenizer_are_the_published_ones(data):
    decoder = published(data, "sound_tokenizer_decoder_only")
    full = published(data, "sound_tokenizer_full")
    assert random_checkpoint.sound_shapes(SOUND_TOKENIZER) == decoder
    assert random_checkpoint.sound_shapes(dataclasses.replace(SOUND_TOKENIZER, encoder=SoundEncoderConfig())) == full
    assert decoder == {name: shape for name, shape in full.items() if not name.startswith("encoder.")}


@pytest.mark.parametrize("sound_gen", [True, False])
def test_a_sound_tokenizer_for_a_transformer_with_sound_heads(tmp_path, sound_gen):
    config = TINY if sound_gen else dataclasses.replace(TINY, sound_gen=False, sound_dim=None)
    checkpoint = Checkpoint.open(random_checkpoint.write_checkpoint(tmp_path, config), sound=True)
    assert checkpoint.sound == (TINY_SOUND if sound_gen else None)
    assert (tmp_path / "sound_tokenizer").exists() == sound_gen
    assert ("sound_tokenizer" in json.loads((tmp_path / "model_index.json").read_text())) == sound_gen


def test_a_sound_tokenizer_has_an_encoder_if_its_config_says_so(tmp_path, data):
    """Its decoder, and all else, is that of the checkpoint without one."""
    folders = [
        random_checkpoint.write_checkpoint(tmp_path / name, sound=sound)
        for name, sound in (("decoder", TINY_SOUND), ("full", TINY_FULL_SOUND))
    ]
    assert Checkpoint.open(folders[1], sound_encoder=True).sound == TINY_FULL_SOUND
    assert json.loads((folders[1] / "sound_tokenizer" / "config.json").read_text())["encoder_enabled"] is True
    decoder, full = ({part: load_file(folder / part / FILE) for part in PARTS} for folder in folders)
    assert full["sound_tokenizer"].keys() == published(data, "sound_tokenizer_full").keys()
    for part in PARTS:
        for name, tensor in decoder[part].items():
            np.testing.assert_array_equal(full[part].pop(name), tensor, err_msg=name)
    assert not full["transformer"] | full["vae"]
    for name, tensor in full["sound_tokenizer"].items():
        assert tensor.std() > 0.01 * np.abs(tensor).max(), name


def test_the_same_arguments_write_the_same_numbers(tmp_path):
    """On any machine: all that was recorded of the reference is for these."""
    random_checkpoint.write_checkpoint(tmp_path, dtype=ml_dtypes.bfloat16)
    found = {}
    for part in PARTS:
        checksum = hashlib.sha256()
        for name, tensor in sorted(load_file(tmp_path / part / FILE).items()):
            checksum.update(name.encode() + tensor.tobytes())
        found[part] = checksum.hexdigest()[:16]
    assert found == WRITTEN


def test_every_weight_matters(tmp_path):
    # Norms are not 1, biases not 0, nothing is constant.
    random_checkpoint.write_checkpoint(tmp_path)
    for part in PARTS:
        for name, tensor in load_file(tmp_path / part / FILE).items():
            assert tensor.std() > 0.01 * np.abs(tensor).max(), name


def test_the_tokenizer_is_the_same_each_time(tmp_path):
    random_checkpoint.write_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, TINY.vocab_size)("A robot arm; waves break.")["input_ids"] == TOKENS


def test_a_new_tokenizer_fits_the_vocabulary(tmp_path):
    random_checkpoint.write_tokenizer(tmp_path)
    assert len(load_tokenizer(tmp_path, TINY.vocab_size)) <= TINY.vocab_size

"""The script that writes checkpoints: the published layout, and the built-in checkpoint to the bit."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import random_checkpoint
from cosmos3_jax.checkpoint import BUILT_IN
from cosmos3_jax.config import PRESETS, TINY, WAN_VAE
from cosmos3_jax.prompt import load_tokenizer

FILE = "diffusion_pytorch_model.safetensors"


def published(data, name: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((data / "tensors" / f"{name}.json").read_text())
    return {tensor: tuple(shape) for tensor, (shape, _) in tensors.items()}


@pytest.mark.parametrize("name", ["nano", "super", "edge"])
def test_shapes_are_the_published_ones(name, data):
    assert random_checkpoint.transformer_shapes(PRESETS[name]) == published(data, f"transformer_{name}")


def test_shapes_of_the_vae_are_the_published_ones(data):
    assert random_checkpoint.vae_shapes(WAN_VAE) == published(data, "vae")


def test_the_built_in_checkpoint_is_what_the_script_writes(tmp_path):
    random_checkpoint.write_checkpoint(tmp_path, dtype=ml_dtypes.bfloat16)
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == {
        path.relative_to(BUILT_IN) for path in BUILT_IN.rglob("*")
    }
    for part in ("transformer", "vae"):
        ours, built_in = (load_file(folder / part / FILE) for folder in (tmp_path, BUILT_IN))
        assert ours.keys() == built_in.keys()
        for name, tensor in ours.items():
            np.testing.assert_array_equal(tensor, built_in[name], err_msg=name)


def test_every_weight_matters():
    # Norms are not 1, biases not 0, nothing is constant.
    for part in ("transformer", "vae"):
        for name, tensor in load_file(BUILT_IN / part / FILE).items():
            assert np.float32(tensor).std() > 0.01, name


def test_a_new_tokenizer_fits_the_vocabulary(tmp_path):
    random_checkpoint.write_tokenizer(tmp_path)
    assert len(load_tokenizer(tmp_path, TINY.vocab_size)) <= TINY.vocab_size

"""The sound encoder: the reference's latents, layer by layer and as a whole, and nothing of a sound or of a weight is lost."""

import functools
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from metrics import errors

from cosmos3_jax import make_mesh
from cosmos3_jax.checkpoint import Checkpoint, load
from cosmos3_jax.config import SoundConfig, SoundEncoderConfig
from cosmos3_jax.models.sound_encoder import SoundEncoder
from cosmos3_jax.networks import abstract_sound_encoder
from cosmos3_jax.pipeline import encode_sound
from cosmos3_jax.weights import Network, by_path, map_weights

# Sums of up to 300 products, added up in other orders; eleven layers of them, with sines between, move no latent by more than
# 4e-6 of the standard deviation.
LAYER, WHOLE = 2e-6, 1e-5

MONO = SoundEncoderConfig(
    stereo=False,
    enc_dim=5,
    enc_num_blocks=1,
    enc_n_fft=32,
    enc_hop_length=8,
    enc_latent_dim=6,
    enc_c_mults=(2, 1),
    enc_strides=(3, 2),
)
LOUD = SoundEncoderConfig(
    input_channels=3,
    stereo=False,
    normalize_volume=False,
    enc_dim=4,
    enc_num_blocks=3,
    enc_n_fft=10,  # the odd rest goes to the right
    enc_hop_length=5,
    enc_latent_dim=2,
    enc_c_mults=(3,),
    enc_strides=(2,),
)
CONFIGS = {
    "published strides": cases.FULL_SOUND,
    "mono": SoundConfig(
        vocoder_input_dim=3, dec_dim=2, dec_c_mults=(1, 2), dec_strides=(6, 8), dec_out_channels=1, encoder=MONO
    ),
    "loud": SoundConfig(
        vocoder_input_dim=1, dec_dim=2, dec_c_mults=(1, 1), dec_strides=(2, 5), dec_out_channels=3, encoder=LOUD
    ),
}


@pytest.fixture(scope="module")
def encoders(folders_with):
    """`encoders(config)`: the encoder of that checkpoint."""
    return functools.cache(lambda config: loaded(folders_with(config)))


@pytest.fixture(scope="module")
def encoder(folders):
    """That of the checkpoint on which the reference was recorded."""
    return loaded(folders("full_sound"))


def loaded(folder: Path) -> Network:
    checkpoint = Checkpoint.open(folder, sound_encoder=True)
    abstract = abstract_sound_encoder(checkpoint.sound.encoder, make_mesh())
    return load(checkpoint.audited({"sound_encoder": abstract}), "sound_encoder", abstract)


def wave(config: SoundConfig, length: int) -> np.ndarray:
    return (0.3 * np.random.RandomState(length).standard_normal((length, config.encoder.channels))).astype(np.float32)


# As the reference does it


@pytest.mark.parametrize("length", cases.WAVE_LENGTHS)
def test_equals_reference(length, encoder, goldens):
    expected = goldens("sound_encoder")[str(length)]
    assert expected.shape == (-(-length // 1920), cases.FULL_SOUND.vocoder_input_dim)
    assert errors(np.asarray(encode_sound(encoder, cases.wave(length))), expected)[1] < WHOLE


def test_spectra_equal_reference(encoder, goldens):
    ours = encoder.merge().spectra(jnp.asarray(cases.wave(48_000)[:1920]))
    assert ours.shape == (120, 132)
    assert errors(np.asarray(ours)[:5], goldens("sound_encoder")["spectra"])[1] < LAYER


@pytest.mark.parametrize("i", range(11))
def test_layer_equals_reference(i, encoder, goldens):
    layer = encoder.merge().layers[i]
    channels = layer.dwconv.weight.shape[-1] if hasattr(layer, "dwconv") else layer.weight.shape[-2]
    ours = layer(jnp.asarray(cases.spectra(channels)))
    assert errors(np.asarray(ours), goldens("sound_encoder")[f"layers.{i}"])[1] < LAYER


@pytest.mark.live
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_other_sizes_equal_the_reference(config, encoders, folders_with):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import reference

    theirs = reference.sound_tokenizer(folders_with(config))
    hop = config.samples_per_latent
    for length in (hop + 1, 3 * hop, 30 * hop - 1):
        expected = reference.latents_of(theirs, wave(config, length))
        assert errors(np.asarray(encode_sound(encoders(config), wave(config, length))), expected)[1] < WHOLE


# What a sound becomes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_latent_is_as_many_samples_as_of_the_decoder(config, encoders):
    hop = config.samples_per_latent
    for length, count in ((1, 1), (hop, 1), (hop + 1, 2), (5 * hop, 5)):
        latents = encode_sound(encoders(config), wave(config, length))
        assert (latents.shape, latents.dtype) == ((count, config.vocoder_input_dim), np.float32)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_silence_makes_the_last_latent_whole(config, encoders):
    hop = config.samples_per_latent
    part = wave(config, 2 * hop + hop // 2)
    padded = np.pad(part, ((0, 3 * hop - len(part)), (0, 0)))
    np.testing.assert_allclose(*(encode_sound(encoders(config), x) for x in (part, padded)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_volume_is_normalized_if_the_config_says_so(name, encoders):
    config = CONFIGS[name]
    x = wave(config, 4 * config.samples_per_latent)
    as_it_is, quiet = (np.asarray(encode_sound(encoders(config), factor * x)) for factor in (1, 0.1))
    differs = errors(quiet, as_it_is)[1]
    # normalized, it differs by the 1e-5 that keep silence from being divided by zero
    assert differs > 0.1 if name == "loud" else differs < 1e-3


def test_silence_has_latents(encoder):
    assert np.isfinite(encode_sound(encoder, np.zeros((1920, 2), np.float32))).all()


def test_every_sample_of_every_channel_is_heard(encoder):
    x = jnp.asarray(cases.wave(2 * 1920))
    unheard = jax.grad(lambda x: jnp.sum(encode_sound(encoder, x) * cases.sound_latents(2)))(x) == 0
    assert not unheard.any()


# Weights


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_flow_to_every_weight(config, encoders):
    """To every single one, but for those of the posterior's scale, and of imaginary parts that are zero by symmetry."""
    encoder, x = encoders(config), wave(config, 6 * config.samples_per_latent)
    target = np.random.RandomState(0).standard_normal((6, config.vocoder_input_dim)).astype(np.float32)
    slopes = by_path(jax.grad(lambda encoder: jnp.sum(encode_sound(encoder, x) * target))(encoder).weights)
    last, bins = f"layers.{len(encoder.merge().layers) - 1}.weight", config.encoder.enc_n_fft // 2 + 1
    for path, slope in slopes.items():
        expected = np.ones(slope.shape, bool)
        if path == last:
            expected[:, config.vocoder_input_dim :] = False
        if path == "layers.0.weight":  # of each channel, the first and the last frequency
            expected.reshape(config.encoder.channels, 2, bins, -1)[:, 1, [0, -1]] = False
        np.testing.assert_array_equal(np.asarray(slope[...]) != 0, expected, err_msg=path)


def test_the_weights_are_float32_and_whole_on_every_device(encoder):
    abstract = abstract_sound_encoder(cases.FULL_SOUND.encoder, make_mesh(2, 4))
    for w in by_path(abstract.weights).values():
        assert (w.dtype, w.get_value().sharding.is_fully_replicated) == (np.float32, True)


def test_latents_are_whole_on_every_device(encoder):
    """Also of a waveform that is divided over them."""
    mesh, x = make_mesh(2, 4), cases.wave(3840)
    abstract, values = abstract_sound_encoder(cases.FULL_SOUND.encoder, mesh), by_path(encoder.weights)
    weights = map_weights(lambda path, w: jax.device_put(values[path][...], w.get_value().sharding), abstract.weights)
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("cfg", "tp"))))
    with jax.set_mesh(mesh):
        latents = encode_sound(Network(abstract.graph, weights), divided)
    assert len(latents.sharding.device_set) == 8
    assert latents.sharding.is_fully_replicated
    assert errors(np.asarray(latents), np.asarray(encode_sound(encoder, x)))[1] < WHOLE


def test_every_layer_is_built_once():
    """Blocks before each stride, one projection at either end."""
    layers = SoundEncoder(SoundEncoderConfig()).layers
    kinds = "".join({"Linear": "l", "Block": "b", "StridedConv": "s"}[type(layer).__name__] for layer in layers)
    assert kinds == "lbbsbbsbbsl"

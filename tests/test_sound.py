"""The sound decoder: the reference's waveform, in one pass or in windows that take no more memory however long the sound."""

import functools
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metrics import errors, random, sample

from cosmos3_jax import make_mesh
from cosmos3_jax.checkpoint import load
from cosmos3_jax.config import TINY, TINY_SOUND, SoundConfig
from cosmos3_jax.models import sound
from cosmos3_jax.models.sound import SoundDecoder
from cosmos3_jax.pipeline import decode_sound
from cosmos3_jax.published import PublishedWeights
from cosmos3_jax.weights import Network, Weight, by_path, map_weights, split

CONFIGS = {  # by their strides, the output's first
    "2 4 5 6 8": TINY_SOUND,
    "3": SoundConfig(vocoder_input_dim=5, dec_dim=6, dec_c_mults=(2,), dec_strides=(3,), dec_out_channels=1),
    "2": SoundConfig(vocoder_input_dim=1, dec_dim=3, dec_c_mults=(1,), dec_strides=(2,)),
    "5 3 7": SoundConfig(vocoder_input_dim=4, dec_dim=2, dec_c_mults=(3, 1, 2), dec_strides=(5, 3, 7), dec_out_channels=3),
    "4 8 10": SoundConfig(vocoder_input_dim=16, dec_dim=8, dec_c_mults=(1, 2, 4), dec_strides=(4, 8, 10)),
}
IN_ONE_PASS = 10**6


@pytest.fixture(scope="module")
def decoders(folders_with):
    """`decoders(config)`: the decoder of that checkpoint."""

    @functools.cache
    def decoder(config: SoundConfig) -> Network:
        return load(
            PublishedWeights(folders_with(config), TINY), "sound", split(SoundDecoder(config), make_mesh(), jnp.float32)
        )

    return decoder


@pytest.fixture
def decode(monkeypatch):
    """`decode(decoder, latents, window)`: the waveform, made in windows of so many latents."""

    @functools.cache
    def compiled(window: int):
        # a function for each window: jit would find the program of another one
        return jax.jit(lambda decoder, x: decoder.merge().decode(x))

    def run(decoder: Network, latents_sc: np.ndarray, window: int = IN_ONE_PASS) -> np.ndarray:
        monkeypatch.setattr(sound, "WINDOW", window)
        return np.asarray(compiled(window)(decoder, latents_sc))

    return run


@pytest.mark.parametrize("length", cases.SOUND_LENGTHS)
def test_equals_reference(length, pipes, goldens):
    ours = np.asarray(decode_sound(pipes("small").residence.bring("sound"), cases.sound_latents(length))).T
    rms, largest = errors(sample(ours), goldens("sound")[str(length)])
    assert rms < 2e-6  # thirty convolutions, added up in other orders, and sines of what they give
    assert largest < 2e-5


@pytest.mark.live
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # diffusers' own
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_other_sizes_equal_the_reference(config, decoders, folders_with, decode):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.Cosmos3AVAEAudioTokenizer.from_pretrained(folders_with(config) / "sound_tokenizer")
    for length in (1, 2, 30):
        latents = random(length, config.vocoder_input_dim)
        with torch.inference_mode():
            expected = theirs.decode(torch.from_numpy(latents.T)).numpy().T
        assert expected.std() > 0.01
        assert errors(decode(decoders(config), latents), expected)[1] < 2e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_latent_is_as_many_samples_as_the_strides_make(config, decoders, decode):
    longer = 2 + 2 * SoundDecoder(config).reach + 1
    for length in (1, longer):  # in one pass, and in windows of two
        waveform = decode(decoders(config), random(length, config.vocoder_input_dim), 2)
        assert waveform.shape == (length * math.prod(config.dec_strides), config.dec_out_channels)
        assert waveform.dtype == np.float32


@pytest.mark.parametrize(("strides", "window"), [("3", 1), ("3", 5), ("5 3 7", 4)])
def test_windows_change_nothing(strides, window, decoders, decode):
    # Of every length around those where the number of windows changes, the last one full, almost empty, or not needed.
    config = CONFIGS[strides]
    most = window + 2 * SoundDecoder(config).reach  # in one pass
    for length in (window, most - 1, most, most + 1, most + window, 2 * most + 1):
        latents = random(length, config.vocoder_input_dim)
        whole = decode(decoders(config), latents)
        # another length may be added up in another order
        assert errors(decode(decoders(config), latents, window), whole)[1] < 1e-5, length


@pytest.mark.parametrize("length", [86, 87, 129])  # a window of 64, with 11 latents to either side, is 86
def test_windows_of_the_size_that_is_used_change_nothing(length, pipes, decode):
    decoder, latents = pipes("small").residence.bring("sound"), cases.sound_latents(length)
    assert errors(np.asarray(decode_sound(decoder, latents)), decode(decoder, latents))[1] < 2e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_reach_is_enough_and_not_wasteful(config, decoders, decode):
    # What depends on a latent is NaN if that is. Counted in whole latents, the reach may be one too far.
    reach, rate = SoundDecoder(config).reach, math.prod(config.dec_strides)
    middle = reach + 2
    latents = random(2 * middle + 1, config.vocoder_input_dim)
    latents[middle] = np.nan
    reached = np.flatnonzero(np.isnan(decode(decoders(config), latents)).any(axis=1)) // rate - middle
    assert -reach <= reached.min() <= -reach + 1
    assert reach - 1 <= reached.max() <= reach


def test_both_ends_are_silent_beyond(decoders, decode):
    # A sound's first and last windows see what lies beyond it, and none of it may sound: not even a bias.
    config = CONFIGS["5 3 7"]
    latents = random(60, config.vocoder_input_dim)
    whole, middle = (decode(decoders(config), part, 4) for part in (latents, latents[20:40]))
    rate, reach = math.prod(config.dec_strides), SoundDecoder(config).reach
    inner = slice(20 * rate, 40 * rate)
    assert errors(middle[:rate], whole[inner][:rate])[1] > 1e-2  # beginning there, it sounds otherwise
    later = decode(decoders(config), latents[20:], 4)
    np.testing.assert_allclose(later[reach * rate :], whole[(20 + reach) * rate :], atol=1e-6)


def test_a_long_sound_takes_no_more_memory(pipes, monkeypatch):
    monkeypatch.setattr(sound, "WINDOW", 16)
    decoder = pipes("small").residence.bring("sound")

    def needs(windows: int) -> tuple[int, int]:
        latents = jax.ShapeDtypeStruct((16 * windows, TINY_SOUND.vocoder_input_dim), jnp.float32)
        compiled = jax.jit(lambda decoder, x: decoder.merge().decode(x)).lower(decoder, latents).compile()
        analysis = compiled.memory_analysis()
        return analysis.temp_size_in_bytes, analysis.output_size_in_bytes

    (few, waveform), (many, longer) = needs(8), needs(16)
    assert longer == 2 * waveform
    assert many - few < 0.01 * few  # the padded latents
    assert few < 5 * waveform  # of 5.3 windows: all at once, the activations would be many times the waveform


def test_values_are_clipped(pipes, decode):
    decoder = pipes("small").residence.bring("sound")

    def times(factor: float) -> np.ndarray:
        louder = map_weights(lambda path, w: (factor if path == "conv2.weight" else 1) * w[...], decoder.weights)
        return decode(decoder.replace(weights=louder), cases.sound_latents(7))

    quiet, loud = times(0.1), times(10)
    assert np.abs(quiet).max() < 1
    assert (loud.min(), loud.max()) == (-1, 1)
    np.testing.assert_allclose(loud, np.clip(100 * quiet, -1, 1), atol=1e-4)  # a hundred times the rounding


@pytest.mark.parametrize("window", [1, IN_ONE_PASS])
def test_nan_in_any_weight_reaches_the_waveform(window, decoders, decode):
    # No weight is dead or forgotten. Of both halves of a transposed kernel, each one.
    config = CONFIGS["3"]
    decoder, latents = decoders(config), random(40, config.vocoder_input_dim)
    assert np.isfinite(decode(decoder, latents, window)).all()
    for path, w in by_path(decoder.weights).items():
        for index in {(0,) * w.ndim, tuple(size - 1 for size in w.shape)}:
            poisoned = decoder.replace(weights=map_weights(functools.partial(poison, path, index), decoder.weights))
            assert np.isnan(decode(poisoned, latents, window)).any(), (path, index)


def poison(target: str, index: tuple[int, ...], path: str, w: Weight) -> jax.Array:
    return w[...].at[index].set(np.nan) if path == target else w[...]

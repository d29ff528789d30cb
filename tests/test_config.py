"""Configs: the presets are what is published, and what is not implemented is refused by name."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from cosmos3_jax.config import (
    EDGE,
    NANO,
    PRESETS,
    SOUND_TOKENIZER,
    SUPER,
    TINY,
    TINY_SOUND,
    TINY_VAE,
    WAN_VAE,
    InputError,
    SchedulerConfig,
    SoundConfig,
    SoundEncoderConfig,
    TransformerConfig,
    VAEConfig,
)

FOLDER = Path(__file__).parent / "data" / "configs"
PUBLISHED = {path.stem.removesuffix("_config"): json.loads(path.read_text()) for path in FOLDER.glob("*.json")}


READERS = {
    "transformer": TransformerConfig,
    "vae": VAEConfig,
    "scheduler": SchedulerConfig,
    "sound_tokenizer": SoundConfig,
}


@pytest.mark.parametrize("model", ["nano", "super", "edge"])
def test_presets_are_the_published_transformers(model):
    assert TransformerConfig.from_json(PUBLISHED[f"{model}_transformer"]) == PRESETS[model]


@pytest.mark.parametrize("model", ["nano", "edge"])
def test_every_model_has_one_vae_and_one_scheduler(model):
    assert VAEConfig.from_json(PUBLISHED[f"{model}_vae"]) == WAN_VAE
    assert SchedulerConfig.from_json(PUBLISHED[f"{model}_scheduler"]) == SchedulerConfig()


def test_the_sound_tokenizer_is_the_published_one():
    config = SoundConfig.from_json(PUBLISHED["nano_sound_tokenizer"])
    assert config == dataclasses.replace(SOUND_TOKENIZER, hop_size=1920)
    assert config.samples_per_latent == SOUND_TOKENIZER.samples_per_latent == 1920
    assert SoundConfig.from_json({}) == SOUND_TOKENIZER
    for model in (NANO, SUPER):
        assert model.sound_gen
        assert (model.sound_dim, model.sound_latent_fps) == (config.vocoder_input_dim, config.sampling_rate / 1920)


def test_the_sound_encoder_is_the_published_one():
    config = SoundConfig.from_json(PUBLISHED["nano_sound_tokenizer"], encoder=True)
    assert config == dataclasses.replace(SOUND_TOKENIZER, hop_size=1920, encoder=SoundEncoderConfig())
    assert (config.encoder.channels, config.encoder.samples_per_latent) == (config.dec_out_channels, 1920)
    assert SoundEncoderConfig(input_channels=3, stereo=False).channels == 3
    assert SoundConfig.from_json({"encoder": {"type": "none"}}) == SOUND_TOKENIZER  # no key of the published files


ODD_ENCODERS = [
    ({"encoder_enabled": False}, "encoder_enabled=False, so no sound can be learned from; leave sound out"),
    ({"use_wav_as_input": False}, "use_wav_as_input=False is not supported; only True is"),
    ({"enc_type": "oobleck"}, "enc_type='oobleck' is not supported; only 'spec_convnext' is"),
    ({"enc_use_snake": False}, "enc_use_snake=False is not supported; only True is"),
    ({"bottleneck_type": "fsq"}, "bottleneck_type='fsq' is not supported; only 'vae' is"),
    ({"bottleneck": {"type": "fsq"}}, "bottleneck: type='fsq' is not supported; only 'vae' is"),
    ({"causal": True}, "causal=True is not supported; only False is"),
    ({"padding_mode": "reflect"}, "padding_mode='reflect' is not supported; only 'zeros' is"),
    ({"stereo": 2}, "stereo=2 is not of the type of True"),
    ({"enc_dim": 0}, "enc_dim=0 should be above 0 and at most 1000000000"),
    ({"enc_num_blocks": 101}, "enc_num_blocks=101 should be above 0 and at most 100"),
    (
        {"enc_c_mults": [1, 2]},
        "enc_c_mults=(1, 2) should be whole numbers above 0, at most 16 and as many as enc_strides=(4, 5, 6),",
    ),
    ({"enc_strides": []}, "enc_c_mults=(1, 2, 4) should be .* as many as enc_strides=(),"),
    ({"enc_strides": [4, 5, 1]}, "enc_c_mults=(1, 2, 4) should be .* enc_strides=(4, 5, 1), which should be above 1"),
    ({"enc_c_mults": [1] * 17, "enc_strides": [2] * 17}, "enc_c_mults=.* should be whole numbers above 0, at most 16"),
    ({"enc_n_fft": 65}, "enc_n_fft=65 should be even, and at least enc_hop_length=16"),
    ({"enc_n_fft": 14}, "enc_n_fft=14 should be even, and at least enc_hop_length=16"),
    ({"enc_latent_dim": 64}, "enc_latent_dim=64 should be twice vocoder_input_dim=64"),
    (
        {"enc_strides": [4, 5, 5]},
        "enc_hop_length=16 and enc_strides=[4, 5, 5] make 1600 samples a latent, and the decoder 1920; they should agree",
    ),
]


@pytest.mark.parametrize(("changes", "words"), ODD_ENCODERS, ids=str)
def test_what_a_sound_encoder_cannot_be_matters_only_where_one_is_asked_for(changes, words):
    json_ = PUBLISHED["nano_sound_tokenizer"] | changes
    pattern = "^sound_tokenizer/config.json: " + re.escape(words).replace(r"\.\*", ".*")
    with pytest.raises(InputError, match=pattern):
        SoundConfig.from_json(json_, encoder=True)
    assert SoundConfig.from_json(json_) == dataclasses.replace(SOUND_TOKENIZER, hop_size=1920)


def test_a_sound_latent_stands_for_what_its_strides_make_unless_it_says_otherwise():
    assert dataclasses.replace(SOUND_TOKENIZER, dec_strides=(3, 5), hop_size=None).samples_per_latent == 15
    assert dataclasses.replace(SOUND_TOKENIZER, dec_strides=(3, 5), hop_size=7).samples_per_latent == 7


@pytest.mark.parametrize(
    "config",
    [NANO, SUPER, EDGE, TINY, WAN_VAE, TINY_VAE, SchedulerConfig(sigma_max=80.0), TINY_SOUND, SoundConfig(hop_size=960)],
)
def test_a_config_survives_json(config):
    fixed = {"is_residual": True} if isinstance(config, VAEConfig) else {}
    written = json.loads(json.dumps(fixed | dataclasses.asdict(config)))
    assert type(config).from_json(written) == config


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("transformer", "attention_bias", True),
        ("transformer", "hidden_act", "gelu"),
        ("transformer", "patch_latent_dim", 64),
        ("vae", "is_residual", False),
        ("vae", "attn_scales", [0.5]),
        ("scheduler", "_class_name", "DDIMScheduler"),
        ("scheduler", "prediction_type", "epsilon"),
        ("scheduler", "predict_x0", False),
        ("scheduler", "solver_order", 3),
        ("scheduler", "solver_type", "bh1"),
        ("scheduler", "lower_order_final", False),
        ("scheduler", "final_sigmas_type", "sigma_min"),
        ("scheduler", "disable_corrector", [0]),
        ("scheduler", "solver_p", "DPMSolver"),
        ("scheduler", "thresholding", True),
        ("scheduler", "use_dynamic_shifting", True),
        ("scheduler", "shift_terminal", 0.1),
        ("sound_tokenizer", "model_type", "autoencoder_v1"),
        ("sound_tokenizer", "dec_type", "hifigan"),
        ("sound_tokenizer", "dec_use_snake", False),
        ("sound_tokenizer", "dec_final_tanh", True),
        ("sound_tokenizer", "dec_anti_aliasing", True),
        ("sound_tokenizer", "dec_use_nearest_upsample", True),
        ("sound_tokenizer", "dec_use_tanh_at_final", True),
        ("sound_tokenizer", "activation", "elu"),
        ("sound_tokenizer", "snake_logscale", False),
        ("sound_tokenizer", "anti_aliasing", True),
        ("sound_tokenizer", "latent_mean", 0.0),
        ("sound_tokenizer", "latent_std", [1.0] * 64),
        ("sound_tokenizer", "quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(kind, key, value):
    reader = READERS[kind]
    with pytest.raises(InputError, match=rf"^{kind}/\w*config.json: " + re.escape(f"{key}={value!r} ")):
        reader.from_json(PUBLISHED[f"nano_{kind}"] | {key: value})


DISTILLED = {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True, "shift": 1.0}
SIGMAS = [1.0, 0.9375, 0.8333333333333334, 0.625]


def with_sigmas(*sigmas):
    return DISTILLED | {"fixed_step_sampler_config": {"sample_type": "sde", "t_list": list(sigmas)}}


@pytest.mark.parametrize(
    ("scheduler", "modular"),
    [
        (with_sigmas(*SIGMAS), {}),
        (with_sigmas(*SIGMAS), {"distilled_sigmas": SIGMAS}),
        (DISTILLED, {"distilled_sigmas": SIGMAS}),
    ],
)
def test_a_distilled_checkpoint_names_its_sigmas_in_either_file(scheduler, modular):
    assert SchedulerConfig.from_json(scheduler, modular) == SchedulerConfig(distilled_sigmas=tuple(SIGMAS))


@pytest.mark.parametrize(
    ("scheduler", "modular", "sentence"),
    [
        (DISTILLED, {}, "one list of sigmas is expected"),
        (with_sigmas(*SIGMAS), {"distilled_sigmas": [1.0, 0.5]}, "one list of sigmas is expected"),
        (with_sigmas(), {}, "should fall from 1"),
        (with_sigmas(0.5, 1.0), {}, "should fall from 1"),
        (with_sigmas(1.0, 0.0), {}, "should fall from 1"),
        (with_sigmas(1.5, 0.5), {}, "should fall from 1"),
        (with_sigmas(1.0, float("nan")), {}, "should fall from 1"),
        (with_sigmas("1.0", None), {}, "should fall from 1"),
        (DISTILLED | {"fixed_step_sampler_config": 4}, {}, "should fall from 1"),
        (with_sigmas(*SIGMAS) | {"shift": 3.0}, {}, "shift=3.0 is not supported"),
        (with_sigmas(*SIGMAS) | {"stochastic_sampling": False}, {}, "stochastic_sampling=False is not supported"),
        (with_sigmas(*SIGMAS) | {"use_karras_sigmas": True}, {}, "use_karras_sigmas=True is not supported"),
    ],
)
def test_other_samplers_of_that_name_are_refused(scheduler, modular, sentence):
    with pytest.raises(InputError, match=rf"^scheduler/scheduler_config.json: .*{sentence}"):
        SchedulerConfig.from_json(scheduler, modular)


def test_quantized_weights_are_refused():
    with pytest.raises(InputError, match="quantized weights are not supported; take the revision in bfloat16"):
        TransformerConfig.from_json(PUBLISHED["nano_transformer"] | {"quantization_config": {"quant_method": "fp8"}})


def test_a_vae_that_does_not_say_what_it_is_is_the_older_one():
    with pytest.raises(InputError, match="is_residual=False"):
        VAEConfig.from_json({key: value for key, value in PUBLISHED["nano_vae"].items() if key != "is_residual"})


def test_a_vae_may_have_one_width_for_both_halves():
    config = VAEConfig.from_json(PUBLISHED["nano_vae"] | {"base_dim": 96, "decoder_base_dim": None})
    assert (config.base_dim, config.decoder_base_dim) == (96, 96)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (24, 20, 20)),
        ({"rope_scaling": None}, (24, 20, 20)),
        ({"rope_scaling": {"mrope_section": [16, 24, 24]}}, (16, 24, 24)),
        ({"rope_axes_dim": [16, 24, 24]}, (16, 24, 24)),
        ({"rope_axes_dim": [16, 24, 24], "rope_scaling": {"mrope_section": [24, 20, 20]}}, (16, 24, 24)),
        ({"rope_axes_dim": None, "rope_scaling": {"mrope_section": [16, 24, 24]}}, (16, 24, 24)),
    ],
)
def test_rotary_slots_come_from_either_key(keys, expected):
    assert TransformerConfig.from_json(keys).rope_axes_dim == expected


@pytest.mark.parametrize(
    ("clip", "latents"),
    [((1, 720, 1280), (1, 45, 80)), ((5, 64, 96), (2, 4, 6)), ((189, 720, 1280), (48, 45, 80)), ((193, 16, 16), (49, 1, 1))],
)
def test_latent_shape(clip, latents):
    assert WAN_VAE.latent_shape(*clip) == latents


@pytest.mark.parametrize("config", [NANO, SUPER, EDGE], ids=["nano", "super", "edge"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_published_models_divide_over_up_to_8_devices(config, tp):
    config.check_tensor_parallel(tp)


@pytest.mark.parametrize(
    ("config", "tp", "message"),
    [
        (NANO, 3, "tp=3 does not divide 32 query heads; use tp in {1, 2, 4, 8}"),
        (SUPER, 16, "tp=16 does not divide 8 key/value heads; use tp in {1, 2, 4, 8}"),
        (dataclasses.replace(NANO, intermediate_size=12), 8, "tp=8 does not divide 12 MLP columns; use tp in {1, 2, 4}"),
    ],
)
def test_other_divisions_are_refused(config, tp, message):
    with pytest.raises(InputError) as error:
        config.check_tensor_parallel(tp)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (TransformerConfig, "hidden_size", "64"),
        (TransformerConfig, "hidden_size", 64.0),
        (TransformerConfig, "qk_norm_for_text", 1),
        (TransformerConfig, "rope_axes_dim", 24),
        (VAEConfig, "dim_mult", {"0": 1}),
        (SchedulerConfig, "num_train_timesteps", "1000"),
        (TransformerConfig, "sound_gen", 1),
        (TransformerConfig, "sound_latent_fps", "25"),
        (SoundConfig, "sampling_rate", 48000.0),
        (SoundConfig, "vocoder_input_dim", "64"),
        (SoundConfig, "dec_dim", True),
        (SoundConfig, "dec_c_mults", 16),
        (SoundConfig, "dec_strides", "24568"),
        (SoundConfig, "dec_out_channels", 2.0),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(kind, key, value):
    with pytest.raises(InputError, match=f"json: {key}={re.escape(repr(value))} is not of the type of"):
        kind.from_json({"is_residual": True, key: value})


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (TransformerConfig, "num_key_value_heads", 0),
        (TransformerConfig, "hidden_size", -64),
        (TransformerConfig, "base_fps", 0.0),
        (TransformerConfig, "sound_dim", 0),
        (TransformerConfig, "sound_latent_fps", 0),
        (SoundConfig, "sampling_rate", 0),
        (SoundConfig, "sampling_rate", 1_000_001),
        (SoundConfig, "vocoder_input_dim", -1),
        (SoundConfig, "dec_dim", 0),
        (SoundConfig, "dec_out_channels", 0),
        (SoundConfig, "hop_size", 0),
        (SoundConfig, "hop_size", -1920),
    ],
)
def test_sizes_are_above_zero(kind, key, value):
    with pytest.raises(InputError, match=rf"json: {key}={value}\b.* should be above 0 and at most \d+$"):
        kind.from_json({key: value})


@pytest.mark.parametrize("value", [1920.0, "1920", True, [1920]], ids=repr)
def test_a_hop_is_a_whole_number(value):
    value = tuple(value) if isinstance(value, list) else value
    expected = f"sound_tokenizer/config.json: hop_size={value!r} is not a whole number"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        SoundConfig.from_json({"hop_size": value})


@pytest.mark.parametrize(
    "changes",
    [
        {"dec_strides": [2, 4, 5, 6]},
        {"dec_strides": []},
        {"dec_c_mults": [1, 2, 4, 8, 16, 32]},
        {"dec_strides": [2, 4, 5, 6, 0]},
        {"dec_c_mults": [1, -2, 4, 8, 16]},
        {"dec_c_mults": [], "dec_strides": []},
        {"dec_c_mults": [1] * 17, "dec_strides": [1] * 17},
    ],
    ids=str,
)
def test_every_stride_of_the_sound_decoder_has_a_width(changes):
    mults, strides = (tuple(changes.get(key, getattr(SOUND_TOKENIZER, key))) for key in ("dec_c_mults", "dec_strides"))
    expected = (
        f"sound_tokenizer/config.json: dec_c_mults={mults} should be whole numbers above 0, at most 16 and as many as "
        f"dec_strides={strides}"
    )
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        SoundConfig.from_json(PUBLISHED["nano_sound_tokenizer"] | changes)


def test_sound_heads_have_a_size():
    without = {key: value for key, value in PUBLISHED["nano_transformer"].items() if key != "sound_dim"}
    for json_ in (without, without | {"sound_dim": None}):
        with pytest.raises(InputError, match=r"^transformer/config.json: sound_gen=True, but there is no sound_dim$"):
            TransformerConfig.from_json(json_)
        silent = TransformerConfig.from_json(json_ | {"sound_gen": False})
        assert (silent.sound_dim, silent.sizes["A"]) == (None, 0)


@pytest.mark.parametrize("value", ["64", 64.5, True, [64], {}, ""], ids=repr)
def test_the_size_of_sound_heads_is_a_whole_number(value):
    with pytest.raises(InputError, match=r"^transformer/config.json: sound_dim="):
        TransformerConfig.from_json(PUBLISHED["nano_transformer"] | {"sound_dim": value})


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="num_key_value_heads=3 does not divide num_attention_heads=32"):
        TransformerConfig.from_json({"num_key_value_heads": 3})
    with pytest.raises(InputError, match=r"rope_axes_dim=\[24, 40\] should be slots of t, h, w"):
        TransformerConfig.from_json({"rope_axes_dim": [24, 40]})
    with pytest.raises(InputError, match="latents_mean and latents_std should have z_dim=48 values"):
        VAEConfig.from_json({"is_residual": True, "latents_mean": [0.0]})

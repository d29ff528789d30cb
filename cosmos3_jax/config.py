"""What a checkpoint's JSON says, as frozen dataclasses, and the published models as presets.

Field names are those of the published files. A key that is absent takes the published value (Nano's), a key that changes
nothing here is ignored, and a value that this project does not implement is refused by name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from cosmos3_jax.errors import InputError, shown

# of what a hostile file could have us loop over, or fill memory with
MOST = {"num_hidden_layers": 1000, "num_res_blocks": 100, "enc_num_blocks": 100, "sampling_rate": 1e6}
LEAST = {"unified_3d_mrope_temporal_modality_margin": 0}


def _fields(cls: type, file: str, json: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `json` that are fields of `cls`, lists made tuples; null means the default.

    Raises InputError for a value of another type than the default's.
    """
    known = {}
    for field in dataclasses.fields(cls):
        value: Any = json.get(field.name)
        if value is None:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if type(field.default) is float and type(value) is int:
            value = float(value)
        if not (type(value) is int if field.default is None else _alike(value, field.default)):
            kind = "a whole number" if field.default is None else f"of the type of {shown(field.default)}"
            raise InputError(f"{file}: {field.name}={shown(value)} is not {kind}")
        if type(value) in (int, float) and not (0 < value <= MOST.get(field.name, 1e9) or value == 0 == LEAST.get(field.name)):
            raise InputError(f"{file}: {field.name}={value!r} should be above 0 and at most {MOST.get(field.name, 1e9):.0f}")
        known[field.name] = value
    return known


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of the type of a default; of a tuple, whether it is short and all its elements are."""
    if not isinstance(default, tuple):
        return type(value) is type(default)
    kinds = {int: (int,), bool: (bool,), float: (int, float)}[type(default[0])] if default else ()
    return isinstance(value, tuple) and len(value) < 1000 and all(type(each) in kinds and abs(each) < 1e9 for each in value)


def _require(file: str, json: Mapping[str, Any], **values: Any) -> None:
    """Refuses a config whose keys, where present, differ from the values that are implemented."""
    for key, value in values.items():
        if json.get(key, value) != value:
            raise InputError(f"{file}: {key}={json[key]!r} is not supported; only {value!r} is")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """`transformer/config.json`; the defaults are Cosmos3-Nano's."""

    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    hidden_act: str = "silu"  # "silu": gated (Nano, Super); "relu2": squared ReLU (Edge)
    rms_norm_eps: float = 1e-6
    qk_norm_for_text: bool = True
    use_und_k_norm_for_gen: bool = False
    rope_theta: float = 5e6
    rope_axes_dim: tuple[int, int, int] = (24, 20, 20)  # rotary slots of the (t, h, w) axes
    latent_channel: int = 48
    latent_patch_size: int = 2
    timestep_scale: float = 0.001
    base_fps: float = 24.0
    enable_fps_modulation: bool = True
    unified_3d_mrope_reset_spatial_ids: bool = True
    unified_3d_mrope_temporal_modality_margin: int = 15000
    sound_gen: bool = False
    sound_dim: int | None = None
    sound_latent_fps: float = 25.0
    action_gen: bool = False
    action_dim: int | None = None
    num_embodiment_domains: int = 32

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """Reads `transformer/config.json`. Raises InputError for an architecture that is not implemented."""
        _require("transformer/config.json", json, attention_bias=False)
        if json.get("quantization_config") is not None:
            raise InputError("transformer/config.json: quantized weights are not supported; take the revision in bfloat16")
        file, scaling = "transformer/config.json", json.get("rope_scaling")
        section = scaling.get("mrope_section") if isinstance(scaling, Mapping) else None
        config = cls(**_fields(cls, file, {"rope_axes_dim": section}) | _fields(cls, file, json))
        if config.hidden_act not in ("silu", "relu2"):
            raise InputError(f"transformer/config.json: hidden_act={config.hidden_act!r} is neither 'silu' nor 'relu2'")
        if scaling is not None and not isinstance(scaling, Mapping):
            raise InputError(f"transformer/config.json: rope_scaling={shown(scaling)} should be an object")
        if config.num_attention_heads % config.num_key_value_heads:
            raise InputError(
                f"transformer/config.json: num_key_value_heads={config.num_key_value_heads} does not divide "
                f"num_attention_heads={config.num_attention_heads}"
            )
        if config.sound_gen and config.sound_dim is None:
            raise InputError("transformer/config.json: sound_gen=True, but there is no sound_dim")
        slots = config.rope_axes_dim
        if len(slots) != 3 or min(slots) < 0 or 2 * sum(slots) != config.head_dim:
            raise InputError(
                f"transformer/config.json: rope_axes_dim={list(slots)} should be slots of t, h, w, in all half of "
                f"head_dim={config.head_dim}"
            )
        if json.get("patch_latent_dim", config.sizes["C"]) != config.sizes["C"]:
            raise InputError(
                f"transformer/config.json: patch_latent_dim={json['patch_latent_dim']} should be latent_channel x "
                f"latent_patch_size^2 = {config.sizes['C']}"
            )
        return config

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each lettered dimension of a weight (axes.py)."""
        return {
            "L": self.num_hidden_layers,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "N": self.num_attention_heads,
            "K": self.num_key_value_heads,
            "H": self.head_dim,
            "V": self.vocab_size,
            "C": self.latent_channel * self.latent_patch_size**2,
            "A": self.sound_dim or 0,
            "E": 256,  # fixed by the architecture: diffusers transformer_cosmos3.py, `time_proj`
        }

    def tensor_parallel_sizes(self) -> list[int]:
        """The numbers of devices, up to 8, that can divide the heads and the MLP evenly."""
        return [n for n in range(1, 9) if not any(size % n for size in self._divided().values())]

    def check_tensor_parallel(self, tp: int) -> None:
        """Raises InputError unless `tp` devices can divide the heads and the MLP evenly."""
        for what, size in self._divided().items():
            if tp < 1 or size % tp:
                possible = ", ".join(map(str, self.tensor_parallel_sizes()))
                raise InputError(f"tp={tp} does not divide {size} {what}; use tp in {{{possible}}}")

    def _divided(self) -> dict[str, int]:
        return {
            "query heads": self.num_attention_heads,
            "key/value heads": self.num_key_value_heads,
            "MLP columns": self.intermediate_size,
        }


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """`vae/config.json` of the residual Wan 2.2 VAE; the defaults are the published ones, the same in every model."""

    base_dim: int = 160
    decoder_base_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 12
    out_channels: int = 12
    patch_size: int = 2
    scale_factor_spatial: int = 16
    scale_factor_temporal: int = 4
    # fmt: off
    latents_mean: tuple[float, ...] = (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    )
    latents_std: tuple[float, ...] = (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    )
    # fmt: on

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """Reads `vae/config.json`. Raises InputError for a VAE of another kind than Wan 2.2's."""
        _require("vae/config.json", {"is_residual": False} | dict(json), is_residual=True)
        _require("vae/config.json", json, attn_scales=[], quantization_config=None)
        like_encoder = {"decoder_base_dim": json.get("base_dim")}
        config = cls(**_fields(cls, "vae/config.json", like_encoder) | _fields(cls, "vae/config.json", json))
        if not config.z_dim == len(config.latents_mean) == len(config.latents_std):
            raise InputError(f"vae/config.json: latents_mean and latents_std should have z_dim={config.z_dim} values")
        if min(config.latents_std) <= 0:
            raise InputError(f"vae/config.json: latents_std={shown(config.latents_std)} should be above 0")
        if not config.dim_mult or min(config.dim_mult) < 1 or len(config.temperal_downsample) != len(config.dim_mult) - 1:
            raise InputError(
                f"vae/config.json: dim_mult={shown(config.dim_mult)} should be whole numbers above 0, one more than "
                f"temperal_downsample={shown(config.temperal_downsample)}"
            )
        # What the architecture makes of them; they are not read on their own.
        pixels = 3 * config.patch_size**2
        space, time = config.patch_size * 2 ** len(config.temperal_downsample), 2 ** sum(config.temperal_downsample)
        implied = {"in_channels": pixels, "out_channels": pixels, "scale_factor_spatial": space, "scale_factor_temporal": time}
        for name, value in implied.items():
            if getattr(config, name) != value:
                raise InputError(
                    f"vae/config.json: {name}={getattr(config, name)} should be {value}, as patch_size={config.patch_size} and "
                    f"temperal_downsample={list(config.temperal_downsample)} make it"
                )
        return config

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the latents of a clip: the first frame stands alone, then four frames a latent."""
        time, space = self.scale_factor_temporal, self.scale_factor_spatial
        return (num_frames - 1) // time + 1, height // space, width // space


@dataclasses.dataclass(frozen=True)
class SoundEncoderConfig:
    """What `sound_tokenizer/config.json` says of the encoder; the defaults are the published ones, of Nano and Super."""

    input_channels: int = 1  # twice as many with `stereo`
    stereo: bool = True
    normalize_volume: bool = True
    enc_dim: int = 192
    enc_num_blocks: int = 2  # before each stride
    enc_n_fft: int = 64
    enc_hop_length: int = 16  # samples from one spectrum to the next
    enc_latent_dim: int = 128  # channels of a sound latent, twice: mean and scale
    enc_c_mults: tuple[int, ...] = (1, 2, 4)
    enc_strides: tuple[int, ...] = (4, 5, 6)  # of the input first

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """Reads `sound_tokenizer/config.json`. Raises InputError for one without an encoder, or with one of another kind."""
        file = "sound_tokenizer/config.json"
        if json.get("encoder_enabled", True) is False:
            raise InputError(f"{file}: encoder_enabled=False, so no sound can be learned from; leave sound out")
        _require(
            file,
            json,
            use_wav_as_input=True,
            enc_type="spec_convnext",
            enc_use_snake=True,
            bottleneck_type="vae",
            causal=False,
            padding_mode="zeros",
        )
        if isinstance(json.get("bottleneck"), Mapping):
            _require(f"{file}: bottleneck", json["bottleneck"], type="vae")
        config = cls(**_fields(cls, file, json))
        mults, strides = config.enc_c_mults, config.enc_strides
        if not mults or min(mults) < 1 or min(strides, default=0) < 2 or len(mults) != len(strides) or len(strides) > 16:
            raise InputError(
                f"{file}: enc_c_mults={shown(mults)} should be whole numbers above 0, at most 16 and as many as "
                f"enc_strides={shown(strides)}, which should be above 1"
            )
        if config.enc_n_fft % 2 or config.enc_n_fft < config.enc_hop_length:
            raise InputError(
                f"{file}: enc_n_fft={config.enc_n_fft} should be even, and at least enc_hop_length={config.enc_hop_length}"
            )
        return config

    @property
    def channels(self) -> int:
        """Of the waveform."""
        return self.input_channels * (2 if self.stereo else 1)

    @property
    def samples_per_latent(self) -> int:
        """The samples that become a sound latent."""
        return self.enc_hop_length * math.prod(self.enc_strides)


@dataclasses.dataclass(frozen=True)
class SoundConfig:
    """`sound_tokenizer/config.json`; the defaults are the published ones, of Nano and Super, of which generation uses the
    decoder alone.
    """

    sampling_rate: int = 48000
    vocoder_input_dim: int = 64  # channels of a sound latent
    dec_dim: int = 320
    dec_c_mults: tuple[int, ...] = (1, 2, 4, 8, 16)
    dec_strides: tuple[int, ...] = (2, 4, 5, 6, 8)  # of the output first
    dec_out_channels: int = 2
    hop_size: int | None = None  # samples of a sound latent; None: what the strides make
    encoder: SoundEncoderConfig | None = None  # None: there is none, or it was not asked for

    @classmethod
    def from_json(cls, json: Mapping[str, Any], *, encoder: bool = False) -> Self:
        """Reads `sound_tokenizer/config.json`; what it says of its encoder is not looked at unless that is asked for.

        Raises InputError for a decoder, or an encoder, of another kind than Cosmos3's.
        """
        file = "sound_tokenizer/config.json"
        _require(
            file,
            json,
            model_type="autoencoder_v2",
            dec_type="oobleck",
            dec_use_snake=True,
            dec_final_tanh=False,
            dec_anti_aliasing=False,
            dec_use_nearest_upsample=False,
            dec_use_tanh_at_final=False,
            activation="snakebeta",
            snake_logscale=True,
            anti_aliasing=False,
            latent_mean=None,
            latent_std=None,
            quantization_config=None,
        )
        config = cls(**_fields(cls, file, {key: value for key, value in json.items() if key != "encoder"}))
        whole = (*config.dec_c_mults, *config.dec_strides)
        if not whole or min(whole) < 1 or len(config.dec_c_mults) != len(config.dec_strides) or len(config.dec_strides) > 16:
            raise InputError(
                f"{file}: dec_c_mults={shown(config.dec_c_mults)} should be whole numbers above 0, at most 16 and as many as "
                f"dec_strides={shown(config.dec_strides)}"
            )
        return config._with_encoder(file, SoundEncoderConfig.from_json(json)) if encoder else config

    def _with_encoder(self, file: str, encoder: SoundEncoderConfig) -> Self:
        """Raises InputError unless the encoder makes what the decoder takes."""
        if encoder.enc_latent_dim != 2 * self.vocoder_input_dim:
            raise InputError(
                f"{file}: enc_latent_dim={encoder.enc_latent_dim} should be twice vocoder_input_dim={self.vocoder_input_dim}"
            )
        if encoder.samples_per_latent != self.samples_per_latent:
            raise InputError(
                f"{file}: enc_hop_length={encoder.enc_hop_length} and enc_strides={list(encoder.enc_strides)} make "
                f"{encoder.samples_per_latent} samples a latent, and the decoder {self.samples_per_latent}; they should agree"
            )
        return dataclasses.replace(self, encoder=encoder)

    @property
    def samples_per_latent(self) -> int:
        """The samples that a sound latent stands for."""
        return self.hop_size or math.prod(self.dec_strides)

    def latent_frames(self, num_frames: int, fps: float) -> int:
        """How many sound latents cover a video. Source: diffusers 0.42.1, `prepare_latents` of the pipeline."""
        return -(-int(num_frames / float(fps) * self.sampling_rate) // self.samples_per_latent)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """`scheduler/scheduler_config.json`: what the sigma grids need to know."""

    num_train_timesteps: int = 1000
    sigma_min: float = 0.147
    sigma_max: float = 200.0
    distilled_sigmas: tuple[float, ...] = ()  # the noise levels that a distilled checkpoint was made for; it has no others

    @classmethod
    def from_json(cls, json: Mapping[str, Any], modular: Mapping[str, Any] | None = None) -> Self:
        """Reads the scheduler's JSON, and of a distilled checkpoint `modular_model_index.json`.

        Raises InputError for any sampler but UniPC for flow matching, order 2, "bh2", and the distilled ones' stochastic steps.
        """
        file = "scheduler/scheduler_config.json"
        if json.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
            return cls._distilled(file, json, modular or {})
        _require(
            file,
            json,
            _class_name="UniPCMultistepScheduler",
            prediction_type="flow_prediction",
            predict_x0=True,
            use_flow_sigmas=True,
            solver_order=2,
            solver_type="bh2",
            lower_order_final=True,
            final_sigmas_type="zero",
            disable_corrector=[],
            solver_p=None,
            thresholding=False,
            use_dynamic_shifting=False,
            shift_terminal=None,
        )
        known = {key: value for key, value in json.items() if key != "distilled_sigmas"}
        config = cls(**_fields(cls, file, known))
        if config.sigma_min >= config.sigma_max:
            raise InputError(f"{file}: sigma_min={config.sigma_min} should be below sigma_max={config.sigma_max}")
        return config

    @classmethod
    def _distilled(cls, file: str, json: Mapping[str, Any], modular: Mapping[str, Any]) -> Self:
        # shift: diffusers would shift these sigmas once more, NVIDIA's own sampler would not; at 1 they agree
        _require(
            file,
            {"stochastic_sampling": False} | dict(json),
            stochastic_sampling=True,
            shift=1.0,
            use_dynamic_shifting=False,
            use_karras_sigmas=False,
            use_exponential_sigmas=False,
            use_beta_sigmas=False,
            invert_sigmas=False,
            shift_terminal=None,
        )
        sampler = json.get("fixed_step_sampler_config") or {}
        lists = [sampler.get("t_list") if isinstance(sampler, Mapping) else sampler, modular.get("distilled_sigmas")]
        given = [sigmas for sigmas in lists if sigmas is not None]
        if not given or given[0] != given[-1]:
            raise InputError(
                f"{file}: fixed_step_sampler_config.t_list={lists[0]!r} and the distilled_sigmas={lists[1]!r} of "
                "modular_model_index.json: one list of sigmas is expected, the same in both"
            )
        sigmas = given[0]
        falls = isinstance(sigmas, list) and all(type(sigma) in (int, float) for sigma in sigmas)
        if not sigmas or not falls or not all(a > b for a, b in zip([1.0000001, *sigmas], [*sigmas, 0], strict=True)):
            raise InputError(f"{file}: the sigmas {sigmas!r} should fall from 1 or less, and stay above 0")
        steps = {"num_train_timesteps": json.get("num_train_timesteps")}
        return cls(**_fields(cls, file, steps), distilled_sigmas=tuple(map(float, sigmas)))


NANO = TransformerConfig(sound_gen=True, sound_dim=64, action_gen=True, action_dim=64)
SUPER = dataclasses.replace(NANO, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64)
EDGE = TransformerConfig(
    hidden_size=2048,
    intermediate_size=9216,
    num_hidden_layers=28,
    num_attention_heads=16,
    vocab_size=131072,
    hidden_act="relu2",
    rms_norm_eps=1e-5,
    qk_norm_for_text=False,
    use_und_k_norm_for_gen=True,
    rope_theta=1e8,
    action_gen=True,
    action_dim=64,
)
TINY = TransformerConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=16,
    vocab_size=512,
    rope_axes_dim=(4, 2, 2),
    latent_channel=16,
    sound_gen=True,
    sound_dim=8,
)
UNIPC = SchedulerConfig()
PRESETS = {"nano": NANO, "super": SUPER, "edge": EDGE, "tiny": TINY}
WAN_VAE = VAEConfig()
TINY_VAE = VAEConfig(base_dim=8, decoder_base_dim=12, z_dim=16, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
SOUND_TOKENIZER = SoundConfig()
TINY_SOUND = SoundConfig(vocoder_input_dim=8, dec_dim=4)
TINY_FULL_SOUND = dataclasses.replace(TINY_SOUND, encoder=SoundEncoderConfig(enc_dim=6, enc_latent_dim=16))

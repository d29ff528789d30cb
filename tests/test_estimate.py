"""What a request would take: the published models at 720p, and the arithmetic that makes seconds and answers of it.

Nothing is allocated or run; the programs are compiled from shapes. `pytest tests/test_estimate.py -s` prints what was read.
"""

import dataclasses
import functools
import json
import math
import time
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import pytest

from cosmos3_jax.axes import make_mesh
from cosmos3_jax.config import (
    NANO,
    PRESETS,
    TINY,
    TINY_SOUND,
    UNIPC,
    WAN_VAE,
    InputError,
    SoundConfig,
    TransformerConfig,
    VAEConfig,
)
from cosmos3_jax.cost import Operation
from cosmos3_jax.estimate import STAND_IN, Estimate, Job, Stage, estimate, virtual_devices
from cosmos3_jax.gpus import GPU, GPUS
from cosmos3_jax.models.sound import WINDOW, SoundDecoder
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.published import unused_tensors
from cosmos3_jax.request import Request, resolve

TENSORS = Path(__file__).parent / "data" / "tensors"
MEGABYTES = 2**20

# One level instead of four: it compiles in half a second, where the towers are what a test is about.
SMALL_VAE = dataclasses.replace(cases.VAE, dim_mult=(1,), temperal_downsample=(), num_res_blocks=1)


def ask(config: TransformerConfig, vae: VAEConfig, cfg: int, tp: int, dtype: str = "bfloat16", **request) -> Estimate:
    """The estimate of a request; those of the published models are printed."""
    e = estimate(Job(config, vae, resolve(Request(prompt="", **request), config, vae), dtype), cfg, tp)
    for stage in e.stages if vae is WAN_VAE else ():
        needs = stage.weights, stage.inputs, stage.results, stage.scratch
        print(
            "{:>8}: weights {:6.2f}  inputs {:5.2f}  results {:5.2f}  scratch {:6.2f} GB".format(
                stage.name, *(n / 1e9 for n in needs)
            )
        )
    return e


def stages(e: Estimate) -> dict[str, Stage]:
    return {stage.name: stage for stage in e.stages}


@functools.cache
def small(cfg: int = 1, tp: int = 1, dtype: str = "bfloat16", **request) -> Estimate:
    """A small model, and an image of 32 x 32 pixels."""
    return ask(TINY, SMALL_VAE, cfg, tp, dtype, **{"num_frames": 1, "height": 32, "width": 32} | request)


# The published models at 720p, 189 frames, 35 steps

T, H, W = WAN_VAE.latent_shape(189, 720, 1280)
G = T * math.ceil(H / 2) * math.ceil(W / 2)


@pytest.fixture(scope="module")
def eight():
    """(name -> the estimate of Nano and of Super on cfg=2 tp=4, the seconds that both took)."""
    start = time.perf_counter()
    made = {name: ask(PRESETS[name], WAN_VAE, 2, 4) for name in ("nano", "super")}
    return made, time.perf_counter() - start


@pytest.fixture(scope="module")
def one():
    """Nano in float32 on one device."""
    return stages(ask(NANO, WAN_VAE, 1, 1, "float32"))


def test_prefill_on_one_device(one):
    assert one["prefill"].scratch < 2e9


def test_a_step_never_holds_the_scores(one):
    # Whole, they are 505 GB; of one group of four heads 63 GB. The largest that is held is the MLP's hidden layer, gated from
    # two others: four of them are 17 GB.
    hidden = 4 * 2 * G * NANO.intermediate_size
    assert one["step"].scratch < 4 * hidden


def test_the_decoder_holds_one_latent_frame(one):
    # As much scratch for 48 latent frames as for 3: the first, and two of those that are scanned. 2 %: XLA places the buffers.
    three = stages(ask(NANO, WAN_VAE, 1, 1, "float32", num_frames=9))
    assert one["decode"].scratch < 1.02 * three["decode"].scratch


def test_both_models_are_read_in_minutes(eight):
    # About 10 s on two cores, the rest is for slow ones: whoever asks should not wait longer than for the first answer.
    assert eight[1] < 180


@pytest.mark.parametrize("name", ["nano", "super"])
def test_devices_meet_twice_a_layer(eight, name):
    """Once after attention and once after the MLP; the last text layer is keys and values alone."""
    read, layers = stages(eight[0][name]), PRESETS[name].num_hidden_layers
    assert {c.kind for c in read["prefill"].collectives} == {"all-reduce"}
    assert {c.kind for c in read["step"].collectives} == {"all-reduce", "all-gather"}
    assert read["prefill"].collected("all-reduce")[0] == 2 * (layers - 1)
    assert read["step"].collected("all-reduce")[0] == 2 * layers


@pytest.mark.parametrize("name", ["nano", "super"])
def test_only_activations_are_sent(eight, name):
    """Of its own branch: an all-reduce of weights, or of both branches, would be larger."""
    read, width = stages(eight[0][name]), PRESETS[name].hidden_size
    assert {c.shape for c in read["prefill"].collectives} == {f"f16[1,512,{width}]"}
    assert {c.shape for c in read["step"].collectives if c.kind == "all-reduce"} == {f"f16[1,{G},{width}]"}


@pytest.mark.parametrize("name", ["nano", "super"])
def test_the_branches_meet_once_a_step(eight, name):
    """What is gathered is the velocity of both; never a weight."""
    (gathered,) = (c for c in stages(eight[0][name])["step"].collectives if c.kind == "all-gather")
    assert (gathered.count, gathered.nbytes) == (1, 4 * 2 * T * H * W * 48)


def test_the_decoder_exchanges_borders(eight):
    """Keys and values of the one attention are gathered in every latent frame, and the frames at the end."""
    decode = stages(eight[0]["nano"])["decode"]
    assert {c.kind for c in decode.collectives} == {"collective-permute", "all-gather"}
    assert decode.collected("all-gather")[0] == 2 * T + 1
    frames = 189 * 720 * 1280 * 3
    keys_and_values = 2 * T * 2 * H * W * 4 * WAN_VAE.decoder_base_dim
    assert decode.collected("all-gather")[1] == keys_and_values + frames
    # 80 columns divide by eight and 45 rows do not, so the devices stand in a row and a border is one column wide.
    borders = [c.shape.split(",") for c in decode.collectives if c.kind == "collective-permute"]
    assert {columns for _, _, columns, _ in borders} == {"1"}


@pytest.mark.parametrize("name", ["nano", "super"])
def test_weights_on_each_device(eight, name):
    """Of the published tensors, a device holds a quarter of those of heads and MLPs, and the others whole."""
    assert eight[0][name].weights == published_bytes(name, tp=4) + 2 * sum(map(math.prod, published("vae").values()))


ATTENTION = ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("gate_proj", "up_proj", "down_proj")


def published(name: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, (shape, _) in json.loads((TENSORS / f"{name}.json").read_text()).items()}


def published_bytes(name: str, tp: int) -> int:
    """Bytes on one of `tp` devices of the tensors that are read, two a number, but the timestep embedding's four."""
    total, unused = 0, unused_tensors(PRESETS[name])
    for tensor, shape in published(f"transformer_{name}").items():
        if tensor not in unused:
            is_divided = not {*ATTENTION, *MLP}.isdisjoint(tensor.split("."))
            total += math.prod(shape) * (4 if tensor.startswith("time_embedder.") else 2) // (tp if is_divided else 1)
    return total


def test_an_eighth_on_eight_devices():
    mesh, whole = make_mesh(tp=8), make_mesh()
    config = dataclasses.replace(NANO, latent_channel=cases.VAE.z_dim)
    eighth, all_of_it = (ask(config, SMALL_VAE, 1, tp, num_frames=1, height=32, width=32) for tp in (8, 1))
    # What is not divided, the autoencoder with it, is in both.
    difference = published_bytes("nano", tp=1) - published_bytes("nano", tp=8)
    assert all_of_it.weights - eighth.weights == difference
    for made, placed in ((eighth, mesh), (all_of_it, whole)):
        networks = abstract_networks(config, SMALL_VAE, placed, "float16")
        shards = [(w.sharding.shard_shape(w.shape), w.dtype.itemsize) for w in jax.tree.leaves(networks)]
        assert made.weights == sum(math.prod(shape) * size for shape, size in shards)


def test_flops_are_those_counted_elsewhere(eight):
    # 124 PFLOP of 35 steps with guidance and 3.2 PFLOP of decoding are of a count that this package had no part in.
    # 2 %: it is given in two or three digits.
    read = stages(eight[0]["nano"])
    assert read["step"].runs == 35
    assert 35 * read["step"].flops == pytest.approx(124e15, rel=0.02)
    assert read["decode"].flops == pytest.approx(3.2e15, rel=0.02)


def test_flops_do_not_depend_on_the_mesh(eight, one):
    # Only what is divided by hand is counted device by device, and its parts are even: the sums are the same to the last one.
    assert {name: s.flops for name, s in stages(eight[0]["nano"]).items()} == {name: s.flops for name, s in one.items()}


# What a request changes


def test_bfloat16_halves_the_weights():
    """All but the timestep embedding's, which stay float32."""
    D, E = TINY.hidden_size, 256
    kept = 4 * (D * E + D + D * D + D)
    assert 2 * (small().weights - kept) == small(dtype="float32").weights - kept


def test_the_stand_in_is_as_large():
    assert all(jnp.dtype(other).itemsize == jnp.dtype(dtype).itemsize for dtype, other in STAND_IN.items())


@pytest.mark.parametrize(("given", "frames"), [({}, None), ({"image": cases.IMAGE}, 1), ({"video": tuple(cases.CLIP)}, 5)])
def test_a_given_picture_adds_the_encoder(given, frames):
    """Of a clip, the five frames that the second latent frame sees."""
    job = Job(TINY, SMALL_VAE, resolve(Request("", num_frames=9, height=32, width=48, **given), TINY, SMALL_VAE))
    read = stages(estimate(job, 1, 1))
    assert list(read) == ["prefill", "step", *(["encode"] if given else []), "decode"]
    if given:
        assert read["encode"].inputs == frames * 32 * 48 * 3 * 4
        assert read["encode"].flops > 0


def test_two_branches_on_two_halves():
    """On cfg=2 there are two in any case; on cfg=1 only with guidance."""
    guided, unguided = stages(small()), stages(small(guidance_scale=1.0))
    on_halves = stages(small(cfg=2, guidance_scale=1.0))
    for name in ("prefill", "step"):
        assert on_halves[name].flops == guided[name].flops > unguided[name].flops
    assert guided["prefill"].flops == 2 * unguided["prefill"].flops


def test_steps_are_run_so_often():
    assert {stage.name: stage.runs for stage in small(num_inference_steps=7).stages} == {"prefill": 1, "step": 7, "decode": 1}


# With sound


def with_sound(cfg: int = 1, tp: int = 1, *, config: TransformerConfig = TINY, asked: bool = True, **request) -> Estimate:
    """A small video of five frames, 32 x 32 pixels, of a checkpoint that can make sound."""
    settings = {"num_frames": 5, "height": 32, "width": 32, "enable_sound": asked} | request
    job = Job(config, SMALL_VAE, resolve(Request("", **settings), config, SMALL_VAE, UNIPC, TINY_SOUND), sound=TINY_SOUND)
    return estimate(job, cfg, tp)


SOUND_FRAMES = 6  # of five frames at 24 frames a second
PATCHES = 2 * 1 * 1  # two latent frames of 2 x 2


def test_sound_adds_its_decoder_and_nothing_else_changes_its_place():
    assert list(stages(with_sound())) == ["prefill", "step", "decode", "decode_sound"]
    assert list(stages(with_sound(image=cases.IMAGE))) == ["prefill", "step", "encode", "decode", "decode_sound"]
    sounding, silent = with_sound(num_inference_steps=7), with_sound(num_inference_steps=7, asked=False)
    assert {stage.name: stage.runs for stage in sounding.stages} == {"prefill": 1, "step": 7, "decode": 1, "decode_sound": 1}
    for name in ("prefill", "decode"):
        assert stages(sounding)[name] == stages(silent)[name]
    assert sounding.weights == silent.weights + stages(sounding)["decode_sound"].weights


def test_who_asks_for_no_sound_is_told_what_a_silent_checkpoint_takes():
    silent = ask(TINY, SMALL_VAE, 1, 1, num_frames=5, height=32, width=32)
    assert with_sound(asked=False) == silent
    without = ask(
        dataclasses.replace(TINY, sound_gen=False, sound_dim=None), SMALL_VAE, 1, 1, num_frames=5, height=32, width=32
    )
    heads = 2 * (2 * TINY.hidden_size * 8 + 2 * TINY.hidden_size + 8)  # in and out, their biases and the mark; two bytes each
    assert silent.weights - without.weights == heads
    for ours, bare in zip(silent.stages, without.stages, strict=True):
        assert dataclasses.replace(ours, weights=0) == dataclasses.replace(bare, weights=0)


def test_sound_adds_a_token_for_each_latent():
    # On two devices an all-reduce is of all tokens; on two halves the velocities of video and sound are gathered at once.
    silent, sounding = (stages(with_sound(2, 2, asked=asked))["step"] for asked in (False, True))
    tokens = []
    for step, sound in ((silent, 0), (sounding, SOUND_FRAMES)):
        (reduced,) = {c.shape for c in step.collectives if c.kind == "all-reduce"}
        tokens.append(int(reduced.split(",")[1]))
        assert reduced == f"f16[1,{tokens[-1]},{TINY.hidden_size}]"
        (gathered,) = (c for c in step.collectives if c.kind == "all-gather")
        t, h, w = SMALL_VAE.latent_shape(5, 32, 32)
        assert (gathered.count, gathered.nbytes) == (1, 4 * 2 * (t * h * w * SMALL_VAE.z_dim + sound * 8))
    assert tokens == [PATCHES, PATCHES + SOUND_FRAMES]
    assert step.collected("all-reduce")[0] == 2 * TINY.num_hidden_layers


def test_inputs_of_a_step_with_sound():
    """Rotary angles of each branch, four sampler states."""
    silent, sounding = (stages(with_sound(asked=asked))["step"] for asked in (False, True))
    assert sounding.inputs - silent.inputs == 4 * SOUND_FRAMES * (2 * 2 * TINY.head_dim // 2 + 4 * 8)


def sound_flops(config: SoundConfig, latents: int) -> int:
    """Of matrix products and convolutions, for so many latents in one pass."""
    widths = [config.dec_dim * factor for factor in (1, *config.dec_c_mults)]
    n, total = latents, 2 * latents * 7 * config.vocoder_input_dim * widths[-1]
    for stride, inputs, outputs in zip(config.dec_strides[::-1], widths[:0:-1], widths[-2::-1], strict=True):
        total += 2 * n * inputs * outputs * 2 * stride
        n *= stride
        total += 3 * 2 * n * (7 + 1) * outputs**2
    return total + 2 * n * 7 * widths[0] * config.dec_out_channels


@pytest.mark.parametrize("num_frames", [5, 189])
@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (1, 2)])
def test_the_sound_decoder_by_hand(num_frames, cfg, tp):
    """In one pass, or in windows that overlap; every device decodes all of it."""
    stage = stages(with_sound(cfg, tp, num_frames=num_frames))["decode_sound"]
    latents = TINY_SOUND.latent_frames(num_frames, 24.0)
    overlap = 2 * SoundDecoder(TINY_SOUND).reach
    windows = -(-latents // WINDOW)
    is_long = latents > WINDOW + overlap
    assert is_long == (num_frames == 189)
    in_a_window = -(-latents // windows) + overlap  # the windows are as even as they can be
    decoded = windows * sound_flops(TINY_SOUND, in_a_window) if is_long else sound_flops(TINY_SOUND, latents)
    assert stage.flops == cfg * tp * decoded
    assert stage.inputs == 4 * 8 * latents
    assert stage.results == 4 * 2 * 1920 * latents
    assert not stage.collectives


def test_longer_text_takes_more():
    job = Job(TINY, SMALL_VAE, resolve(Request("", num_frames=1, height=32, width=32), TINY, SMALL_VAE))
    short, long = (stages(estimate(dataclasses.replace(job, text_tokens=n), 1, 1)) for n in (128, 256))
    keys = TINY.num_hidden_layers * 2 * TINY.num_key_value_heads * TINY.head_dim  # of a token, both branches
    assert long["step"].inputs - short["step"].inputs == 128 * 2 * keys * 2  # keys and values, two bytes each
    assert long["prefill"].flops > 2 * short["prefill"].flops  # causal attention is quadratic


@pytest.mark.parametrize(
    ("cfg", "tp", "message"),
    [
        (1, 3, "tp=3 does not divide 8 query heads; use tp in {1, 2, 4, 8}"),
        (3, 1, "cfg=3: guidance has two branches; use cfg=1 or cfg=2"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(cfg, tp, message):
    with pytest.raises(InputError) as error:
        small(cfg, tp)
    assert str(error.value) == message


def test_virtual_devices_come_before_jax_starts():
    """Here it has started, with eight."""
    virtual_devices(8)
    with pytest.raises(InputError, match=r"^9 virtual devices need a process that has not used JAX yet"):
        virtual_devices(9)


# Peaks, answers, seconds: a made-up estimate on a made-up GPU

GB = 10**9
PREFILL = Stage("prefill", 1, 0, weights=3 * GB, inputs=0, results=1 * GB, scratch=2 * GB, collectives=())
STEP = Stage("step", 10, 400 * 10**12, weights=5 * GB, inputs=1 * GB, results=0, scratch=4 * GB, collectives=())
MADE = Estimate(2, 2, "bfloat16", weights=9 * GB, stages=(PREFILL, STEP))
SLOW = GPU("slow", bfloat16=50e12, float32=10e12, memory=100e9, bandwidth=3e12, link=1e9, source="made up")


def test_the_peak_is_everything_that_is_there():
    """All weights, or the stage's alone."""
    assert [MADE.peak(stage) for stage in MADE.stages] == [(9 + 0 + 1 + 2) * GB, (9 + 1 + 0 + 4) * GB]
    assert [MADE.peak(stage, keep=False) for stage in MADE.stages] == [(3 + 0 + 1 + 2) * GB, (5 + 1 + 0 + 4) * GB]
    assert (MADE.highest(), MADE.highest(keep=False)) == (14 * GB, 10 * GB)


def test_the_peak_of_what_was_read():
    e = small()
    for stage in e.stages:
        assert e.peak(stage) == e.weights + stage.inputs + stage.results + stage.scratch
        assert min(stage.inputs, stage.results, stage.scratch) > 0
    assert e.weights == sum(stage.weights for stage in e.stages)  # each network runs once: nothing is forgotten


@pytest.mark.parametrize(
    ("memory", "answer"),
    [
        (14e9 / 0.75, "yes"),
        (14e9 / 0.75 - 4, "drop"),
        (10e9 / 0.75 + 1, "drop"),
        (10e9 / 0.75 - 4, "tight drop"),
        (10e9 / 0.95 + 1, "tight drop"),
        (10e9 / 0.95 - 4, "no"),
    ],
)
def test_what_fits(memory, answer):
    """JAX takes 75 % of the memory by default, and 95 % when told. Four bytes: the division rounds."""
    assert MADE.fits(dataclasses.replace(SLOW, memory=memory)) == answer


@pytest.mark.parametrize(
    ("memory", "answer"), [(14e9 / 0.75 - 4, "tight"), (14e9 / 0.95 + 1, "tight"), (14e9 / 0.95 - 4, "no")]
)
def test_what_fits_where_one_network_is_nearly_all(memory, answer):
    stage = dataclasses.replace(STEP, weights=9 * GB)
    only = dataclasses.replace(MADE, stages=(stage,))
    assert only.fits(dataclasses.replace(SLOW, memory=memory)) == answer


def test_seconds_of_arithmetic():
    # 10 steps of 400 TFLOP on 4 devices of 50 TFLOP/s; reading 6 GB takes 2 ms of each step's 2 s.
    assert MADE.seconds(STEP, SLOW) == pytest.approx(10 * 400 / 4 / 50)


def test_seconds_of_reading():
    # The same on memory of 2 GB/s: 6 GB in 3 s, more than the arithmetic's 2 s.
    assert MADE.seconds(STEP, dataclasses.replace(SLOW, bandwidth=2e9)) == pytest.approx(10 * 6 / 2)


def test_seconds_are_of_the_dtype():
    assert dataclasses.replace(MADE, dtype="float32").seconds(STEP, SLOW) == pytest.approx(10 * 400 / 4 / 10)


def test_all_seconds():
    # Prefill has no arithmetic here: 3 GB at 3 TB/s.
    assert MADE.total_seconds(SLOW) == pytest.approx(0.001 + 20)


def test_link_seconds():
    # An all-reduce is sent twice, in parts: 10 steps of 2 x 4 MB + 1 MB, at 1 GB/s.
    sent = Operation("all-reduce", "bf16[1024,1024]", 2, "body"), Operation("all-gather", "pred[1048576]", 1, "main")
    step = dataclasses.replace(STEP, collectives=sent)
    assert step.sent == 10 * (2 * 4 + 1) * MEGABYTES
    assert dataclasses.replace(MADE, stages=(PREFILL, step)).link_seconds(SLOW) == pytest.approx(step.sent / 1e9)
    assert MADE.link_seconds(SLOW) == 0


def test_collected():
    sent = [Operation("all-reduce", "f32[2]", 3, "body"), Operation("all-reduce", "f32[5]", 1, "main")]
    step = dataclasses.replace(STEP, collectives=(*sent, Operation("all-gather", "f32[7]", 1, "main")))
    assert step.collected("all-reduce") == (4, 4 * (3 * 2 + 5))
    assert step.collected("all-to-all") == (0, 0)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_gpus_are_in_units_of_one(gpu):
    """A number in TFLOP/s or GB would be a million times off; the ranges hold every GPU of a few years."""
    assert 5e13 < gpu.bfloat16 < 1e16
    assert 1e13 < gpu.float32 < gpu.bfloat16
    assert 1e10 < gpu.memory < 1e12
    assert 1e10 < gpu.link < gpu.bandwidth < 1e14

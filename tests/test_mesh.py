"""The same program on one to eight devices: the same video and sound, the collectives that were meant, and no others."""

import functools
import re

import cases
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from metrics import errors, outputs, random

from cosmos3_jax import make_mesh, media
from cosmos3_jax.axes import place, sharding
from cosmos3_jax.config import TINY_SOUND, TINY_VAE
from cosmos3_jax.cost import collectives
from cosmos3_jax.estimate import Job, towers
from cosmos3_jax.models.vae import unit
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.pipeline import decode, encode
from cosmos3_jax.request import Request, resolve
from cosmos3_jax.weights import Network, random_weights

MESHES = [(1, 2), (2, 1), (2, 2), (1, 4), (2, 4), (1, 8)]
WIDE = cases.FAMILIES["wide"]  # 8 key/value heads for 32 query heads
SMALL = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 3, "progress": False}


@pytest.fixture(scope="module")
def ours(pipes):
    """`ours(case, cfg, tp)`: what a case gives on a mesh (metrics.outputs), run once."""
    return functools.cache(lambda case, cfg, tp: outputs(pipes("wide", cfg=cfg, tp=tp), cases.CASES[case]))


@pytest.fixture(scope="module")
def vaes():
    """`vaes(dtype, count)`: a small VAE on `count` devices, the same weights each time."""

    def vae(dtype: str, count: int) -> Network:
        one = abstract_networks(WIDE, TINY_VAE, make_mesh(), dtype).vae
        weights = random_weights(one.weights)
        return Network(one.graph, jax.device_put(weights, sharding(make_mesh(tp=count), "")))

    return functools.cache(vae)


RICHEST = "image_to_video_with_sound_at_12"
CASES = ["text_to_video", "image_to_video", "text_to_image", "text_to_video_with_sound_at_24", RICHEST]


@pytest.mark.parametrize(
    ("case", "cfg", "tp"), [*((RICHEST, *mesh) for mesh in MESHES), *((case, 2, 4) for case in CASES[:-1])]
)
def test_every_mesh_gives_the_same_video(case, cfg, tp, ours, recorded):
    # Devices add partial products in another order. Guidance weighs the rounding of each branch five and six times, so that
    # after four steps a thousandth of the values is off by 1e-5 of the standard deviation, as they are from the reference's.
    assert tuple(ours(case, cfg, tp)) == cases.outputs_of(case)
    for output, value in ours(case, cfg, tp).items():
        rms, largest = errors(value, ours(case, 1, 1)[output])
        amplified = 2 if output == "sound" else 1  # the sound decoder's sines do that to an error of its latents
        assert rms < amplified * 5e-6
        assert largest < amplified * 5e-5
        assert errors(value, recorded("wide")[f"{case}.{output}"])[1] < amplified * 5e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("cfg", "tp"), [(1, 2), (2, 4), (1, 8)])
def test_given_frames_are_identical_on_every_mesh(cfg, tp, dtype, vaes):
    frames = media.fit_clip(cases.CLIP, 64, 96)[:5]
    latents = []
    for mesh in (make_mesh(), make_mesh(cfg, tp)):
        vae = vaes(dtype, mesh.size)
        with jax.set_mesh(mesh):
            latents.append(np.asarray(encode(vae, frames)))
    np.testing.assert_array_equal(*latents)


def test_guidance_off_on_two_halves_warns_and_changes_nothing(pipes):
    case = cases.CASES["no_guidance"]
    with pytest.warns(UserWarning, match=r"cfg=2 with guidance_scale=1.0 .* half of the devices compute nothing of use"):
        two = outputs(pipes("wide", cfg=2), case)
    for output, value in outputs(pipes("wide"), case).items():
        assert errors(two[output], value)[1] < 1e-5


@pytest.mark.parametrize("enable_sound", [False, True], ids=["silent", "sound"])
def test_another_prompt_compiles_nothing_on_a_mesh(enable_sound, pipes, compilations):
    # Each step's state comes back placed as it went in, or the second step would be another program.
    pipe = functools.partial(pipes("small", cfg=2, tp=4), enable_sound=enable_sound, **SMALL)
    pipe("short")
    compilations.clear()
    pipe("a prompt of another length", "and a negative one", guidance_scale=3.0, seed=1)
    assert compilations == []


def test_callback_replaces_latents_on_a_mesh(pipes):
    def callback(step, timestep, latents):
        return np.zeros(latents.shape) if step == 0 else None

    videos = [
        pipes("small", cfg=cfg, tp=tp)("text", callback_on_step_end=callback, **SMALL).video for cfg, tp in [(1, 1), (2, 4)]
    ]
    assert errors(*videos)[1] < 5e-5


@pytest.mark.parametrize(("cfg", "tp", "enable_sound"), [(1, 1, True), *((*mesh, True) for mesh in MESHES), (2, 4, False)])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_collectives_of_the_towers(family, cfg, tp, enable_sound):
    # A layer adds up its attention's heads and its MLP's columns; a step brings the two branches together, video and sound at
    # once. That is all: no weight is gathered, nothing is moved.
    config = cases.FAMILIES[family]
    if tp not in config.tensor_parallel_sizes():
        pytest.skip(f"{config.num_key_value_heads} key/value heads")
    asked = Request("", num_frames=9, height=64, width=96, enable_sound=enable_sound)
    job = Job(config, cases.VAE, resolve(asked, config, cases.VAE, sound=TINY_SOUND), "float32", sound=TINY_SOUND)
    mesh = make_mesh(cfg, tp)
    programs = towers(job, abstract_networks(config, cases.VAE, mesh, "float32", TINY_SOUND), mesh)
    prefill, step = (program.compiled() for program in programs)
    layers = config.num_hidden_layers
    in_prefill, in_step = [layers - 1, layers - 1], [layers, layers]  # of the last text layer only keys and values exist
    assert [(c.kind, c.count) for c in prefill.collectives] == [("all-reduce", n) for n in in_prefill if tp > 1]
    branches = [("all-gather", 1)] if cfg == 2 else []
    assert sorted((c.kind, c.count) for c in step.collectives) == [*branches, *[("all-reduce", n) for n in in_step if tp > 1]]
    values = 3 * 4 * 6 * 16 + (10 * 8 if enable_sound else 0)  # 9 frames of 24 a second are 9.4 latents of 25 a second
    velocities = 4 * 2 * values  # bytes of both branches' velocity
    assert all(c.nbytes == velocities for c in step.collectives if c.kind == "all-gather")
    assert len({c.computation for c in step.collectives if c.kind == "all-reduce"}) <= 1  # both in the scanned layer


def decoded(vae: Network, latents_thwc: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, str]:
    """Frames in [0, 1] from rows x columns devices, and the compiled program's text."""
    mesh = make_mesh(tp=rows * columns)
    latents = place(mesh, latents_thwc)
    with jax.set_mesh(Mesh(mesh.devices.reshape(rows, columns), ("h", "w"), axis_types=(AxisType.Auto,) * 2)):
        program = decode.lower(vae, latents, unit).compile()
        return np.asarray(jax.block_until_ready(program(vae, latents))), program.as_text()


DECODES = [  # latent frames, rows and columns; devices along rows and columns
    ((1, 45, 5), (8, 1)),  # 720p has 45 rows: 48 are computed
    ((3, 4, 16), (1, 8)),  # even: nothing is padded
    ((1, 9, 7), (4, 2)),
    ((1, 3, 5), (2, 4)),  # of both, some parts hold no picture at all
    ((1, 2, 3), (2, 4)),  # XLA's partitioner fails on 2 rows over 2 devices
    ((1, 1, 1), (2, 1)),
    ((1, 5, 6), (1, 2)),
]


@pytest.mark.parametrize(("shape", "parts"), DECODES)
def test_parallel_decode_is_exact(shape, parts, vaes):
    latents = random(*shape, 16)
    alone, _ = decoded(vaes("float32", 1), latents, 1, 1)
    together, text = decoded(vaes("float32", parts[0] * parts[1]), latents, *parts)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    # Halos of one row or column; the keys and values of the one attention; the frames. A gather goes along one axis.
    found, axes = collectives(text), sum(count > 1 for count in parts)
    halos = [c for c in found if c.kind == "collective-permute"]
    gathers = [c for c in found if c.kind == "all-gather"]
    frames = [c for c in gathers if c.shape.endswith(",3]")]
    assert len(found) == len(halos) + len(gathers)
    assert all(re.search(r"\[\d+,(1,\d+|\d+,1),\d+\]", c.shape) for c in halos)
    assert sum(c.count for c in frames) == axes
    assert sum(c.count for c in gathers) == axes * (1 + 2 * shape[0])


def test_parallel_decode_in_bf16(vaes):
    # 480p: even parts, whose sums run in the same order, and are rounded at the same places. The bar is 60 dB (decoders that
    # blend overlapping tiles reach 40); two programs that round differently are as far apart as bf16 from float32, at 50 dB.
    latents = random(1, 30, 52, 16)
    alone, together = (decoded(vaes("bfloat16", count), latents, rows, count // rows)[0] for count, rows in [(1, 1), (8, 2)])
    error = np.mean((together - alone) ** 2)
    assert error < 10 ** (-60 / 10)

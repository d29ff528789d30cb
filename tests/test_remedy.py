"""The sentence where memory ends: each way out on estimates that are made up, whatever it names, and its child."""

import contextlib
import dataclasses
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cases
import numpy as np
import pytest
from PIL import Image

from cosmos3_jax import remedy
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.config import NANO, TINY, WAN_VAE
from cosmos3_jax.errors import StoppedError
from cosmos3_jax.estimate import Estimate, Job, Stage, estimate
from cosmos3_jax.request import Request, resolve
from cosmos3_jax.stop import stoppable

GB = 10**9
DRY_RUN = "`python -m cosmos3_jax.generate --dry-run`"


def asked(num_frames: int, height: int, width: int, **others) -> Job:
    request = Request("waves", num_frames=num_frames, height=height, width=width, **others)
    return Job(NANO, WAN_VAE, resolve(request, NANO, WAN_VAE))


LONG, SHORT, IMAGE, SMALL = asked(189, 720, 1280), asked(5, 720, 1280), asked(1, 720, 1280), asked(1, 256, 448)


def made(job: Job, cfg: int, tp: int) -> Estimate:
    """Two networks of 16 GB, one of which runs, and 100 kB for each number of the latents' channels: 17.28 GB of LONG."""
    numbers = np.prod(job.vae.latent_shape(job.request.num_frames, job.request.height, job.request.width))
    stage = Stage("step", 1, 0, 16 * GB // tp, 0, 0, scratch=int(numbers) * 10**5 // (cfg * tp), collectives=())
    return Estimate(cfg, tp, job.dtype, 32 * GB // tp, (stage,))


@pytest.fixture
def estimates(monkeypatch):
    """What is estimated: (cfg, tp, frames, height, width), in order."""
    seen = []

    def estimate(job: Job, cfg: int, tp: int) -> Estimate:
        seen.append((cfg, tp, job.request.num_frames, job.request.height, job.request.width))
        return made(job, cfg, tp)

    monkeypatch.setattr(remedy, "estimate", estimate)
    return seen


def parts(job: Job, gigabytes: float, *, devices: int = 1, tower: str = "drop", cfg: int = 1, tp: int = 1, shared=False):
    """Without the child."""
    return list(remedy.findings(job, cfg, tp, int(gigabytes * GB), devices, tower, shared))


# What is needed


@pytest.mark.parametrize(
    ("tower", "needed"),
    [("keep", "49.3 GB (about 33.3 GB with --text-tower drop)"), ("drop", "33.3 GB"), ("host", "33.3 GB")],
)
def test_what_is_needed(estimates, tower, needed):
    expected = f"the dry run puts the peak of this request at about {needed} on each device, where there are 12 GB"
    assert parts(LONG, 12, tower=tower)[0] == expected


def test_what_should_have_fit(estimates):
    """The dry run is of a CPU's programs: where it was wrong, what is named needs a quarter less than what it says."""
    needed, *others = parts(LONG, 60, tower="keep", devices=8)
    assert needed.endswith(
        "where there are 60 GB: it should fit, but something else may be in that memory, or the device's own programs need more"
    )
    # Of 49.28 GB three quarters are 36.96.
    assert others == [
        "it would need a quarter less with --text-tower drop or with --cfg 2 --tp 1 --text-tower drop or with --cfg 1 --tp 2"
    ]
    assert parts(LONG, 60, shared=True)[1:] == [
        "on this mesh 85 frames of 720x1280 or 189 frames of 480x848 would need a quarter less"
    ]


# Each way out


def test_dropping_the_text_tower_is_enough(estimates):
    """Then no more devices are named than there are, and nothing less is asked for."""
    assert parts(LONG, 35, tower="keep")[1:] == ["it would fit with --text-tower drop"]
    assert len(estimates) == 1
    ways = "--text-tower drop or with --cfg 2 --tp 1 --text-tower drop or with --cfg 1 --tp 2"
    assert parts(LONG, 35, tower="keep", devices=8)[1:] == [f"it would fit with {ways}"]


@pytest.mark.parametrize(("tower", "flag"), [("keep", "drop"), ("drop", "drop"), ("host", "host")])
def test_another_mesh(estimates, tower, flag):
    """The smallest first. There the tower is kept unless a flag says so; here it stays what it is."""
    here = " with --text-tower drop" if tower == "keep" else ""
    assert parts(LONG, 30, tower=tower, devices=8)[1:] == [
        f"it would fit with --cfg 2 --tp 1 --text-tower {flag} or with --cfg 1 --tp 2",
        f"on this mesh 145 frames of 720x1280{here} or 189 frames of 480x848{here} would fit",
    ]


def test_only_with_more_devices_than_there_are(estimates):
    assert parts(LONG, 20)[1] == "it would fit with --cfg 1 --tp 2 --text-tower drop (2 devices, not 1)"
    assert parts(LONG, 7, devices=2, tp=2)[1] == "it would fit with --cfg 2 --tp 4 --text-tower drop (8 devices, not 2)"


def test_one_that_there_is_comes_alone(estimates):
    """Of two devices one mesh fits; the next, of four, is not named."""
    assert parts(LONG, 20, devices=2)[1] == "it would fit with --cfg 1 --tp 2 --text-tower drop"


def test_larger_meshes_alone(estimates):
    """Of as many devices or more, up to eight, and never the same."""
    parts(LONG, 1, cfg=2, tp=2, devices=8)
    assert list(dict.fromkeys(each[:2] for each in estimates)) == [(2, 2), (1, 4), (2, 4), (1, 8)]


def test_meshes_that_divide_the_heads(estimates, monkeypatch):
    monkeypatch.setattr(type(NANO), "tensor_parallel_sizes", lambda self: [1, 3, 6])
    parts(LONG, 1, devices=8)
    assert list(dict.fromkeys(each[:2] for each in estimates)) == [(1, 1), (2, 1), (1, 3), (2, 3), (1, 6)]


def test_without_guidance_no_second_branch(estimates):
    parts(asked(189, 720, 1280, guidance_scale=1.0), 1, devices=8)
    assert {cfg for cfg, *_ in estimates} == {1}


def test_only_with_fewer_frames(estimates):
    """A picture of 256 rows is the smallest that is published. Of 48 latent frames 22 would fit."""
    assert parts(asked(189, 256, 448), 17, shared=True)[1:] == ["on this mesh 85 frames of 256x448 would fit"]


@pytest.mark.parametrize(
    ("job", "gigabytes", "answer"),
    [
        (IMAGE, 16.2, "1 frame of 480x848"),
        (IMAGE, 16.05, "1 frame of 256x448"),
        (asked(1, 1280, 720), 16.2, "1 frame of 848x480"),
        (asked(1, 4096, 4096), 16.3, "1 frame of 720x720"),
        (SHORT, 16.4, "5 frames of 480x848"),
    ],
)
def test_only_with_a_smaller_picture(estimates, job, gigabytes, answer):
    """Of the same shape, the largest that fits."""
    assert parts(job, gigabytes, shared=True)[1:] == [f"on this mesh {answer} would fit"]


def test_only_with_both(estimates):
    assert parts(LONG, 16.1, shared=True)[1:] == ["on this mesh 5 frames of 256x448 would fit"]


def test_given_frames_stay(estimates):
    """Four latent frames come with the request."""
    job = asked(189, 720, 1280, video=cases.CLIP, condition_frame_indexes_vision=(0, 3))
    assert parts(job, 16.2, shared=True)[1:] == ["on this mesh 13 frames of 256x448 would fit"]
    assert min(frames for *_, frames, _, _ in estimates) == 13


def test_nothing_fits(estimates):
    assert parts(LONG, 3)[1:] == [
        "it would fit on no mesh of up to 8 devices",
        "on this mesh not even 5 frames of 256x448 would fit",
    ]
    for smallest in (SMALL, asked(1, 128, 224)):
        assert parts(smallest, 3, shared=True)[1:] == ["on this mesh nothing smaller would fit"]


def test_devices_that_share_their_memory(estimates):
    """Two CPU devices have half of it each: no mesh is looked for, whatever fits."""
    assert parts(LONG, 3, devices=8, shared=True)[1:] == ["on this mesh not even 5 frames of 256x448 would fit"]
    assert parts(LONG, 35, devices=8, tower="keep", shared=True)[1:] == ["it would fit with --text-tower drop"]


# Whatever is asked


WAY = re.compile(r"--cfg (\d) --tp (\d)( --text-tower drop)?(?: \((\d) devices, not (\d)\))?")
LESS = re.compile(r"(\d+) frames? of (\d+)x(\d+)( with --text-tower drop)?")


@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("tower", ["keep", "drop"])
def test_what_is_named_fits(estimates, tower, cfg, tp):
    """By the estimate, with few of them; and what is not named does not, or is further down the list."""
    for job, gigabytes, devices in itertools.product((LONG, SHORT, IMAGE, SMALL), np.geomspace(2, 60, 30), (1, 2, 8)):
        estimates.clear()
        memory, here = int(gigabytes * GB), made(job, cfg, tp)
        needed, *others = parts(job, gigabytes, devices=max(devices, cfg * tp), tower=tower, cfg=cfg, tp=tp)
        assert len(estimates) <= 15
        peak = here.highest(keep=tower == "keep")
        limit = memory if peak > memory else 0.75 * peak
        assert ("it should fit" in needed) == (peak <= memory)
        sentence = "; ".join(others)
        if sentence.startswith(("it would fit with --text-tower drop", "it would need a quarter less with --text-tower drop")):
            assert tower == "keep"
            assert here.highest(keep=False) <= limit
            assert "on this mesh" not in sentence
        else:
            assert here.highest(keep=False) > limit
        ways = WAY.findall(sentence)
        assert len(ways) <= 2
        assert ways == sorted(ways, key=lambda way: int(way[0]) * int(way[1]))
        assert ("on no mesh" in sentence) <= (not ways)
        for its_cfg, its_tp, drop, used, present in ways:
            assert made(job, int(its_cfg), int(its_tp)).highest(keep=not drop) <= limit
            assert (int(its_cfg) * int(its_tp) > max(devices, cfg * tp)) == bool(used)
            if used:
                assert (int(used), int(present)) == (int(its_cfg) * int(its_tp), max(devices, cfg * tp))
        for frames, height, width, drop in LESS.findall(sentence):
            request = dataclasses.replace(job.request, num_frames=int(frames), height=int(height), width=int(width))
            there = made(dataclasses.replace(job, request=request), cfg, tp)
            assert (there.highest(keep=tower == "keep" and not drop) <= limit) == ("not even" not in sentence)


# The child


SMALL_VAE = dataclasses.replace(cases.VAE, dim_mult=(1,), temperal_downsample=(), num_res_blocks=1)  # it compiles in a second


@pytest.mark.parametrize(("given", "shared"), [({}, False), ({"image": cases.IMAGE}, True)], ids=["mesh", "encoder"])
def test_a_child_finds_it(given, shared, monkeypatch):
    """What it names fits by `estimate`, asked here. With an image, the encoder needs most. It makes its own devices."""
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    request = Request("waves", num_frames=5, height=272, width=480, **given)
    job = Job(TINY, SMALL_VAE, resolve(request, TINY, SMALL_VAE), text_tokens=128)
    here = estimate(job, 1, 1)
    memory = here.highest(keep=False) * 19 // 20
    sentence = remedy.remedy(job, 1, 1, memory, 2, "keep", shared=shared)
    both = f"{here.highest() / 1e9:.3g} GB (about {here.highest(keep=False) / 1e9:.3g} GB with --text-tower drop)"
    there = f"where there are {memory / 1e9:.3g} GB"
    assert sentence.startswith(f"the dry run puts the peak of this request at about {both} on each device, {there}; ")
    ((*size, drop),) = LESS.findall(sentence)
    assert size == ["5", "256", "448"]
    smaller = dataclasses.replace(job, request=dataclasses.replace(job.request, height=256, width=448))
    assert estimate(smaller, 1, 1).highest(keep=not drop) <= memory
    ways = WAY.findall(sentence)
    assert len(ways) == (0 if shared else 2)
    for cfg, tp, drop, *_ in ways[:1]:  # each takes seconds
        assert estimate(job, int(cfg), int(tp)).highest(keep=not drop) <= memory


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """`stub(end)`: instead of Python, a child that keeps what it got, says one part, and ends so. The folder of what it got."""

    def make(end: str) -> Path:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\ncd {tmp_path}\ncat > asked; env > env; echo first; echo $$ > n; mv n number; {end}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return tmp_path

    return make


def test_little_crosses_to_the_child(monkeypatch, stub):
    """Whether a picture and a clip are there is all that counts. No GPU is seen."""
    folder = stub("echo second")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    large = Image.fromarray(np.random.RandomState(0).randint(0, 256, (720, 1280, 3), np.uint8))
    noise = np.zeros((1, 48, *WAN_VAE.latent_shape(9, 720, 1280)), np.float32)
    for given, there in (({"image": large}, (True, None)), ({"video": [large] * 5}, (None, True)), ({}, (None, None))):
        job = asked(9, 720, 1280, latents=noise, **given)
        assert remedy.remedy(job, 2, 1, 9, 8, "keep") == "first; second"
        crossed, *others = pickle.loads((folder / "asked").read_bytes())
        assert (folder / "asked").stat().st_size < 10_000
        assert (crossed.request.image, crossed.request.video) == there
        assert dataclasses.replace(crossed, request=job.request) == job
        assert others == [2, 1, 9, 8, "keep", False]
    assert {"JAX_PLATFORMS=cpu", "CUDA_VISIBLE_DEVICES="} <= set((folder / "env").read_text().splitlines())
    assert os.environ["JAX_PLATFORMS"] == "cuda"


SCRIPT = """
print("once")
from cosmos3_jax.config import NANO, WAN_VAE
from cosmos3_jax.estimate import Job
from cosmos3_jax.remedy import remedy
from cosmos3_jax.request import Request, resolve
print(remedy(Job(NANO, WAN_VAE, resolve(Request(""), NANO, WAN_VAE)), 1, 3, 9, 8, "keep"))
"""


def test_a_child_that_fails_and_a_caller_without_a_guard(tmp_path):
    """The heads do not divide by three. The caller's script is not run again, as multiprocessing would."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    short = f"{DRY_RUN} with the flags of this request tells what it needs, and which meshes have it"
    assert done.stdout.splitlines() == ["once", short]


@pytest.mark.parametrize("executable", ["/bin/false", "/no/such/python", "", None])
def test_a_child_that_cannot_start(monkeypatch, caplog, executable):
    monkeypatch.setattr(sys, "executable", executable)
    with caplog.at_level("DEBUG", "cosmos3_jax.remedy"):
        assert remedy.remedy(SMALL, 1, 1, 9, 1, "keep").startswith(f"{DRY_RUN} with the flags of this request tells")
    assert "no whole dry run: " in caplog.text


def test_a_child_that_fails_on_the_way(stub):
    stub("exit 3")
    assert remedy.remedy(SMALL, 1, 1, 9, 1, "keep") == f"first; {DRY_RUN} tells more"


def test_a_child_that_is_too_slow(stub, monkeypatch):
    """What it said is taken, and it ends."""
    folder = stub("exec sleep 60")
    monkeypatch.setattr(remedy, "SECONDS", 1)
    assert remedy.remedy(SMALL, 1, 1, 9, 1, "keep") == f"first; {DRY_RUN} tells more"
    assert not is_alive(int((folder / "number").read_text()))


@pytest.fixture
def heeds_ctrl_c():
    """Also where these tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_the_child(stub):
    """The second one: the command line takes the first as a wish to end after this step."""
    number = stub("exec sleep 60") / "number"

    def press(seconds: float) -> None:
        while not number.exists():
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    presses = [threading.Thread(target=press, args=(seconds,)) for seconds in (0, 0.3)]
    for thread in presses:
        thread.start()
    with stoppable(), pytest.raises(StoppedError):
        remedy.remedy(SMALL, 1, 1, 9, 1, "keep")
    for thread in presses:
        thread.join()
    assert not is_alive(int(number.read_text()))


def is_alive(number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, 0)
        return True
    return False


def test_a_child_whose_parent_is_gone_ends():
    """Here it waits for what it is asked."""
    program = "from cosmos3_jax import remedy; remedy.SECONDS = 1; remedy.answer()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as child:
        assert child.wait(30) == -signal.SIGALRM


def test_memory_of_devices(monkeypatch):
    """Of a GPU what JAX may take; CPU devices share the host."""
    host = remedy.memory_of(make_mesh())
    assert 1 * GB < host < 10**14
    assert remedy.memory_of(make_mesh(2, 2)) == host // 4
    monkeypatch.setattr(remedy, "device_memory", lambda mesh: 7)
    assert remedy.memory_of(make_mesh()) == 7

"""Several processes: how they find each other, that they make what one process makes, and how they end together.

The runs are real: processes of this machine, each with virtual devices of its own, that talk through gloo.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import wave
from pathlib import Path

import jax
import numpy as np
import pytest
from metrics import errors
from PIL import Image
from safetensors.numpy import load_file

from cosmos3_jax import Cosmos3Pipeline, InputError, make_mesh, processes, result_files
from cosmos3_jax.checkpoint import BUILT_IN

CLI = ["-m", "cosmos3_jax.generate", "--prompt", "a red ball", "--height", "64", "--width", "96"]
VIDEO = [*CLI, "--num-frames", "5", "--steps", "3", "--sound"]
PICTURE = [*CLI, "--num-frames", "1", "--steps", "3"]
# Half the time, as most of a run is compilation; and as many threads for four devices as for eight: sums follow their number.
QUICK = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "NPROC": "8"}
LAUNCHERS = "SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_INDEX"
SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


# Who is asked to start together


@pytest.fixture
def initialized(monkeypatch):
    """What JAX is asked for, call by call. Nothing is started, and this process has not been launched by anyone."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    preemption = jax.config.jax_enable_preemption_service
    yield calls
    jax.config.update("jax_enable_preemption_service", preemption)


TOGETHER = "--coordinator HOST:PORT, --num-processes N and --process-id I belong together; give all three"
ADDRESS = "coordinator={!r}: HOST:PORT of process 0 is expected, for example 10.0.0.1:1234"
NUMBERED = "process_id={}, num_processes={}: processes are numbered from 0 to N - 1"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        *(
            (given, TOGETHER)
            for given in [
                ("a:1", None, None),
                (None, 2, None),
                (None, None, 0),
                ("a:1", 2, None),
                ("a:1", None, 0),
                (None, 2, 0),
            ]
        ),
        *(((address, 2, 0), ADDRESS.format(address)) for address in ["", "a", "a:", ":1", "a:b", "a:-1", "a:0", "a:65536"]),
        *((("a:1", n, i), NUMBERED.format(i, n)) for n, i in [(2, 2), (2, -1), (0, 0), (-1, 0)]),
    ],
)
def test_what_cannot_be_meant_is_refused(initialized, given, sentence):
    with pytest.raises(InputError) as error:
        processes.join(*given)
    assert str(error.value) == sentence
    assert initialized == []


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # the shell of an interactive job: its tasks are still to come
        {"SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "n[1-2]"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
    ids=[
        "by hand",
        "one task of SLURM",
        "a shell of SLURM",
        "SLURM without srun",
        "one process of Open MPI",
        "a pod of its own",
    ],
)
def test_alone_nothing_is_started(initialized, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.join()
    assert initialized == []


def test_one_can_say_that_it_is_alone(initialized, monkeypatch):
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    processes.join(num_processes=1)
    assert initialized == []


def test_alone_one_speaks_and_goes_on():
    assert not jax.distributed.is_initialized()
    assert not processes.are_several()
    assert processes.is_first()
    processes.leave(3)


@pytest.mark.parametrize(
    ("environment", "local_devices"),
    [
        (SLURM, "as JAX decides"),
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "8"}, "as JAX decides"),
        (SLURM | {"SLURM_NTASKS": "20", "SLURM_TASKS_PER_NODE": "10(x2)"}, "as JAX decides"),
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "1(x2),2"}, "as JAX decides"),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}, "all"),
        (OPEN_MPI | SLURM | {"SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}, "as JAX decides"),  # mpirun in a SLURM job
        (OPEN_MPI, "as JAX decides"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "all"),
        (KUBERNETES, "as JAX decides"),
    ],
)
def test_launched_beside_others_it_joins_them(initialized, monkeypatch, environment, local_devices):
    """JAX reads who they are by itself, and gives a process one GPU; the only one of its host is to have all, `[]`."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.join()
    (settings,) = initialized
    times = {"heartbeat_timeout_seconds": 30, "initialization_timeout": 120}
    assert settings == times | ({"local_device_ids": []} if local_devices == "all" else {})


def test_what_is_given_comes_before_the_launcher(initialized, monkeypatch, capsys):
    for name, value in (SLURM | OPEN_MPI).items():
        monkeypatch.setenv(name, value)
    processes.join("[::1]:1234", 2, 1)
    (settings,) = initialized
    assert settings["cluster_detection_method"] == "deactivate"
    assert (settings["coordinator_address"], settings["num_processes"], settings["process_id"]) == ("[::1]:1234", 2, 1)
    assert settings.keys().isdisjoint({"local_device_ids"})
    assert capsys.readouterr() == ("", "process 1 of 2: waiting for the others at [::1]:1234\n")


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_what_jax_refuses_is_one_sentence(initialized, monkeypatch, error):
    def refuse(**settings):
        raise error("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(InputError, match=r"could not find each other: coordinator_address should be defined\."):
        processes.join("localhost:1", 2, 1)


def test_a_host_that_is_not_there_is_said_to_be(initialized):
    with pytest.raises(InputError, match=r"coordinator='nowhere\.invalid:1234': there is no such host"):
        processes.join("nowhere.invalid:1234", 2, 1)
    assert initialized == []


# What they make


@dataclasses.dataclass
class Process:
    """One that runs, and what it has written so far."""

    popen: subprocess.Popen
    log: Path

    def code(self, seconds: float = 300) -> int:
        return self.popen.wait(timeout=seconds)

    @property
    def out(self) -> str:
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self.log.with_suffix(".err").read_text()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start(arguments, devices, **environment)`: a Python that runs beside this one, with so many devices."""
    logs, started = tmp_path_factory.mktemp("logs"), []
    inherited = {name: value for name, value in os.environ.items() if not name.startswith((*LAUNCHERS, "JAX_", "XLA_"))}

    def start(arguments, devices: int, **environment: str) -> Process:
        log = logs / str(len(started))
        environment = inherited | QUICK | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment
        with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
            command = [sys.executable, *map(str, arguments)]
            popen = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment, stdout=out, stderr=err)
        started.append(Process(popen, log))
        return started[-1]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(start, arguments, *, own=((), ()), devices: int = 4) -> list[Process]:
    """A process for each item of `own`: the flags that it alone has."""
    meeting = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", len(own), "--process-id"]
    return [start([*arguments, *flags, *meeting, i], devices) for i, flags in enumerate(own)]


def launched(start, arguments, by: str, *, devices: int) -> list[Process]:
    """Two processes as SLURM or Open MPI would start them here: told by their environment, not by flags."""
    port = str(free_port())
    both = []
    for i in "01":
        if by == "SLURM":
            environment = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "2"}
            environment |= {"SLURM_NTASKS": "2", "SLURM_PROCID": i, "SLURM_LOCALID": i}
        else:
            environment = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
            environment |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": i, "OMPI_COMM_WORLD_LOCAL_RANK": i}
        both.append(start(arguments, devices, JAX_COORDINATOR_PORT=port, **environment))
    return both


def end_well(running: list[Process]) -> None:
    for process in running:
        assert process.code() == 0, process.err


def of_ours(out: str) -> str:
    """Without what gloo prints, all devices at once, so that its words may come in any order."""
    words = "[Gloo] Rank", "is connected to", "peer ranks.", "Expected number of connected peer ranks is :"
    return re.sub("|".join(map(re.escape, words)) + r"|\d|\s", "", out)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.new("RGB", (96, 64), "navy").save(path)
    return path


@pytest.fixture(scope="module")
def one_without_the_image(start, image, tmp_path_factory):
    """Two processes, of which the second has not got the image that both were asked to show. See `video`."""
    folder = tmp_path_factory.mktemp("one_without")
    own = ["--image", image], ["--image", "no.png"]
    return folder, together(start, [*VIDEO, "--cfg", 2, "--tp", 4, "--out", folder / "a.mp4"], own=own)


@pytest.fixture(scope="module")
def video(start, image, tmp_path_factory, one_without_the_image):
    """A video with sound of two processes, from an image. Meanwhile passes the half minute until a silent one is missed."""
    folder = tmp_path_factory.mktemp("video")
    own = [["--out", folder / f"{name}.mp4", "--save-sound", folder / f"{name}.wav"] for name in ("first", "second")]
    both = together(start, [*VIDEO, "--image", image, "--cfg", 2, "--tp", 4], own=own)
    end_well(both)
    return folder / "first.mp4", both


def test_the_first_process_writes_for_both(video):
    path, _ = video
    assert sorted(file.name for file in path.parent.iterdir()) == ["first.mp4", "first.wav"]


def test_the_first_process_speaks_for_both(video):
    path, (first, second) = video
    told = json.loads(first.out.splitlines()[-1])
    assert told["out"] == str(path)
    assert told["mesh"] == "cfg=2 tp=4 on 8 cpu device(s)"
    assert "prompt  a red ball\n" in first.out
    assert "denoise: 100%" in first.err
    assert of_ours(second.out) == ""
    assert re.fullmatch(r"process 1 of 2: waiting for the others at .*\n", second.err)


def test_one_process_with_all_devices_writes_the_same_files(video, start, image, tmp_path):
    # Through gloo too: within a plain process XLA adds four partial products in another order.
    path, _ = video
    flags = ["--image", image, "--cfg", 2, "--tp", 4, "--out", tmp_path / "a.mp4", "--save-sound", tmp_path / "a.wav"]
    (alone,) = together(start, [*VIDEO, *flags], own=[()], devices=8)
    end_well([alone])
    for suffix in (".mp4", ".wav"):
        assert (tmp_path / "a").with_suffix(suffix).read_bytes() == path.with_suffix(suffix).read_bytes()


def test_under_slurm_no_flags_are_needed(start, tmp_path):
    # tp=2: two summands commute, so that the plain process gives the same picture to the bit.
    flags = [*PICTURE, "--cfg", 2, "--tp", 2, "--out"]
    (tmp_path / "slurm").mkdir()
    end_well(launched(start, [*flags, tmp_path / "slurm" / "a.png"], "SLURM", devices=2))
    end_well([start([*flags, tmp_path / "plain.png"], 4)])
    assert [file.name for file in (tmp_path / "slurm").iterdir()] == ["a.png"]
    assert (tmp_path / "slurm" / "a.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


ASKED = {"prompt": "a red ball", "num_frames": 1, "height": 64, "width": 96, "num_inference_steps": 3, "enable_sound": True}
PROGRAM = f"""
import sys
import jax, numpy
from cosmos3_jax import Cosmos3Pipeline, make_mesh, processes

processes.join()
result = Cosmos3Pipeline.from_pretrained({str(BUILT_IN)!r}, mesh=make_mesh(cfg=2, tp=4))(**{ASKED!r})
path = sys.argv[1] + "/" + str(jax.process_index())
result.save(path + ".wav")
numpy.savez(path, video=result.video, sound=result.sound)
"""


def test_from_python_under_open_mpi_each_process_has_the_result(start, tmp_path):
    end_well(launched(start, ["-c", PROGRAM, tmp_path], "Open MPI", devices=4))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.npz", "0.wav", "1.npz"]
    first, second = np.load(tmp_path / "0.npz"), np.load(tmp_path / "1.npz")
    plain = Cosmos3Pipeline.from_pretrained(BUILT_IN, mesh=make_mesh(cfg=2, tp=4))(**ASKED, progress=False)
    for name in ("video", "sound"):
        np.testing.assert_array_equal(first[name], second[name])
        assert errors(first[name], getattr(plain, name))[0] < 1e-5  # partial products are added in another order
    with wave.open(str(tmp_path / "0.wav")) as file:
        samples = np.frombuffer(file.readframes(1 << 20), "<i2").reshape(-1, 2).T
    assert np.abs(samples - np.round(32767 * plain.sound)).max() <= 1


TRAIN = ["-m", "cosmos3_jax.train", "--num-frames", 5, "--height", 32, "--width", 48, "--batch-size", 2, "--ema", 0.5]


def test_they_train_as_one_does_and_go_on(start, folders, tmp_path):
    clips, base, both, alone = tmp_path / "clips", folders("small"), tmp_path / "both", tmp_path / "alone"
    clips.mkdir()
    for i in range(2):
        frames = np.random.default_rng(i).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
        result_files.write(clips / f"{i}.mp4", frames, 24.0)
        (clips / f"{i}.txt").write_text("noise")
    flags = [*TRAIN, "--checkpoint", base, "--data", clips, "--cfg", 2, "--tp", 2, "--warmup", 0, "--out"]
    end_well(two := together(start, [*flags, both, "--steps", 2], devices=2))
    end_well([start([*flags, alone, "--steps", 2], 4)])
    np.testing.assert_allclose(losses(both), losses(alone), rtol=2e-5)
    assert json.loads(two[0].out.splitlines()[-1])["out"] == str(both / "checkpoint")
    assert of_ours(two[1].out) == ""
    weights = "transformer/diffusion_pytorch_model.safetensors"
    first, plain, before = (load_file(folder / weights) for folder in (both / "checkpoint", alone / "checkpoint", base))
    moved = [name for name in plain if not np.array_equal(plain[name], before[name])]
    assert moved
    for name in moved:  # Adam moves all alike, where a gradient is as good as none in the direction of a rounding
        assert np.mean(np.abs(first[name] - plain[name]) < 2e-6) > 0.95, name
    end_well(together(start, [*flags, both, "--steps", 3], devices=2))
    assert len(losses(both)) == 3
    assert any(not np.array_equal(x, first[name]) for name, x in load_file(both / "checkpoint" / weights).items())


def losses(run: Path) -> list[float]:
    return [float(row.split(",")[1]) for row in (run / "log.csv").read_text().splitlines()[1:]]


# How they end


def says_why(err: str) -> bool:
    """Whether a process that ends with another says so: we do, or JAX does if it hears of it first."""
    return "error: this process ends, and with it the others" in err or "another task died" in err


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_ends_the_other(start, tmp_path, victim):
    both = together(start, [*PICTURE, "--steps", 1000, "--cfg", 2, "--tp", 2, "--out", tmp_path / "a.png"], devices=2)
    wait_until(lambda: re.search(r"\| [1-9]\d*/1000 ", both[0].err), both[0])
    both[victim].popen.kill()
    assert both[1 - victim].code() not in (0, 2)
    assert says_why(both[1 - victim].err)
    assert not list(tmp_path.iterdir())


def wait_until(condition, process: Process) -> None:
    deadline = time.monotonic() + 120
    ended = False
    while not condition():
        assert not ended, process.err
        assert time.monotonic() < deadline
        time.sleep(0.1)
        ended = process.popen.poll() is not None


JOINED = """
import sys, time
from cosmos3_jax import processes

processes.join(sys.argv[1], 1, 0)
print("joined", flush=True)
time.sleep(60)
"""


def test_a_process_can_be_asked_to_end(start):
    # JAX would take SIGTERM for the notice of a preemption, and go on.
    process = start(["-c", JOINED, f"127.0.0.1:{free_port()}"], 1)
    wait_until(lambda: "joined" in process.out, process)
    process.popen.terminate()
    assert process.code() == -signal.SIGTERM


def test_what_only_the_first_is_refused_ends_both(start, tmp_path):
    own = ["--out", tmp_path / "no" / "a.png"], ["--out", tmp_path / "a.png"]
    first, second = together(start, [*PICTURE, "--cfg", 2, "--tp", 2], own=own, devices=2)
    wait_until(lambda: "create it first\n" in first.err, first)
    assert first.code(seconds=15) == 2  # a process that says goodbye to JAX waits for the other, which waits for it
    assert first.err.endswith(f"a.png: the folder {tmp_path / 'no'} does not exist; create it first\n")
    assert second.code() != 0
    assert says_why(second.err)
    assert not list(tmp_path.iterdir())


def test_processes_that_were_asked_for_different_things_end(start, tmp_path):
    # In collectives of unlike programs they would wait for each other for ever.
    flags = [*PICTURE, "--cfg", 2, "--tp", 2, "--out", tmp_path / "a.png"]
    for process in together(start, flags, own=(["--seed", 1], ["--seed", 2]), devices=2):
        assert process.code() == 2, process.err
        assert process.err.endswith("error: the processes were asked for different things; give all the same flags and files\n")
    assert not list(tmp_path.iterdir())


def test_a_mesh_that_leaves_one_without_a_device_is_refused_by_both(start, tmp_path):
    sentence = (
        "error: cfg=1 x tp=4 takes 4 of 8 devices and leaves process 1 without one; "
        "take more of them, or start fewer processes\n"
    )
    for process in together(start, [*PICTURE, "--tp", 4, "--out", tmp_path / "a.png"]):
        assert process.code() == 2, process.err
        assert process.err.endswith(sentence)
        assert of_ours(process.out) == ""
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_said_to_be(start, tmp_path):
    with socket.create_server(("", 0)) as taken:
        meeting = ["--coordinator", f"127.0.0.1:{taken.getsockname()[1]}", "--num-processes", 2, "--process-id", 0]
        first = start([*PICTURE, *meeting, "--out", tmp_path / "a.png"], 1)
        assert first.code() == 2, first.err
    assert re.search(r"^error: .*port.*\n\Z", first.err, re.MULTILINE)


def test_what_only_the_second_is_refused_ends_both(one_without_the_image):
    folder, (first, second) = one_without_the_image
    assert second.code() == 2
    assert second.err.endswith("error: image no.png: there is no such file\n")
    assert first.code() != 0
    assert says_why(first.err)
    assert not list(folder.iterdir())

"""Many requests into one folder: what is done, left alone, recorded, and what a killed process leaves to the next.

Most runs are in this process, on the built-in checkpoint. Those that are killed or run beside each other are real ones; they
share a folder of compiled programs, so that each starts at once.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from test_processes import LAUNCHERS, QUICK, Process, together, wait_until
from test_stop import heeded  # noqa: F401

from cosmos3_jax import BlockedError, Cosmos3Pipeline, InputError, OutOfMemoryError, generate, media, output_folder, safety
from cosmos3_jax.compilation_cache import remove_cut_off
from cosmos3_jax.output_folder import OutputFolder

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio leaves its pipes to the collector
SMALL = ["--num-frames", "5", "--height", "32", "--width", "32", "--steps", "2"]
A, B, C = ({"name": name, "prompt": f"prompt {name}", "seed": seed} for seed, name in enumerate("abc"))
PICTURE = {"num_frames": 1}
WRONG = {"num_frames": 10}
NO_IMAGE = {"image": "no.png"}


def write(place: Path, *lines: dict) -> Path:
    """A file of requests."""
    file = place / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def batch(tmp_path):
    """`batch(*lines, flags=())`: its exit code, and what it writes to stdout, to stderr and in the last line."""

    def batch(*lines: dict, flags=()) -> types.SimpleNamespace:
        out, err = io.StringIO(), io.StringIO()
        asked = ["--requests", write(tmp_path, *lines), "--out-dir", tmp_path / "out", *flags]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = generate.main([*SMALL, *map(str, asked)])
        last = (out.getvalue().splitlines() or [""])[-1]
        told = json.loads(last) if last.startswith("{") else None
        return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), told=told)

    return batch


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(Cosmos3Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.fixture
def interfere(monkeypatch):
    """`interfere(**by_prompt)`: before a request of this letter is run, a function is called."""
    run = Cosmos3Pipeline.run

    monkeypatch.setattr(generate, "_advice", lambda *_: "take less", raising=False)  # where memory ends; it takes a while

    def interfere(**functions) -> list[str]:
        begun = []

        def interfered(pipe, request, **settings):
            begun.append(request.prompt[-1])
            functions.get(begun[-1], lambda: None)()
            return run(pipe, request, **settings)

        monkeypatch.setattr(Cosmos3Pipeline, "run", interfered)
        return begun

    return interfere


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, hidden files too."""
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def raising(error: BaseException):
    def raise_it():
        raise error

    return raise_it


# What goes well


def test_each_has_its_file_and_its_record(batch, out):
    done = batch(A, B | PICTURE, C | {"enable_sound": True}, {"name": "d e", "num_frames": 1, "enable_sound": True})
    assert done.code == 0, done.err
    names = ["a.json", "a.mp4", "b.json", "b.png", "c.json", "c.mp4", "d e.json", "d e.mp4"]
    assert sorted(os.listdir(out)) == names
    assert len(media.open_clip(out / "a.mp4", 100)) == 5
    assert Image.open(out / "b.png").size == (32, 32)
    for name, file in (("a", "a.mp4"), ("b", "b.png"), ("c", "c.mp4"), ("d e", "d e.mp4")):
        found = record(out, name)
        assert found.keys() == {"name", "status", "file", "sha256", "metadata"}
        assert (found["name"], found["status"], found["file"]) == (name, "done", file)
        assert found["sha256"] == hashlib.sha256((out / file).read_bytes()).hexdigest()
        assert found["metadata"] == media.read_metadata(out / file)
        assert found["metadata"].keys() >= {"version", "jax", "checkpoint", "prompt", "seed", "num_inference_steps", "dtype"}


def test_the_last_line(batch, out):
    told = batch(A, B | WRONG, C).told
    assert told.pop("seconds") > 0
    assert told.pop("version")
    assert told == {
        "out_dir": str(out),
        "requests": 3,
        "finished_before": [],
        "done": ["a", "c"],
        "failed": ["b"],
        "with_others": [],
    }


def test_a_batch_makes_what_single_requests_make(batch, out, tmp_path):
    batch(A, B)
    assert generate.main([*SMALL, "--quiet", "--prompt", B["prompt"], "--seed", "1", "--out", str(tmp_path / "b.mp4")]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == (out / "b.mp4").read_bytes()
    assert (out / "a.mp4").read_bytes() != (out / "b.mp4").read_bytes()


def test_flags_are_defaults(batch, out):
    batch(A, {"name": "b", "num_inference_steps": 3}, flags=["--seed", 7, "--fps", 8, "--prompt", "waves"])
    a, b = (record(out, name)["metadata"] for name in "ab")
    names = "prompt", "seed", "num_inference_steps", "fps"
    assert [a[name] for name in names] == ["prompt a", 0, 2, 8]
    assert [b[name] for name in names] == ["waves", 7, 3, 8]


def test_a_prompt_that_is_an_object(batch, out):
    batch(A | {"prompt": {"subject": "été"}})
    assert json.loads(record(out, "a")["metadata"]["prompt"]) == {"subject": "été"}


@pytest.fixture
def picture(tmp_path):
    """`picture(color)`: writes in/a.png."""
    (tmp_path / "in").mkdir()
    return lambda color: Image.new("RGB", (40, 50), color).save(tmp_path / "in" / "a.png")


IMAGE = {"image": "in/a.png"}


def test_images_are_seen_from_the_file_of_requests(batch, out, picture, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    picture("navy")
    assert batch(A | IMAGE).code == 0
    assert record(out, "a")["metadata"]["image"].startswith("40x50, sha256 ")


# What is left alone, and what is made anew


def test_what_is_finished_is_left_alone(batch, out, picture, request):
    picture("navy")
    lines = A, B | PICTURE, C | IMAGE
    batch(*lines)
    before, times = files(out), {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    request.getfixturevalue("nothing_runs")
    again = batch(*lines, flags=["--fail-fast"])
    assert again.code == 0
    assert again.told["finished_before"] == ["a", "b", "c"]
    assert files(out) == before
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == times


OTHER_WORDS = {
    "prompt": {"prompt": "prompt A"},
    "seed": {"seed": 9},
    "setting": {"fps": 12},
    "no image": {"image": None},
    "another image": {"image": "in/b.png"},
}


@pytest.mark.parametrize("what", OTHER_WORDS)
def test_a_request_that_changed_is_made_anew(batch, out, picture, tmp_path, what):
    """And no other."""
    Image.new("RGB", (40, 50), "red").save(tmp_path / "b.png")
    picture("navy")
    (tmp_path / "b.png").rename(tmp_path / "in" / "b.png")
    batch(A | IMAGE, B)
    before = files(out)
    changed = A | IMAGE | OTHER_WORDS[what]
    assert batch(changed, B).told["done"] == ["a"]
    after = files(out)
    assert {name for name in after if after[name] != before.get(name)} == {"a.mp4", "a.json"}
    assert batch(changed, B).told["finished_before"] == ["a", "b"]


def test_what_was_made_unchecked_is_made_anew_with_guardrails(batch, out, monkeypatch):
    class Passing:
        check_prompt = check_video = staticmethod(lambda value: None if isinstance(value, str) else value)

    monkeypatch.setattr(safety, "_is_installed", lambda: True)
    monkeypatch.setattr(safety, "CosmosGuardrail", Passing)
    batch(A)
    assert batch(A, flags=["--guardrails"]).told["done"] == ["a"]
    assert record(out, "a")["metadata"]["guardrails"] == "cosmos_guardrail"
    assert batch(A, flags=["--guardrails"]).told["finished_before"] == ["a"]
    assert batch(A, flags=["--no-guardrails"]).told["finished_before"] == ["a"]


def test_an_image_whose_content_changed_is_shown_anew(batch, out, picture):
    picture("navy")
    batch(A | IMAGE, B)
    before = files(out)
    picture("red")
    assert batch(A | IMAGE, B).told["done"] == ["a"]
    assert files(out)["a.mp4"] != before["a.mp4"]


OTHER_FILES = {
    "file": lambda out: (out / "a.mp4").write_bytes((out / "a.mp4").read_bytes()[:-1]),
    "no file": lambda out: (out / "a.mp4").unlink(),
    "record": lambda out: (out / "a.json").write_text("{}"),
    "no record": lambda out: (out / "a.json").unlink(),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_what_was_damaged_is_made_anew(batch, out, what):
    batch(A, B)
    before = files(out)
    OTHER_FILES[what](out)
    assert batch(A, B).told["done"] == ["a"]
    assert files(out) == before


def test_a_version_of_ours_or_of_jax_makes_nothing_anew(batch, out):
    batch(A)
    found = record(out, "a")
    found["metadata"] |= {"version": "0.0.1", "jax": "0.9"}
    (out / "a.json").write_text(json.dumps(found))
    assert batch(A).told["finished_before"] == ["a"]


def test_a_request_that_became_an_image_leaves_no_video(batch, out):
    batch(A, B)
    batch(A | PICTURE, B)
    assert sorted(os.listdir(out)) == ["a.json", "a.png", "b.json", "b.mp4"]
    batch(A, B)
    assert sorted(os.listdir(out)) == ["a.json", "a.mp4", "b.json", "b.mp4"]


def test_what_is_not_asked_for_any_more_stays(batch, out):
    batch(A, B)
    before = files(out)
    assert batch(B, C).told["done"] == ["c"]
    assert before.items() <= files(out).items()


# What fails

FAILURES = {
    "a word": (B | WRONG, None, "InputError", "num_frames=10: .*"),
    "a file": (B | NO_IMAGE, None, "InputError", "image .*no.png: there is no such file"),
    "memory": (
        B,
        OutOfMemoryError("denoise: out of memory (4 GB)", "denoise"),
        "OutOfMemoryError",
        "denoise: out of memory .*",
    ),
    "safety": (B, BlockedError("prompt: blocked"), "BlockedError", "prompt: blocked"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_is_put_on_record_and_the_rest_goes_on(batch, out, interfere, what):
    line, error, kind, sentence = FAILURES[what]
    interfere(b=(lambda: None) if error is None else raising(error))
    done = batch(A, line, C)
    assert done.code == 1
    assert (done.told["done"], done.told["failed"]) == (["a", "c"], ["b"])
    assert sorted(os.listdir(out)) == ["a.json", "a.mp4", "b.json", "c.json", "c.mp4"]
    found = record(out, "b")
    assert found == {"name": "b", "status": "failed", "kind": kind, "error": found["error"]}
    assert re.fullmatch(sentence, found["error"])
    assert f"error: b: {found['error']}\n" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("what", FAILURES)
def test_the_first_failure_is_the_end_if_so_asked(batch, out, interfere, what):
    line, error, kind, _ = FAILURES[what]
    begun = interfere(b=(lambda: None) if error is None else raising(error))
    done = batch(A, line, C, flags=["--fail-fast"])
    assert done.code == {"InputError": 2, "BlockedError": 3, "OutOfMemoryError": 1}[kind]
    assert "c" not in begun
    assert record(out, "b")["status"] == "failed"
    assert not [name for name in os.listdir(out) if name.startswith(("c", "."))]


def test_what_failed_is_tried_again_last_and_done_when_the_cause_is_gone(batch, out, picture, interfere):
    lines = A | IMAGE, B, C
    assert batch(*lines).told["failed"] == ["a"]
    (out / "b.mp4").unlink()
    assert batch(*lines).told["failed"] == ["a"]
    (out / "b.mp4").unlink()
    picture("navy")
    begun = interfere()
    done = batch(*lines)
    assert (done.code, begun) == (0, ["b", "a"])
    assert record(out, "a")["status"] == "done"


def test_a_slip_costs_nothing_that_is_finished(batch, out, request):
    """Words, and memory, that fail for every request once: afterwards all are as finished as before."""
    batch(A, B)
    before = files(out)
    assert batch(A, B, flags=["--num-frames", "10"]).told["failed"] == ["a", "b"]
    assert record(out, "a")["status"] == "failed"
    request.getfixturevalue("nothing_runs")
    assert batch(A, B).told["finished_before"] == ["a", "b"]
    assert files(out) == before


@pytest.mark.parametrize("how", ["failed", "done"])
def test_what_another_process_finishes_meanwhile_is_not_done_again(batch, out, interfere, how):
    def by_another():
        other = OutputFolder(out)
        if how == "failed":
            other.failed("b", InputError("no"))
        else:
            (out / "b.mp4").write_bytes(b"")
            other.done("b", "b.mp4", {})

    begun = interfere(a=by_another)
    done = batch(A, B, C)
    assert (done.code, done.told["done"], done.told["with_others"]) == (0, ["a", "c"], ["b"])
    assert begun == ["a", "c"]
    assert record(out, "b")["status"] == how


def test_what_another_process_is_at_work_on_is_asked_for_again_at_the_end(batch, out, interfere):
    """It may have been killed by then. What is still another's then is left to it."""
    with contextlib.ExitStack() as killed, contextlib.ExitStack() as alive:
        begun = interfere(c=killed.close)
        out.mkdir()
        killed.enter_context(OutputFolder(out).claimed("a"))
        alive.enter_context(OutputFolder(out).claimed("b"))
        done = batch(A, B, C)
        assert begun == ["c", "a"]
        assert (done.code, done.told["done"], done.told["with_others"]) == (0, ["c", "a"], ["b"])
        assert sorted(os.listdir(out)) == [".claim.b", "a.json", "a.mp4", "c.json", "c.mp4"]


def test_a_defect_of_ours_is_put_on_record_and_is_the_end(batch, out, interfere):
    interfere(b=raising(ZeroDivisionError("by zero")))
    with pytest.raises(ZeroDivisionError):
        batch(A, B, C)
    assert sorted(os.listdir(out)) == ["a.json", "a.mp4", "b.json"]
    assert record(out, "b") == {"name": "b", "status": "failed", "kind": "ZeroDivisionError", "error": "by zero"}


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("then_fails", [False, True])
def test_a_stop_leaves_nothing_of_the_request(batch, out, interfere, number, then_fails):
    """Nor is it put on record if the request fails for it."""

    def stop():
        os.kill(os.getpid(), number)
        if then_fails:
            raise InputError("ffmpeg was stopped")

    interfere(b=stop)
    done = batch(A, B, C)
    assert done.code == 128 + number
    assert done.err.endswith(f"error: stopped by {number.name}\n")
    assert sorted(os.listdir(out)) == ["a.json", "a.mp4"]
    interfere()
    assert batch(A, B, C).told["done"] == ["b", "c"]


@pytest.mark.usefixtures("heeded")
def test_a_stop_while_a_file_is_written_lets_it_be_finished_and_the_next_not_begin(batch, out, interfere, monkeypatch):
    begun, finish = interfere(), OutputFolder.done

    def done(folder, name, *what):
        os.kill(os.getpid(), signal.SIGTERM)
        finish(folder, name, *what)

    monkeypatch.setattr(OutputFolder, "done", done)
    assert batch(A, B).code == 143
    assert begun == ["a"]
    assert sorted(os.listdir(out)) == ["a.json", "a.mp4"]


# What cannot be written


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("place", ["a file", "a file/below", "/proc/new", "/sys/new"])
def test_a_folder_that_cannot_be_used_is_refused_before_loading(batch, tmp_path, place):
    (tmp_path / "a file").write_text("")
    done = batch(A, flags=["--out-dir", tmp_path / place])
    assert (done.code, done.out) == (2, "")
    assert "no folder that can be written to" in done.err


@pytest.mark.usefixtures("nothing_runs")
def test_a_record_that_can_never_be_written_is_refused_before_loading(batch, out):
    (out / "b.json").mkdir(parents=True)
    done = batch(A, B)
    assert (done.code, done.out) == (2, "")
    assert "b.json: no file" in done.err


def test_a_file_that_can_never_be_written_fails_before_it_is_made(batch, out, interfere):
    (out / "b.mp4").mkdir(parents=True)
    begun = interfere()
    assert batch(A, B, C).told["failed"] == ["b"]
    assert begun == ["a", "c"]
    assert record(out, "b")["error"].endswith("b.mp4: no file can be written there")


def test_a_full_disk_is_the_end(batch, out, monkeypatch):
    """What cannot be put on record is not done; the next run does it."""

    def full(path, value):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "write_json", full)
        done = batch(A, B)
        assert done.code == 1
        assert "a.json: could not be written" in done.err
        assert os.listdir(out) == ["a.mp4"]
    assert batch(A, B).told["done"] == ["a", "b"]


# Several processes

TWELVE = [{"name": f"r{i:02}", "prompt": f"prompt {i}", "seed": i} for i in range(12)]
TWELVE[3] |= PICTURE
TWELVE[6] |= {"enable_sound": True}


@dataclasses.dataclass
class Runs:
    """Real runs of twelve requests, and what one run, left alone, makes of them."""

    requests: Path
    environment: dict[str, str]
    expected: dict[str, bytes]
    started: list[Process]

    def start(self, log: Path, *arguments) -> Process:
        with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
            command = [sys.executable, *map(str, arguments)]
            popen = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=self.environment, stdout=out, stderr=err)
        self.started.append(Process(popen, log))
        return self.started[-1]

    @contextlib.contextmanager
    def run(self, folder: Path, log: str = "log") -> Iterator[Process]:
        """A process that does the twelve; it is killed at the end of the block if it still runs."""
        many = "--steps", 200, "--requests", self.requests, "--out-dir", folder  # steps: time for a kill, or for the others
        process = self.start(folder.parent / log, "-m", "cosmos3_jax.generate", *SMALL, *many)
        try:
            yield process
        finally:
            process.popen.kill()
            process.popen.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    place = tmp_path_factory.mktemp("runs")
    environment = {name: value for name, value in os.environ.items() if not name.startswith((*LAUNCHERS, "JAX_", "XLA_"))}
    environment |= QUICK | {"JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(place / "programs")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    made = Runs(write(place, *TWELVE), environment, {}, [])
    with made.run(place / "out") as process:
        end_well([process])
    made.expected = files(place / "out")
    assert len(made.expected) == 24
    yield made
    for process in made.started:
        process.popen.kill()
        process.popen.wait()


def end_well(running: list[Process]) -> None:
    for process in running:
        assert process.code(seconds=180) == 0, process.err


def told(process: Process) -> dict:
    return json.loads(process.out.splitlines()[-1])


def has_begun(process: Process) -> bool:
    return ": request " in process.out


def partials(folder: Path) -> list[Path]:
    """What is being written."""
    return list(folder.glob(".cosmos3.*"))


def finished(folder: Path) -> int:
    return len(list(folder.glob("*.json")))


def test_killed_five_times_it_makes_the_same_files(runs, tmp_path):
    """At any moment, in the middle of writing a file or a record too; to the bit, and with nothing beside them."""
    chance, out, left, left_in_writing = random.Random(7), tmp_path / "out", [], []
    for kill in range(5):
        enough = finished(out) + chance.randrange(2)
        with runs.run(out) as process:
            wait_until(functools.partial(has_begun, process), process)
            while finished(out) < enough or (kill % 2 and not partials(out)):
                assert process.popen.poll() is None, process.err
                time.sleep(0.002)
            time.sleep(chance.random() * (0.02 if kill % 2 else 0.25))
            assert process.popen.poll() is None, "it ended before it was killed"
            process.popen.kill()
            process.popen.wait()
        left += out.glob(".claim.*")
        left_in_writing += partials(out)
    assert left
    assert left_in_writing
    with runs.run(out) as process:
        end_well([process])
    assert files(out) == runs.expected
    assert "warning" not in process.err


def test_two_processes_share_the_work(runs, tmp_path):
    out = tmp_path / "out"
    with runs.run(out, log="0") as one, runs.run(out, log="1") as other:
        end_well([one, other])
    first, second = told(one)["done"], told(other)["done"]
    assert sorted(first + second) == [line["name"] for line in TWELVE]  # each exactly once
    assert first
    assert second
    assert files(out) == runs.expected


def test_the_work_of_a_killed_process_is_done_by_the_others(runs, tmp_path):
    out = tmp_path / "out"
    with contextlib.ExitStack() as stack:
        three = [stack.enter_context(runs.run(out, log=str(i))) for i in range(3)]
        wait_until(functools.partial(has_begun, three[0]), three[0])
        time.sleep(0.2)
        three[0].popen.kill()
        end_well(three[1:])
    done = [name for each in three[1:] for name in told(each)["done"]]
    assert len(done) == len(set(done))
    begun_by_the_killed = {line.split(":")[0] for line in three[0].out.splitlines() if ": request " in line}
    assert {line["name"] for line in TWELVE} - set(done) <= begun_by_the_killed
    assert files(out) == runs.expected


# What a kill leaves of compiled programs

COMPILES = """
import jax
from cosmos3_jax.compilation_cache import use_compilation_cache

use_compilation_cache()
linalg = jax.numpy.linalg
print(jax.jit(lambda x: abs(linalg.svd(x)[0]).sum() + linalg.eigvalsh(x).sum() + linalg.det(x))(jax.numpy.eye(30)))
"""


def test_a_program_that_was_cut_off_is_compiled_once_more(runs, tmp_path):
    """JAX would keep it, and warn of it in every process. A kill, or a full disk, cuts off at the end of a page."""
    again = dataclasses.replace(runs, environment=runs.environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")})
    sizes = []
    for i in range(2):
        process = again.start(tmp_path / str(i), "-c", COMPILES)
        end_well([process])
        assert (process.out, process.err) == ("61.0\n", "")
        sizes.append({file: file.stat().st_size for file in (tmp_path / "programs").glob("*-cache")})
        for file, size in sizes[-1].items():
            os.truncate(file, (size - 1) // 4096 * 4096)
    assert max(sizes[0].values()) > 4096 > min(sizes[0].values())  # the latter are cut off to nothing
    assert sizes[1].keys() == sizes[0].keys()
    assert min(sizes[1].values()) > 0


@pytest.mark.parametrize("module", ["zlib", "zstandard"])
def test_a_program_that_ends_at_a_page_by_chance_is_kept(tmp_path, module):
    compress = pytest.importorskip(module).compress
    content = next(c for c in (compress(random.Random(0).randbytes(n)) for n in range(4000, 4096)) if len(c) == 4096)
    (tmp_path / "whole-cache").write_bytes(content)
    (tmp_path / "cut_off-cache").write_bytes(compress(random.Random(0).randbytes(9000))[:4096])
    (tmp_path / "another's").write_bytes(b"")
    remove_cut_off(tmp_path)
    remove_cut_off(tmp_path / "no")
    assert sorted(os.listdir(tmp_path)) == ["another's", "whole-cache"]


# A mesh of several processes


def test_a_mesh_of_processes_does_a_batch_together(runs, tmp_path):
    """The files of one process with as many devices. What fails in all, or in one of them, is on record once."""
    own = []
    for name in "01":
        (tmp_path / name).mkdir()
        own.append(
            ["--requests", write(tmp_path / name, A, B | NO_IMAGE, C | IMAGE, A | {"name": "d"} | WRONG, A | {"name": "e"})]
        )
    (tmp_path / "1" / "in").mkdir()
    Image.new("RGB", (40, 50), "navy").save(tmp_path / "1" / "in" / "a.png")  # which the first process has not got

    def start(arguments, devices: int) -> Process:
        runs_here = dataclasses.replace(runs, environment=runs.environment | {"JAX_NUM_CPU_DEVICES": str(devices)})
        return runs_here.start(tmp_path / f"log{len(os.listdir(tmp_path))}", *arguments)

    cli = ["-m", "cosmos3_jax.generate", *SMALL, "--tp", 2, "--out-dir"]
    both = together(start, [*cli, tmp_path / "both"], own=own, devices=1)
    assert both[0].code(seconds=180) == 1, both[0].err
    both[1].code()
    (alone,) = together(start, [*cli, tmp_path / "alone"], own=own[:1], devices=2)
    assert alone.code(seconds=180) == 1, alone.err
    assert files(tmp_path / "both") == files(tmp_path / "alone")
    for process in (both[0], alone):
        outcome = told(process)
        assert (outcome["done"], sorted(outcome["failed"])) == (["a", "e"], ["b", "c", "d"])
        assert process.err.count("error: b: ") == process.err.count("error: c: ") == 1
        assert "Traceback" not in process.err
    assert json.loads(files(tmp_path / "both")["c.json"])["error"].endswith("in/a.png: there is no such file")

"""`--dry-run`: tables and a JSON line, of shapes alone, or one sentence and exit code 2."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import cases
import pytest

from cosmos3_jax import dry_run, generate, result_files
from cosmos3_jax.config import NANO, SOUND_TOKENIZER, TINY, TINY_SOUND, UNIPC, WAN_VAE
from cosmos3_jax.estimate import TEXT_TOKENS, Estimate, Job, Stage, estimate
from cosmos3_jax.gpus import GPUS
from cosmos3_jax.request import Request, resolve

IMAGE = ["--num-frames", "1", "--height", "64", "--width", "96", "--steps", "3"]


def run(*flags) -> types.SimpleNamespace:
    """Exit code, what is on stdout and on stderr, and the JSON of the last line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = generate.main(["--dry-run", *IMAGE, *map(str, flags)])
    told = json.loads(out.getvalue().splitlines()[-1]) if code == 0 else None
    return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), told=told)


def tables(out: str) -> list[list[str]]:
    """The lines of each Markdown table."""
    return [part.splitlines() for part in out.split("\n\n") if part.startswith("|")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory):
    """A checkpoint with its JSON and tokenizer, and no weights."""
    path = tmp_path_factory.mktemp("dry") / "checkpoint"
    shutil.copytree(folders("small"), path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that the command line asks for; nothing is compiled."""
    asked = []
    monkeypatch.setattr(generate, "dry_run", lambda job, cfg, tp: (asked.append(job), ("", {}))[1])
    return asked


# What is printed


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A dry run on cfg=2 tp=4, beside (1, 1) the only mesh: each takes seconds. In a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "MESHES", ((1, 1), (2, 4)))
        patch.chdir(tmp_path_factory.mktemp("out"))
        return run("--checkpoint", folder, "--cfg", 2, "--tp", 4), Path.cwd()


def test_it_needs_no_weights_and_writes_no_file(done, folder):
    assert not list(folder.rglob("*.safetensors"))
    assert (done[0].code, done[0].err) == (0, "")
    assert not list(done[1].iterdir())


def test_four_tables_whose_columns_line_up(done):
    printed = tables(done[0].out)
    assert len(printed) == 4
    for lines in printed:
        assert len({len(line) for line in lines}) == 1
        bars = [[i for i, letter in enumerate(line) if letter == "|"] for line in lines]
        assert all(row == bars[0] for row in bars)
        assert set(lines[1]) <= set("| -")  # Markdown takes it for a table


def test_the_title_says_what_was_asked(done):
    title = "1 frame(s) of 64x96, 3 steps, bfloat16, 128 text tokens a branch, on cfg=2 tp=4"
    assert done[0].out.startswith(title + "\n")


def test_json_has_the_numbers(done, folder):
    """Those of the same job, asked without a command line."""
    request = resolve(Request("", num_frames=1, height=64, width=96, num_inference_steps=3), TINY, cases.VAE)
    told = done[0].told
    assert told["meshes"][1] == told["chosen"]
    for told_of, mesh in zip(told["meshes"], ((1, 1), (2, 4)), strict=True):
        e = estimate(Job(TINY, cases.VAE, request, "bfloat16", text_tokens=128), *mesh)
        assert (told_of["cfg"], told_of["tp"], told_of["weights"], told_of["peak"]) == (*mesh, e.weights, e.highest())
        assert list(told_of["stages"]) == ["prefill", "step", "decode"]
        for stage in e.stages:
            part = told_of["stages"][stage.name]
            assert (part["runs"], part["flops"]) == (stage.runs, stage.flops)
            peaks = e.peak(stage), e.peak(stage, keep=False)
            needs = stage.weights, stage.inputs, stage.results, stage.scratch, *peaks
            assert tuple(part["bytes"].values()) == needs
            assert sum(each["count"] for each in part["collectives"].values()) == sum(c.count for c in stage.collectives)
        for gpu in GPUS:
            expected = {"fits": e.fits(gpu), "seconds": e.total_seconds(gpu), "link_seconds": e.link_seconds(gpu)}
            assert told_of["gpus"][gpu.name] == expected
    assert told["meshes"][0]["stages"]["step"]["collectives"] == {}
    layers = TINY.num_hidden_layers
    assert told["chosen"]["stages"]["step"]["collectives"]["all-reduce"]["count"] == 2 * layers


def test_tables_say_what_json_says(done):
    memory, sent, time, meshes = tables(done[0].out)
    chosen = done[0].told["chosen"]
    for line in memory[2:]:
        name, *gigabytes = cells(line)
        # Three digits are printed, and nothing of less than a kilobyte.
        assert [float(cell) * 1e9 for cell in gigabytes] == pytest.approx(
            list(chosen["stages"][name]["bytes"].values()), rel=5e-3, abs=1e3
        )
    kinds = cells(sent[0])[1:]
    for line in sent[2:]:
        name, *counts = cells(line)
        expected = chosen["stages"][name]["collectives"]
        assert [0 if cell == "-" else int(cell.split(",")[0]) for cell in counts] == [
            expected.get(kind, {"count": 0})["count"] for kind in kinds
        ]
    assert [cells(line)[0] for line in time[2:]] == [
        "prefill x 1",
        "step x 3",
        "decode x 1",
        "all",
        "links, nothing overlapped",
    ]
    seconds = dict(zip(cells(time[0]), cells(time[-2]), strict=True))
    for gpu in GPUS:
        assert float(seconds[gpu.name]) == pytest.approx(chosen["gpus"][gpu.name]["seconds"], rel=5e-3)
    assert [cells(line)[0] for line in meshes[2:]] == ["--cfg 1 --tp 1", "--cfg 2 --tp 4"]


def test_sound_is_told_too(folder, monkeypatch):
    """Its decoder is a stage as any other; a checkpoint's own tokenizer is taken, whose weights need not be there."""
    monkeypatch.setattr(dry_run, "MESHES", ((1, 1),))
    done = run("--checkpoint", folder, "--sound", "--num-frames", 5)
    assert (done.code, done.err) == (0, "")
    asked = Request("", num_frames=5, height=64, width=96, num_inference_steps=3, enable_sound=True)
    request = resolve(asked, TINY, cases.VAE, UNIPC, TINY_SOUND)
    e = estimate(Job(TINY, cases.VAE, request, "bfloat16", 128, TINY_SOUND), 1, 1)
    told = done.told["chosen"]["stages"]
    assert list(told) == ["prefill", "step", "decode", "decode_sound"]
    assert {name: (part["runs"], part["flops"]) for name, part in told.items()} == {
        stage.name: (stage.runs, stage.flops) for stage in e.stages
    }
    assert done.told["chosen"]["weights"] == e.weights
    memory, time, _ = tables(done.out)
    assert cells(memory[-1])[0] == "decode_sound"
    assert "decode_sound x 1" in [cells(line)[0] for line in time]


# The tables of made-up estimates


def made(job: Job, cfg: int, tp: int, weights: int = 200 * 10**9) -> Estimate:
    """One stage that reads all weights, and sends nothing."""
    share = weights // tp
    return Estimate(cfg, tp, job.dtype, share, (Stage("step", 1, 0, share, 0, 0, 0, ()),))


JOB = Job(NANO, WAN_VAE, resolve(Request("", num_frames=1), NANO, WAN_VAE))


@pytest.mark.parametrize(
    ("divisors", "expected"),
    [
        ([1, 2, 4, 8], [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8)]),
        ([1, 2], [(1, 1), (2, 1), (1, 2), (2, 2)]),
        ([1], [(1, 1), (2, 1)]),
    ],
    ids=["eight heads", "two", "one"],
)
def test_every_mesh_of_a_host_that_divides_the_heads(monkeypatch, divisors, expected):
    monkeypatch.setattr(dry_run, "estimate", made)
    monkeypatch.setattr(type(NANO), "tensor_parallel_sizes", lambda self: divisors)
    printed, told = dry_run.dry_run(JOB, 1, 1)
    assert [(mesh["cfg"], mesh["tp"]) for mesh in told["meshes"]] == expected
    assert [cells(line)[0] for line in tables(printed)[-1][2:]] == [f"--cfg {cfg} --tp {tp}" for cfg, tp in expected]


def test_a_mesh_that_no_host_has_can_be_chosen(monkeypatch):
    monkeypatch.setattr(dry_run, "estimate", made)
    _, told = dry_run.dry_run(JOB, 2, 8)
    assert (told["chosen"]["cfg"], told["chosen"]["tp"]) == (2, 8)
    assert (2, 8) not in [(mesh["cfg"], mesh["tp"]) for mesh in told["meshes"]]


def test_what_fits_is_marked(monkeypatch):
    """On H200s of 141 GB: 200 GB do not fit, 120 GB are 85 %, 60 GB are 43 %; and of 120 GB a stage may need but half."""
    answers = {}
    for gigabytes in (200, 120, 60):
        monkeypatch.setattr(dry_run, "estimate", lambda *a, weights=gigabytes * 10**9: made(*a, weights=weights))
        last = tables(dry_run.dry_run(JOB, 1, 1)[0])[-1]
        answers[gigabytes] = dict(zip(cells(last[0]), cells(last[2]), strict=True))["H200"]
        half = dataclasses.replace(made(JOB, 1, 1).stages[0], weights=gigabytes * 5 * 10**8)
        dropped = dataclasses.replace(dry_run.estimate(JOB, 1, 1), stages=(half,))
        monkeypatch.setattr(dry_run, "estimate", lambda *_, dropped=dropped: dropped)
        last = tables(dry_run.dry_run(JOB, 1, 1)[0])[-1]
        answers[-gigabytes] = dict(zip(cells(last[0]), cells(last[2]), strict=True))["H200"]
    assert answers[200] == "no"
    assert [re.sub(r"^[\d.]+ s", "", answers[-size]) for size in (200, 120, 60)] == ["+", "+", ""]
    assert re.fullmatch(r"[\d.]+ s\*", answers[120])
    assert re.fullmatch(r"[\d.]+ s", answers[60])


def test_no_collectives_are_said_to_be_none(monkeypatch):
    monkeypatch.setattr(dry_run, "estimate", made)
    printed, _ = dry_run.dry_run(JOB, 1, 1)
    assert "No collectives." in printed
    assert len(tables(printed)) == 3


# What is asked of the checkpoint


def test_the_prompt_is_counted(folder, jobs):
    """In buckets of 128, the longer of both branches."""
    for prompt in ("waves", "waves " * 300):
        run("--checkpoint", folder, "--prompt", prompt)
    run("--checkpoint", folder, "--prompt", "waves", "--negative-prompt", "waves " * 300)
    short, long, negative = (job.text_tokens for job in jobs)
    assert short == 128
    assert long > 128
    assert long % 128 == 0
    assert negative > 128


def test_without_a_tokenizer_a_long_prompt_is_assumed(folder, tmp_path, jobs):
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("text_tokenizer"))
    run("--checkpoint", tmp_path / "bare", "--prompt", "waves")
    run("--preset", "nano", "--prompt", "waves")
    assert [job.text_tokens for job in jobs] == [TEXT_TOKENS] * 2 == [512] * 2


def test_damaged_weights_are_not_opened(folders, tmp_path, jobs):
    copy = shutil.copytree(folders("small"), tmp_path / "damaged")
    for file in copy.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert run("--checkpoint", copy).code == 0
    assert jobs[0].transformer == TINY


def test_flags_reach_the_job(folder, jobs):
    run("--checkpoint", folder, "--dtype", "float32", "--num-frames", 9, "--guidance-scale", 2)
    run("--preset", "nano")
    assert (jobs[0].vae, jobs[0].dtype, jobs[0].request.num_frames) == (cases.VAE, "float32", 9)
    assert jobs[0].request.guidance_scale == 2
    assert (jobs[1].transformer, jobs[1].vae, jobs[1].dtype) == (NANO, WAN_VAE, "bfloat16")


def test_sound_reaches_the_job(folder, jobs):
    run("--checkpoint", folder, "--sound")
    run("--checkpoint", folder)
    run("--preset", "nano", "--sound")
    run("--preset", "edge")
    assert [job.sound if job.request.enable_sound else None for job in jobs] == [TINY_SOUND, None, SOUND_TOKENIZER, None]
    assert [job.request.sound_frames(job.sound) for job in jobs] == [2, 0, 2, 0]  # of one frame, a 24th of a second


def test_no_prompt_and_no_place_for_the_video_are_needed(folder, jobs, monkeypatch):
    monkeypatch.setattr(result_files, "check_writable", lambda *_: pytest.fail("nothing is written"))
    assert run("--checkpoint", folder, "--out", "no/such/folder/a.png").code == 0
    assert jobs[0].request.prompt == ""


# What is refused


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--preset nano --checkpoint {folder}", "--preset and --checkpoint: give one of them"),
        ("--checkpoint {folder} --tp 3", "tp=3 does not divide 8 query heads; use tp in {1, 2, 4, 8}"),
        ("--preset edge --tp 6", "tp=6 does not divide 16 query heads; use tp in {1, 2, 4, 8}"),
        ("--preset nano --cfg 3", "cfg=3: guidance has two branches; use cfg=1 or cfg=2"),
        ("--preset nano --height 100", "height=100 is not a multiple of 16; use 96 or 112"),
        ("--checkpoint no", "no: there is no such folder"),
        (
            "--preset edge --sound",
            "enable_sound: this checkpoint has no sound heads; leave it out, or take Cosmos3-Nano or -Super",
        ),
    ],
)
def test_wrong_input_is_one_sentence(folder, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    done = run(*flags.format(folder=folder).split())
    assert (done.code, done.out, done.err) == (2, "", f"error: {sentence}\n")
    assert not list(tmp_path.iterdir())


def test_a_preset_has_nothing_to_generate_with(capsys):
    assert generate.main(["--preset", "nano", "--prompt", "waves"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: --preset has no weights: it is for --dry-run; give a --checkpoint\n"


def test_a_fresh_process_makes_its_own_devices():
    """No variable tells JAX of eight devices here. One mesh beside the chosen one: all seven take a minute."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    program = "from cosmos3_jax import dry_run, generate; dry_run.MESHES = ((2, 4),); raise SystemExit(generate.main())"
    flags = shlex.split("--dry-run --preset nano --num-frames 1 --height 256 --width 256 --cfg 1 --tp 2")
    command = [sys.executable, "-c", program, *flags]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=bare, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout.splitlines()[-1])
    (other,) = told["meshes"]
    assert (other["cfg"], other["tp"]) == (2, 4)
    # 64 tokens of two branches, in the stand-in for bfloat16, two bytes each; on tp alone no branches meet.
    assert told["chosen"]["stages"]["step"]["collectives"] == {
        "all-reduce": {"count": 72, "bytes": 72 * 2 * 64 * NANO.hidden_size * 2}
    }
    assert other["stages"]["step"]["collectives"].keys() == {"all-reduce", "all-gather"}

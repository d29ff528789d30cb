"""The measurements for a GPU, at small sizes without one: each part writes its record, whatever becomes of the others."""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import kernels, programs, requests
from benchmarks.gpu.kernels import CONVOLUTIONS, DOUBLED, KERNELS
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.setting import ON_GPU, Part, Setting, measured, normal
from cosmos3_jax import make_mesh
from cosmos3_jax.config import NANO, WAN_VAE
from cosmos3_jax.cost import flops

ROOT = Path(__file__).parents[1]
IN_TESTS = [name for name in PARTS if name != "diffusers"]  # which takes as long as all others
LATER = time.time() + 1e6


# Parts, which another process imports from here


def two_rows(setting):
    yield {"what": setting.model, "value": 1.0}
    yield {"what": "not finite", "value": math.nan}


def raises(setting):
    yield {"what": "before", "value": 2.0}
    raise RuntimeError("it broke\nat length")


def crashes(setting):
    yield {"what": "before", "value": 3.0}
    os._exit(3)


def hangs(setting):
    yield {"what": "before", "value": 4.0}
    time.sleep(1000)


def environment(setting):
    yield {"what": os.environ.get("COLOUR", "none"), "value": os.getpid()}


# The command


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(what the command printed, its records by part)."""
    folder = tmp_path_factory.mktemp("suite")
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "1",  # what one part compiled, the next one loads
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles in half the time
        "JAX_NUM_CPU_DEVICES": "1",
    }
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out-dir", str(folder / "out"), "--budget", "1000"]
    command += ["--parts", ",".join(IN_TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {name: folder / "out" / f"gpu-{name}-cpu.json" for name in IN_TESTS}
    return done.stdout, {name: json.loads(file.read_text()) for name, file in names.items() if file.exists()}


def test_every_part_writes_its_record(whole):
    printed, records = whole
    last = json.loads(printed.splitlines()[-1])
    assert list(last["parts"]) == list(records) == IN_TESTS
    for name, record in records.items():
        assert record["error"] is None
        assert record["model"] == "tiny"
        assert record["hardware"]["platform"] == "cpu"
        assert not [row for row in record["rows"] if "error" in row]
        assert Path(last["parts"][name]).name == f"gpu-{name}-cpu.json"
        assert f"## {name}" in printed


def test_what_is_measured_is_finite_and_the_rest_says_why_not(whole):
    _, records = whole
    needed = {
        "peaks": ("TFLOP/s", "GB/s"),
        "attention": ("ms", "TFLOP/s", "difference"),
        "requests": ("steps", "prefill s", "step s", "decode s", "whole s"),
        "trace": ("ms", "share"),
        "options": ("seconds", "of_the_time", "computed_steps", "difference"),
        "convolutions": ("ms", "TFLOP/s"),
        "layers": ("ms",),
        "flags": ("ms", "of none"),
    }
    for name, columns in needed.items():
        rows = [row for row in records[name]["rows"] if "note" not in row]
        assert rows
        for column in columns:
            values = [row[column] for row in rows if column in row]
            assert values
            assert all(math.isfinite(value) and value >= 0 for value in values)
    notes = {row["note"] for record in records.values() for row in record["rows"] if row.get("note")}
    assert notes == {"not on this platform"}


def test_rows_are_of_what_they_should_be(whole):
    _, records = whole
    rows = {name: record["rows"] for name, record in records.items()}
    assert {row["kernel"] for row in rows["attention"]} == set(KERNELS)
    assert {row["how"] for row in rows["convolutions"]} == CONVOLUTIONS.keys() | DOUBLED.keys()
    assert [row["option"] for row in rows["options"]] == ["neither", "step_cache=0.02", "step_cache=0.05", "fp8"]
    assert [row["request"].split(":")[0] for row in rows["requests"]] == list(ON_GPU)
    assert [row["extrapolated"] for row in rows["requests"]] == [True] * len(ON_GPU)
    for program in ("step", "decode"):
        assert next(row["option"] for row in rows["flags"] if row["program"] == program) == "none"
        of_it = [row for row in rows["trace"] if row["program"] == program]
        assert of_it[-1]["op"] == "(idle)"
        assert 1 < len(of_it) <= 11
        assert sum(row["share"] for row in of_it[:-1]) <= 1 + 1e-9
        assert of_it[0]["ms"] == max(row["ms"] for row in of_it[:-1])


def test_without_the_reference_its_part_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(requests.diffusers(Setting("tiny", LATER))) == [{"note": "not installed: torch, diffusers, accelerate"}]


# The driver


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    parts = {name.__name__: Part(name, 0) for name in (raises, crashes, two_rows)}
    summary = gpu_suite.run(parts, None, 300, tmp_path)
    records = {name: json.loads((tmp_path / f"gpu-{name}-cpu.json").read_text()) for name in parts}
    assert records["raises"]["error"] == "RuntimeError: it broke"
    assert records["raises"]["rows"] == [{"what": "before", "value": 2.0}]
    assert records["crashes"]["error"] == "its process ended with exit code 3"
    assert records["crashes"]["rows"] == [{"what": "before", "value": 3.0}]
    assert records["two_rows"]["error"] is None
    assert records["two_rows"]["rows"] == [{"what": "tiny", "value": 1.0}, {"what": "not finite", "value": "nan"}]
    assert summary["parts"]["raises"] == "error: RuntimeError: it broke"
    assert summary["parts"]["two_rows"] == str(tmp_path / "gpu-two_rows-cpu.json")


def test_a_process_is_kept_and_replaced_where_it_hangs_or_needs_another_environment():
    crew = gpu_suite.Crew(None)

    def measure(part, end=LATER):
        rows, error = crew.measure(part, LATER, end)
        return rows[0]["what"], rows[0]["value"], error

    try:
        _, first, _ = measure(Part(environment, 0))
        assert measure(Part(environment, 0)) == ("none", first, None)
        red = {"COLOUR": "red"}
        assert measure(Part(environment, 0, red))[::2] == ("red", None)
        assert measure(Part(hangs, 0, red), time.time() + 2) == ("before", 4.0, "stopped: its time was up")
        assert measure(Part(environment, 0, red))[::2] == ("red", None)
    finally:
        crew.close()
    assert "COLOUR" not in os.environ


def test_without_budget_all_is_skipped(tmp_path, capsys):
    summary = gpu_suite.run(PARTS, None, 0, tmp_path)
    assert list(summary["parts"]) == list(PARTS)
    assert all(what.startswith("skipped") for what in summary["parts"].values())
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert all(f"## {name}" in printed for name in PARTS)


def test_the_parts_fit_into_the_budget():
    assert sum(part.seconds for part in PARTS.values()) < gpu_suite.BUDGET < 480


def test_parts_that_there_are_not():
    with pytest.raises(argparse.ArgumentTypeError, match="speed: expected some of peaks, attention"):
        gpu_suite._parts("peaks,speed")
    assert list(gpu_suite._parts("flags,peaks")) == ["flags", "peaks"]


def test_files_are_named_by_the_gpu():
    assert gpu_suite._short("1 x NVIDIA H100 80GB HBM3") == "h100"
    assert gpu_suite._short("8 x NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


def test_tables_have_every_column():
    text = gpu_suite.table([{"a": 1, "b": 0.123456}, {"a": "x|y", "c": True}])
    assert text.splitlines() == ["| a | b | c |", "| --- | --- | --- |", "| 1 | 0.1235 |  |", "| x/y |  | True |"]
    assert gpu_suite.table([]) == ""


# The measurements


def test_rows_that_fail_or_come_too_late_say_so():
    def fails():
        raise ValueError("no\nthing")

    cases = [({"what": 1}, fails), ({"what": 2}, lambda: {"ms": 5.0})]
    assert list(measured(Setting("tiny", LATER), cases)) == [
        {"what": 1, "error": "ValueError: no"},
        {"what": 2, "ms": 5.0},
    ]
    assert [row["note"] for row in measured(Setting("tiny", 0), cases)] == ["no time left"] * 2


def test_an_option_that_xla_does_not_know_is_recorded(monkeypatch):
    program = programs.Program(jax.jit(jnp.tanh), (jnp.ones(3),), make_mesh())
    options = ("xla_cpu_nonsense", True), ("xla_gpu_autotune_level", 0), ("xla_cpu_enable_fast_math", "perhaps")
    monkeypatch.setattr(programs, "FLAGS", {"step": (*options, ("xla_cpu_enable_fast_math", True))})
    monkeypatch.setattr(programs, "PROGRAMS", {"step": lambda model, video: program})
    none, unknown, elsewhere, wrong, known = programs.flags(Setting("tiny", LATER))
    assert unknown == {"program": "step", "option": "xla_cpu_nonsense=True", "note": "unknown to this version"}
    assert elsewhere["note"] == "not on this platform"
    assert "not a valid bool" in wrong["error"]
    assert none["of none"] == 1
    assert known["ms"] > 0
    assert known["of none"] == known["ms"] / none["ms"]


def test_options_of_the_compiler_come_in_front_of_a_program_s_own():
    # The program's own is one that XLA refuses: only if the other takes its place does it compile.
    own = jax.jit(jnp.tanh, compiler_options={"xla_cpu_enable_fast_math": "perhaps"})
    program = programs.Program(own, (jnp.ones(3),), make_mesh())
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid bool"):
        program.compiled()
    np.testing.assert_allclose(program.compiled(xla_cpu_enable_fast_math=True)(), np.tanh(np.ones(3)), rtol=1e-6)


@pytest.mark.parametrize(("name", "tokens"), [("256p", 2880), ("480p", 18720), ("720p", 44160), ("image", 23 * 40)])
def test_tokens_of_the_published_sizes(name, tokens):
    assert ON_GPU[name].tokens(NANO, WAN_VAE) == tokens


def test_the_decoder_s_convolutions():
    # Published widths 1024, 1024, 1024, 512, 256; frames double in the first two blocks, the picture in the first three.
    causal, doubled = kernels.decoder_shapes(WAN_VAE, ON_GPU["480p"])
    assert doubled == [(4, 120, 208, 512), (4, 60, 104, 1024), (2, 30, 52, 1024)]
    assert set(causal) == {
        (1, 30, 52, 1024, 1024),
        (2, 60, 104, 1024, 1024),
        (4, 120, 208, 1024, 512),
        (4, 120, 208, 512, 512),
        (4, 240, 416, 512, 256),
        (4, 240, 416, 256, 256),
    }


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_way_to_convolve_is_the_same_convolution(name):
    how, shape = CONVOLUTIONS[name], (4, 5, 6, 7, 8)
    frames, weight = normal(0, 6, 5, 6, 7), normal(1, 3, 3, 3, 7, 8)
    expected = np.zeros(shape[:3] + shape[4:])
    padded = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(float)
    for t, y, x in np.ndindex(3, 3, 3):
        expected += padded[t : t + 4, y : y + 5, x : x + 6] @ np.asarray(weight[t, y, x], float)
    arguments = frames.transpose(how.frames_order), weight.transpose(how.weight_order)
    y = how.run(*arguments)
    y = np.moveaxis(y, y.shape.index(8), -1)  # the channels: no other axis is as long
    np.testing.assert_allclose(y, expected, atol=1e-4)  # sums of 189 products of order 1
    saved = 2 / 3 if "Winograd" in name else 1  # four convolutions of each two frames, not six
    assert flops(jax.make_jaxpr(how.run)(*arguments).jaxpr) == saved * kernels._convolution_flops(shape)


@pytest.mark.parametrize("name", ["chunked, lengths", "Pallas Triton, heads repeated"])
def test_kernels_that_run_anywhere_compute_attention(name):
    # The others need a GPU. Of grouped heads, and keys of which not all count where lengths are known.
    q, k, v = normal(0, 2, 256, 4, 16), normal(1, 2, 384, 2, 16), normal(2, 2, 384, 2, 16)
    length = jnp.array([284, 100]) if KERNELS[name].lengths else jnp.array([384, 384])
    assert kernels.from_float32(KERNELS[name], q, k, v, length) < 1e-3


def test_the_time_of_what_runs_inside_another_is_its_own():
    # Two threads: a loop of 10 with 3 and 4 inside, and beside it, later, 5; nothing runs from 10 to 12 and from 17 to 20.
    first = [(0, 10, "loop"), (1, 4, "a"), (5, 9, "b"), (20, 21, "a")]
    total, count, busy, wall = programs.busy_time([first, [(12, 17, "c")]])
    assert total == {"loop": 3, "a": 4, "b": 4, "c": 5}
    assert count == {"loop": 1, "a": 2, "b": 1, "c": 1}
    assert (busy, wall) == (16, 21)


def test_a_trace_of_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="nothing that ran"):
        programs.busy_time([[], []])

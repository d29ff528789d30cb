"""The benchmarks: what they count, on the smallest of models, and that what is drawn is what was recorded."""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import compare_diffusers, draw, first_video, generate, models, record, roofline, step
from cosmos3_jax import Request, make_mesh
from cosmos3_jax.checkpoint import BUILT_IN
from cosmos3_jax.config import TINY, TINY_VAE
from cosmos3_jax.estimate import Job, estimate, work
from cosmos3_jax.flags import parser as command_line
from cosmos3_jax.gpus import GPUS
from cosmos3_jax.request import resolve

ROOT = Path(__file__).parents[1]
H200 = next(gpu for gpu in GPUS if gpu.name == "H200")


def flags(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    models.add_flags(parser)
    return parser.parse_args([str(word) for word in words])


def test_spread_is_median_least_and_greatest():
    assert record.spread([3.0, 1.00004, 1.5]) == {"median": 1.5, "least": 1.0, "greatest": 3.0}
    assert record.spread([1.0, 2.0])["median"] == 1.5


def test_differences_are_parts_of_the_deviation():
    expected = np.array([1.0, 3.0])  # of deviation 1
    assert record.difference(np.array([4.0, 7.0]), expected) == pytest.approx(12.5**0.5)


def test_times_counts_no_call_of_the_warm_up():
    calls = []
    seconds = record.times(lambda: calls.append(None), 3, warm_up=2)
    assert len(calls) == 5
    assert len(seconds) == 3
    assert all(0 < taken < 1 for taken in seconds)


def test_compiling_counts_what_is_compiled_inside_alone():
    x = jnp.ones(3)
    twice, thrice = jax.jit(lambda x: 2 * x), jax.jit(lambda x: 3 * x)
    with record.compiling() as fresh:
        twice(x)
    assert fresh["programs"] == 1
    assert fresh["from_cache"] == 0
    assert 0 < fresh["seconds"] < 10
    with record.compiling() as again:
        twice(x)
    assert again == {"programs": 0, "from_cache": 0, "seconds": 0.0}
    thrice(x)
    assert again["programs"] == 0


def test_compiling_tells_what_came_from_the_cache(tmp_path):
    script = (
        "import jax, jax.numpy as jnp; from benchmarks import record; x = jnp.ones(3)\n"
        "with record.compiling() as compiled: jax.jit(lambda x: 2 * x)(x)\n"
        "print(compiled['programs'], compiled['from_cache'])"
    )
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = functools.partial(subprocess.check_output, [sys.executable, "-c", script], text=True, cwd=ROOT, env=environment)
    answers = [run(), run()]
    assert answers == ["1 0\n", "1 1\n"]


def test_the_record_is_the_last_line_and_the_file(tmp_path, capsys):
    record.finish({"kind": "step", "step": 1.5}, tmp_path / "new" / "step.json")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "new" / "step.json").read_text())
    assert printed["step"] == 1.5
    assert printed["versions"]["jax"] == jax.__version__
    assert printed["hardware"]["platform"] == "cpu"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", printed["date"])


def test_flags_are_the_request():
    asked = models.request(
        flags("--num-frames", 5, "--height", 48, "--width", 80, "--steps", 7, "--guidance-scale", 2, "--steps-per-call", 3)
    )
    expected = {"num_frames": 5, "height": 48, "width": 80, "num_inference_steps": 7, "guidance_scale": 2.0}
    assert asked == Request(models.PROMPT, **expected, steps_per_call=3)
    assert models.request(flags("--prompt", "ocean", "--height", 64), output_type="pil", height=16) == Request(
        "ocean", **models.REQUESTS["tiny"] | {"height": 16}, output_type="pil"
    )


def test_sizes_are_the_models_own_unless_a_checkpoint_is_given():
    assert models.request(flags("--model", "mid")) == Request(models.PROMPT, **models.REQUESTS["mid"])
    assert models.request(flags("--model", "nano")) == Request(models.PROMPT)
    assert models.request(flags("--model", "mid", "--checkpoint", "folder")) == Request(models.PROMPT)


def test_every_model_is_a_pair_that_fits():
    for transformer, vae in models.MODELS.values():
        assert transformer.latent_channel == vae.z_dim
        assert sum(transformer.rope_axes_dim) == transformer.head_dim // 2
        resolve(Request("", num_frames=1, height=32, width=32), transformer, vae, models.UNIPC, None)


@pytest.mark.parametrize(("cfg", "tp"), [(1, 1), (2, 2)])
def test_random_weights_make_a_picture(cfg, tp):
    transformer = dataclasses.replace(TINY, num_hidden_layers=1, sound_gen=False, sound_dim=None)
    vae = dataclasses.replace(TINY_VAE, dim_mult=(1, 1, 1, 1), num_res_blocks=0)  # as few programs as there can be
    pipe = models.random_pipeline(transformer, vae, make_mesh(cfg, tp))
    picture = pipe("ocean", num_frames=1, height=32, width=48, num_inference_steps=1, progress=False).video
    assert picture.shape == (1, 32, 48, 3)
    assert np.isfinite(picture).all()
    assert picture.std() > 0.01


@pytest.fixture(scope="module")
def built_in():
    """The pipeline of the built-in checkpoint, whose sizes are those of the model "tiny"."""
    return models.pipeline(flags("--checkpoint", BUILT_IN))


ASKED = Request("ocean", num_frames=5, height=48, width=80, num_inference_steps=3, guidance_scale=1.0)


@pytest.fixture(scope="module")
def first_frame(tmp_path_factory):
    """The file of a picture."""
    file = tmp_path_factory.mktemp("frames") / "first.png"
    Image.new("RGB", (80, 48), "red").save(file)
    return str(file)


@pytest.fixture(scope="module")
def generated(built_in, first_frame):
    """A whole record of `benchmarks.generate`."""
    request = dataclasses.replace(ASKED, image=first_frame, output_type="pil")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # FLOPs are counted by `python -m benchmarks.roofline`
        measured = generate.measure(built_in, request, runs=1)
    return {**generate.about("generate", flags(), built_in, request), **measured, **record.surroundings()}


def test_a_request_is_measured_in_every_stage(generated):
    stages = {stage: values["median"] for stage, values in generated["stages"].items()}
    assert stages.keys() == {"tokenize", "load", "encode", "prefill", "denoise", "step", "decode", "write", "whole"}
    assert stages["step"] == pytest.approx(stages["denoise"] / 3, abs=1e-4)
    parts = sum(taken for stage, taken in stages.items() if stage not in ("step", "whole"))
    assert parts == pytest.approx(stages["whole"], rel=0.3, abs=0.05)
    assert generated["first"]["whole"] > generated["compiled_first"]["seconds"] > 0
    assert generated["peak_memory"]["host"] > 1e8
    assert generated["request"]["num_frames"] == 5
    table = generate.table(generated)
    assert all(f"| {stage} | {taken:.3f} |" in table for stage, taken in stages.items())
    json.dumps(generated)


def test_a_request_compiles_once(generated):
    assert generated["compiled_first"]["programs"] >= 2  # a step and a decode of this size
    assert generated["compiled_later"]["programs"] == 0


def test_shares_are_of_the_flops_that_the_estimate_counts(generated, first_frame):
    request = resolve(dataclasses.replace(ASKED, image=first_frame), *models.MODELS["tiny"], models.UNIPC, None)
    job, rate = Job(*models.MODELS["tiny"], request, "float32", text_tokens=128), generated["matrix_product_rate"]
    flops = work(job, 1, 1)
    assert generated["flops"] == flops
    shares, whole = generated["shares"], generated["stages"]["whole"]["median"]
    assert shares.keys() == {"encode", "prefill", "denoise", "decode"}
    assert all(0 < share < 2 for share in shares.values())
    assert generated["share_of_matrix_product"] == pytest.approx(sum(flops.values()) / whole / rate)
    assert shares["decode"] == pytest.approx(flops["decode"] / generated["stages"]["decode"]["median"] / rate)
    assert generated["share_of_data_sheet"] is None  # no GPU


def test_a_step_and_a_decode_are_measured(built_in, monkeypatch):
    monkeypatch.setattr(step, "flops", lambda pipe, request: {"prefill": 1, "step": 3e9, "decode": 5e9})
    measured = step.measure(built_in, ASKED, runs=1)
    assert measured["flops"] == {"step": 1e9, "decode": 5e9}
    assert measured["compiled"]["programs"] >= 1
    for stage in ("step", "decode"):
        taken = measured[stage]["median"]
        assert 0 < measured[stage]["least"] <= taken <= measured[stage]["greatest"] < 60
        assert measured["shares"][stage] == pytest.approx(measured["flops"][stage] / taken / measured["matrix_product_rate"])
    assert step.measure(built_in, ASKED, runs=1)["compiled"]["programs"] == 0


@pytest.mark.parametrize(("size", "cfg", "tp", "bound"), [((1, 32, 32), 2, 2, "memory"), ((17, 256, 448), 1, 1, "arithmetic")])
def test_what_bounds_a_step_is_told_by_its_tokens(size, cfg, tp, bound):
    frames, height, width = size
    arguments = flags("--num-frames", frames, "--height", height, "--width", width, "--steps", 2)
    arguments.text_tokens = 128
    job = roofline.job_of(arguments)
    counted = estimate(job, cfg, tp)
    found = roofline.rows(counted, H200)
    assert {row["stage"]: row["flops"] for row in found} == work(job, cfg, tp)
    assert {row["stage"]: row["runs"] for row in found} == {"prefill": 1, "step": 2, "decode": 1}
    assert found[1]["bound"] == bound
    assert (found[1]["sent"] > 0) == (cfg * tp > 1)
    for row, stage in zip(found, counted.stages, strict=True):
        assert (row["bound"] == "arithmetic") == (row["flops_per_byte"] > H200.bfloat16 / H200.bandwidth)
        assert row["flops_per_byte"] == pytest.approx(row["flops"] / (cfg * tp) / row["bytes"])
        assert row["seconds"] == pytest.approx(counted.seconds(stage, H200))
    assert sum(row["link_seconds"] for row in found) == pytest.approx(counted.link_seconds(H200))
    lines = roofline.table(counted, H200).splitlines()
    assert [line.count("|") for line in lines] == [lines[0].count("|")] * (2 + len(found))


STAND_IN = """
import os, sys, time
from pathlib import Path
video, log, *flags = sys.argv[1:]
cache = Path(os.environ["XDG_CACHE_HOME"])
way = flags[0] if flags else "warm" if cache.exists() else "cold"
told_before = Path(log).exists()
with open(log, "a") as told:
    print(way, *(name for name in os.environ if name.endswith(("COMPILATION_CACHE", "COMPILATION_CACHE_DIR"))), file=told)
if way == "cold":
    time.sleep(0.3 if told_before else 1.5)
    cache.mkdir()
Path(video).write_text("a video")
"""


def test_a_first_video_is_timed_without_a_cache_cold_and_warm(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    log = tmp_path / "log"
    measured = first_video.measure(2, lambda video: [sys.executable, "-c", STAND_IN, str(video), str(log)])
    assert log.read_text().split() == ["cold", *["--no-compilation-cache", "cold", "warm"] * 2]
    assert measured.keys() == {"without_cache", "cold", "warm"}
    assert 0.3 < measured["cold"]["least"] <= measured["cold"]["greatest"] < 1.5  # the untimed one slept as long
    assert measured["cold"]["median"] > max(measured["warm"]["median"], measured["without_cache"]["median"])
    table = draw.first_video_table({"first": {**measured, **record.surroundings()}})
    assert draw.spread(measured["warm"]) in table


@pytest.mark.parametrize(
    ("script", "sentence"),
    [("raise SystemExit('no such thing')", "(?s)exit code 1.*no such thing"), ("", "no video was written")],
)
def test_a_first_video_that_fails_is_not_timed(script, sentence):
    with pytest.raises(SystemExit, match=sentence):
        first_video.measure(1, lambda video: [sys.executable, "-c", script, str(video)])


def test_a_newcomers_command_is_one_that_the_command_line_knows():
    python, option, module, *words = first_video.command(Path("ball.mp4"))
    assert (python, option, module) == (sys.executable, "-m", "cosmos3_jax.generate")
    arguments = command_line().parse_args([*words, *first_video.WAYS["without_cache"]])
    assert arguments.out == "ball.mp4"
    assert arguments.checkpoint is None
    assert arguments.no_compilation_cache
    assert not command_line().parse_args([*words, *first_video.WAYS["warm"]]).no_compilation_cache


ON = {
    "hardware": {"devices": "8 x cpu", "platform": "cpu", "host": "a CPU, 2 cores"},
    "versions": {"jax": "0.10.2", "diffusers": "0.42.1", "torch": "2.13.0"},
    "date": "2026-11-21",
}
SIZE = {"num_frames": 17, "height": 128, "width": 224, "num_inference_steps": 6}


def spread(median: float) -> dict[str, float]:
    return {"median": median, "least": 0.5 * median, "greatest": 2 * median}


RECORDS = {
    "beside": {
        "kind": "compare_diffusers",
        "model": "mid",
        "dtype": "float32",
        "request": SIZE,
        "ours": {"whole": spread(2.0), "step": spread(0.25), "decode": spread(0.5)},
        "diffusers": {"whole": spread(4.0), "step": spread(0.2), "decode": spread(2.0)},
        "ratio": {"whole": 0.5, "step": 1.25, "decode": 0.25},
        "difference": 1.8e-6,
        **ON,
    },
    "request": {
        "kind": "generate",
        "model": "/models/Cosmos3-Nano",
        "mesh": {"cfg": 2, "tp": 4},
        "dtype": "bfloat16",
        "request": SIZE,
        "first": {"whole": 140.04},
        "compiled_first": {"seconds": 18.5},
        "stages": {
            stage: spread(taken)
            for stage, taken in {
                "prefill": 0.12,
                "denoise": 98.0,
                "decode": 12.0,
                "write": 10,
                "whole": 121,
                "step": 2.8,
            }.items()
        },
        "peak_memory": {"device": 52e9, "host": 9e9},
        "share_of_matrix_product": 0.553,
        "shares": {"prefill": 0.4, "denoise": 0.61, "decode": 0.3},
        **ON,
    },
    "newcomer": {
        "kind": "first_video",
        "without_cache": spread(12.0),
        "cold": spread(13.0),
        "warm": spread(7.0),
        **ON,
        "hardware": {"devices": "1 x a GPU", "platform": "gpu", "host": "a CPU, 2 cores"},
    },
    "options": {
        "kind": "options",
        "model": "mid",
        "dtype": "float32",
        "request": SIZE,
        "rows": [
            {"option": "neither", "seconds": 8.0, "of_the_time": 1.0, "computed_steps": 35, "difference": 0.0},
            {"option": "fp8", "seconds": 20.0, "of_the_time": 2.5, "computed_steps": 34, "difference": 0.0456},
        ],
        **ON,
    },
    "world": {
        "kind": "small_world",
        "checkpoint": "the built-in checkpoint",
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "flow_shift": 3.0,
        "rows": {"text to video: direction": {"60 prompts": 95.0, "40 of combinations trained on": 97.5}},
        "sheet": "world.webp",
        **ON,
    },
    "world-training": {"kind": "small_world_training", "seconds": {"vae": 1800, "transformer": 5430}, **ON},
    "older": {"runs": {}},
    "quick": {"kind": "step"},
}
(BEGIN, END), (FIRST, MIDDLE) = draw.markers("speed"), draw.markers("small world")
BEFORE, AFTER = "# Title\r\n\r\nBefore.\n\n", "\n\n## After\n"


@pytest.fixture
def house(tmp_path):
    """(a README with markers, the folder of records and plots, the flags that name them)."""
    readme, results = tmp_path / "README.md", tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name, each in RECORDS.items():
        (results / f"{name}.json").write_text(json.dumps(each))
    readme.write_bytes(f"{BEFORE}{FIRST}\n{MIDDLE}between{BEGIN}\nwhat was there\n{END}{AFTER}".encode())
    return readme, results, ["--readme", str(readme), "--results", str(results), "--plots", str(results)]


def contents(readme: Path, results: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (readme, *results.glob("*.svg"))}


def test_tables_have_the_numbers_of_the_records(house):
    readme, results, _ = house
    (text,) = (content.decode() for content in draw.drawn(results, readme, results, without_plots=True).values())
    size = "17 frames of 128x224, 6 steps"
    rows = [
        "| text to video: direction | 95 % | 98 % |",
        "![Prompts and videos](benchmarks/results/world.webp)",
        "| 30 | 90 | 120 |",
        f"| mid, {size}, float32 | a CPU, 2 cores, jax 0.10.2, diffusers 0.42.1, torch 2.13.0, 2026-11-21 | whole | "
        "2.00 (1.00 to 4.00) | 4.00 (2.00 to 8.00) | 0.50 | 2e-06 |",
        "|  |  | step | 0.250 (0.125 to 0.500) | 0.200 (0.100 to 0.400) | 1.25 |  |",
        "|  |  | decode | 0.500 (0.250 to 1.00) | 2.00 (1.00 to 4.00) | 0.25 |  |",
        f"| Cosmos3-Nano, {size}, bfloat16, --cfg 2 --tp 4 | a CPU, 2 cores, jax 0.10.2, 2026-11-21 | 0.120, 40% | 2.80, 61% | "
        "12.00, 30% | 10.00 | 121.0 (60.50 to 242.0), 55% | 140.0, 18.50 of it | 52.0 |",
        "| 1 x a GPU, jax 0.10.2, 2026-11-21 | 12.00 (6.00 to 24.00) | 13.00 (6.50 to 26.00) | 7.00 (3.50 to 14.00) |",
        f"| mid, {size}, float32 | a CPU, 2 cores, jax 0.10.2, 2026-11-21 | neither | 8.00 | 1.00 | 35 | 0 |",
        "|  |  | fp8 | 20.00 | 2.50 | 34 | 0.046 |",
    ]
    assert [line for line in text.splitlines() if line in rows] == rows
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert [len({line.count("|") for line in table.splitlines()}) for table in tables] == [1] * 6


def test_a_record_that_was_measured_can_be_drawn(generated):
    table = draw.generate_table({"tiny": generated})
    assert "| tiny, 5 frames of 48x80, 3 steps, float32 |" in table
    assert "(host) |" in table  # a CPU does not tell its peak


def test_the_rest_of_the_readme_stays(house):
    readme, results, _ = house
    (text,) = draw.drawn(results, readme, results, without_plots=True).values()
    assert text.startswith(f"{BEFORE}{FIRST}\n".encode())
    assert f"{MIDDLE}between{BEGIN}\n".encode() in text
    assert text.endswith(f"{END}{AFTER}".encode())
    assert b"what was there" not in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{BEGIN}\n",
        f"{END}\n",
        f"{END}\n{BEGIN}\n",
        f"{BEGIN}\n{BEGIN}\n{END}",
        f"{BEGIN}\n{END}\n{END}",
    ],
)
def test_markers_that_are_missing_are_told(house, text):
    readme, results, words = house
    readme.write_text(f"{FIRST}{MIDDLE}{text}")
    with pytest.raises(SystemExit, match=re.escape(repr(BEGIN))):
        draw.main(words)
    assert readme.read_text() == f"{FIRST}{MIDDLE}{text}"
    assert not list(results.glob("*.svg"))


def test_what_is_not_drawn_is_told(house, capsys):
    assert list(draw.read(house[1])) == ["beside", "newcomer", "options", "request", "world-training", "world"]
    told = capsys.readouterr().out
    assert "older.json: not drawn, of kind none" in told
    assert "quick.json: not drawn, of kind step" in told


def test_the_same_records_give_the_same_bytes(house):
    pytest.importorskip("matplotlib")
    readme, results, words = house
    draw.main(words)
    first = contents(readme, results)
    assert first.keys() == {"README.md", "beside.svg", "requests.svg"}
    for plot in results.glob("*.svg"):
        plot.unlink()
    draw.main(words)
    assert contents(readme, results) == first


def test_plots_are_small_and_have_no_background(house):
    pytest.importorskip("matplotlib")
    readme, results, words = house
    draw.main(words)
    for name, words_in_it in {
        "beside.svg": ["mid", "diffusers", "0.250 s"],
        "requests.svg": ["Nano", "denoise", "121.0 s"],
    }.items():
        content = (results / name).read_bytes()
        text = " ".join(ET.fromstring(content).itertext())
        assert all(word in text for word in words_in_it)
        assert len(content) < 30_000
        assert not re.search(rb"#fff|#000|dc:date", content)
        assert f"](benchmarks/results/{name})" in readme.read_text()


def test_the_check_notices_what_changed(house):
    pytest.importorskip("matplotlib")
    readme, results, words = house
    check = [*words, "--check"]
    with pytest.raises(SystemExit, match=r"README\.md.*beside\.svg.*requests\.svg"):
        draw.main(check)
    draw.main(words)
    readme.write_bytes(readme.read_bytes() + b"more\n")  # after the markers, whatever one likes
    draw.main(check)
    before = contents(readme, results)
    changed = RECORDS["request"] | {"stages": RECORDS["request"]["stages"] | {"decode": spread(14.0)}}
    (results / "request.json").write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match=r"README\.md, [^,]*requests\.svg; run"):
        draw.main(check)
    assert contents(readme, results) == before  # it writes nothing
    draw.main(words)
    draw.main(check)
    (results / "beside.svg").unlink()
    with pytest.raises(SystemExit, match=r"say: [^,]*beside\.svg;"):
        draw.main(check)


def test_without_matplotlib_tables_are_checked_and_nothing_is_written(house, monkeypatch, capsys):
    readme, results, words = house
    monkeypatch.setattr(draw, "_can_plot", lambda: False)
    before = contents(readme, results)
    with pytest.raises(SystemExit, match="pip install"):
        draw.main(words)
    with pytest.raises(SystemExit, match=r"say: [^,]*README\.md;"):
        draw.main([*words, "--check"])
    assert contents(readme, results) == before
    (text,) = draw.drawn(results, readme, results, without_plots=True).values()
    readme.write_bytes(text)
    draw.main([*words, "--check"])
    assert "plots are not checked" in capsys.readouterr().out


def test_parts_of_a_request_are_its_whole():
    parts = draw.parts(RECORDS["request"])
    assert parts.keys() == {"denoise", "decode", "write", "rest"}
    assert sum(parts.values()) == pytest.approx(1)
    assert parts["denoise"] == pytest.approx(98 / 121)


@pytest.mark.live
def test_diffusers_is_measured_beside(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    words = ["--model", "tiny", "--num-frames", "5", "--height", "64", "--width", "96", "--steps", "2", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["compare_diffusers", *words, "--out", str(tmp_path / "beside.json")])
    compare_diffusers.main()
    printed = capsys.readouterr().out
    measured = json.loads((tmp_path / "beside.json").read_text())
    assert measured["kind"] == "compare_diffusers"
    assert 0 < measured["difference"] < 1e-3
    for stage in compare_diffusers.STAGES:
        ours, theirs = (measured[side][stage]["median"] for side in ("ours", "diffusers"))
        assert measured["ratio"][stage] == pytest.approx(ours / theirs)
        assert math.isfinite(ours / theirs)
        assert f"| {stage} | {ours:.3f} | {theirs:.3f} |" in printed
    assert "| tiny, 5 frames of 64x96, 2 steps, float32 |" in draw.compare_table({"beside": measured})

"""Training, from clips to what it leaves: the same on every mesh, the same after a stop, and read by whoever reads such."""

import contextlib
import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cases
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from metrics import errors
from safetensors.numpy import load_file

from convert.random_checkpoint import write_checkpoint
from cosmos3_jax import Cosmos3Pipeline, InputError, RunError, make_mesh, result_files, train
from cosmos3_jax.checkpoint import Checkpoint
from cosmos3_jax.config import TINY_FULL_SOUND
from cosmos3_jax.errors import StoppedError
from cosmos3_jax.latents import Latents
from cosmos3_jax.lora import TARGETS, TEXT_TARGETS
from cosmos3_jax.prompt import load_tokenizer
from cosmos3_jax.published import names_of
from cosmos3_jax.training import latent_cache, post_training, results, saved
from cosmos3_jax.training.batches import Example, draw
from cosmos3_jax.training.clips import find_clips
from cosmos3_jax.training.objective import Loss
from cosmos3_jax.training.post_training import Model, post_train
from cosmos3_jax.training.run import Run, Teller
from cosmos3_jax.training.settings import Training
from cosmos3_jax.training.update import Progress, TrainState

SMALL = {"num_frames": 5, "height": 32, "width": 48}
SETTINGS = Training(
    **SMALL, steps=20, batch_size=2, accumulate=2, learning_rate=1e-3, warmup=2, average=0.9, train_text_tower=True
)
ADAPTERS = {"lora_rank": 2, "lora_targets": ("to_q", "add_v_proj"), "train_text_tower": False}
QUICK = Training(**SMALL, steps=2, batch_size=2, learning_rate=1e-3, warmup=0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five clips of noise, larger than they are taken, a picture, and captions of both kinds."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for i in range(5):
        frames = random.integers(0, 256, (7, 48, 64, 3), dtype=np.uint8)
        result_files.write(folder / f"{i}.mp4", frames, 24.0)
        (folder / f"{i}.txt").write_text(f"noise number {i}, " + "very " * i + "grainy\n")
    result_files.write(folder / "still.png", random.integers(0, 256, (1, 48, 64, 3), dtype=np.uint8), 24.0)
    (folder / "still.json").write_text(json.dumps({"subject": "noise", "style": "still"}))
    return folder


@pytest.fixture(scope="module")
def model(folders):
    """`model(cfg, tp)`: a small checkpoint on a mesh."""

    def of(cfg: int = 1, tp: int = 1, folder: Path | None = None) -> Model:
        folder = folder or folders("small")
        checkpoint = Checkpoint.open(folder)
        tokenizer = load_tokenizer(folder / "text_tokenizer", checkpoint.transformer.vocab_size)
        return Model(checkpoint, tokenizer, make_mesh(cfg, tp), "float32")

    return of


def run(model: Model, clips: Path, settings: Training, out: Path, **more) -> Path:
    return post_train(model, find_clips(clips), settings, out, clips / ".latents", progress=False, **more)


def losses(out: Path) -> list[float]:
    with (out / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def contents(made: Path) -> dict[str, bytes]:
    """Files of a folder; of adapters the tensors, for the library writes two metadata in any order."""
    if made.is_file():
        return {name: x.tobytes() for name, x in load_file(made).items()}
    return {str(path.relative_to(made)): path.read_bytes() for path in made.rglob("*") if path.is_file()}


def stop_before(step: int):
    """A check that stops a run before a step; clips are checked before the steps are."""
    left = [6 + step]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError("stopped by SIGTERM", 143)

    return check


def test_every_mesh_follows_the_same_losses(model, clips, tmp_path):
    curves = []
    for cfg, tp in ((1, 1), (2, 1), (2, 4)):
        run(model(cfg, tp), clips, SETTINGS, tmp_path / f"{cfg}{tp}")
        curves.append(losses(tmp_path / f"{cfg}{tp}"))
    assert len(curves[0]) == 20
    assert np.mean(curves[0][-5:]) < 0.9 * np.mean(curves[0][:5])  # it learns
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-6)  # float32, added in another order
    np.testing.assert_allclose(curves[2], curves[0], rtol=2e-6)


@pytest.mark.parametrize("lora", [{}, ADAPTERS], ids=["whole", "adapters"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(model, clips, tmp_path, lora):
    settings = dataclasses.replace(SETTINGS, steps=6, **lora)
    whole = run(model(), clips, settings, tmp_path / "whole")
    for step in (2, 1):  # saved where it was stopped, twice
        with pytest.raises(StoppedError):
            run(model(), clips, settings, tmp_path / "stopped", check=stop_before(step))
    stopped = run(model(), clips, settings, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6
    assert contents(stopped) == contents(whole)


def test_what_is_left_is_a_checkpoint(model, clips, folders, tmp_path):
    made = run(model(), clips, QUICK, tmp_path / "run")
    before, after = tensors(folders("small")), tensors(made)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    network = model().towers("float32")["gen"]
    names = names_of("gen", network, model().checkpoint.transformer)
    generating = {name for listed in names.values() for name in listed if not name.startswith("audio_")}  # no sound was learned
    assert changed == generating
    untouched = Path("vae", "diffusion_pytorch_model.safetensors")
    assert (made / untouched).read_bytes() == (folders("small") / untouched).read_bytes()
    result = Cosmos3Pipeline.from_pretrained(made, progress=False)("noise", **SMALL, num_inference_steps=1, progress=False)
    assert np.isfinite(result.video).all()


@pytest.mark.live
def test_diffusers_reads_it(model, clips, tmp_path):
    pytest.importorskip("diffusers")
    import reference

    made = run(model(), clips, QUICK, tmp_path / "run")
    theirs = {name: p.detach().numpy() for name, p in reference.load(made).transformer.named_parameters()}
    ours = tensors(made)
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in ours)


def test_adapters_alone_are_trained_and_change_the_video(model, clips, folders, tmp_path):
    settings = dataclasses.replace(QUICK, lora_rank=3, lora_alpha=6.0, learning_rate=0.01)
    made = run(model(), clips, settings, tmp_path / "run")
    adapters = load_file(made)
    assert len(adapters) == 2 * 4 * 3  # a and b of four projections in three layers
    assert all(x.any() for x in adapters.values())
    request = SMALL | {"num_inference_steps": 2, "progress": False, "output_type": "latent"}
    plain, with_them, off = (
        Cosmos3Pipeline.from_pretrained(folders("small"), lora=lora, progress=False)("noise", **request).video
        for lora in ([], [made.parent], [(made, 0.0)])
    )
    assert np.array_equal(plain, off)
    assert not np.allclose(plain, with_them, atol=1e-4)


@pytest.mark.live
def test_diffusers_makes_the_same_video_with_what_was_trained(model, clips, folders, tmp_path):
    pytest.importorskip("diffusers")
    import reference

    settings = dataclasses.replace(QUICK, lora_rank=3, lora_alpha=6.0, learning_rate=0.01)
    made = run(model(), clips, settings, tmp_path / "run")
    case = cases.BASE | SMALL | {"num_inference_steps": 2}
    theirs = reference.load(folders("small"))
    before = reference.run(theirs, case)["video"]
    theirs.transformer.load_lora_adapter(made, prefix="transformer", use_safetensors=True)
    expected = reference.run(theirs, case)["video"]
    ours = Cosmos3Pipeline.from_pretrained(folders("small"), dtype="float32", lora=[made], progress=False)
    assert errors(ours(**case, progress=False).video, expected)[1] < 5e-5
    assert errors(expected, before)[0] > 0.02


def test_adapters_of_both_towers(model, clips, tmp_path):
    settings = dataclasses.replace(QUICK, lora_rank=1, train_text_tower=True)
    names = {
        name.split(".self_attn.")[1].split(".lora_")[0] for name in load_file(run(model(), clips, settings, tmp_path / "run"))
    }
    assert names == {*TARGETS, *TEXT_TARGETS}


def test_bfloat16_is_computed_in_and_float32_is_trained(model, clips, tmp_path):
    found = []
    for dtype in ("float32", "bfloat16"):
        made = run(dataclasses.replace(model(), dtype=dtype), clips, QUICK, tmp_path / dtype)
        found.append((losses(tmp_path / dtype), tensors(made)["layers.0.self_attn.add_q_proj.weight"]))
    (exact, full), (rounded, half) = found
    assert exact != rounded
    np.testing.assert_allclose(rounded, exact, rtol=0.01)
    assert half.dtype == full.dtype == np.float32
    assert np.any(half != half.astype(ml_dtypes.bfloat16))  # not rounded on the way


def test_sound_is_learned_too(clips, model, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", sound=TINY_FULL_SOUND)
    checkpoint = Checkpoint.open(folder, sound_encoder=True)
    tokenizer = load_tokenizer(folder / "text_tokenizer", checkpoint.transformer.vocab_size)
    loud = tmp_path / "loud"
    loud.mkdir()
    frames = np.random.default_rng(1).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    for i in range(2):
        wave = np.sin(np.arange(12000) * (0.02 + 0.03 * i))[None].repeat(2, axis=0).astype(np.float32)
        result_files.write(loud / f"{i}.mp4", frames, 24.0, result_files.Sound(wave, 48000))
        (loud / f"{i}.txt").write_text("a tone")
    settings = Training(**SMALL, steps=3, learning_rate=1e-3, warmup=0, enable_sound=True)
    made = run(Model(checkpoint, tokenizer, make_mesh(), "float32"), loud, settings, tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open() as file:
        assert all(float(row["sound"]) > 0.1 for row in csv.DictReader(file))
    before, after = tensors(folder), tensors(made)
    heads = [name for name in before if name.startswith("audio_")]
    assert all(not np.array_equal(before[name], after[name]) for name in heads)
    silent = run(Model(checkpoint, tokenizer, make_mesh(), "float32"), stills(tmp_path), settings, tmp_path / "silent")
    assert all(np.array_equal(before[name], tensors(silent)[name]) for name in heads)  # nothing of which would be learned


def stills(folder: Path) -> Path:
    """A folder with one picture."""
    (folder / "stills").mkdir()
    result_files.write(folder / "stills" / "a.png", np.zeros((1, 32, 48, 3), np.uint8), 24.0)
    (folder / "stills" / "a.txt").write_text("nothing")
    return folder / "stills"


def test_captions_of_any_length_go_into_one_step(model, tmp_path):
    folder = stills(tmp_path)
    result_files.write(folder / "b.png", np.ones((1, 32, 48, 3), np.uint8), 24.0)
    (folder / "b.txt").write_text("very " * 150 + "long")
    settings = dataclasses.replace(QUICK, steps=4, batch_size=1, accumulate=2, caption_dropout=0.5)
    run(model(), folder, settings, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 4


def test_pictures_have_noise_levels_of_their_own(model):
    found = [post_training.draws(model(), dataclasses.replace(QUICK, flow_shift=shift)) for shift in (None, 5.0)]
    assert [(each.flow_shift, each.image_flow_shift) for each in found] == [(10, 3), (5, 5)]
    example = Example(Latents(np.zeros((1, 2, 3, 16), np.float32)), [1])
    drawn = [[float(draw(example, np.random.default_rng(i), how, [1]).sigma) for i in range(200)] for how in found]
    assert np.mean(drawn[0]) < np.mean(drawn[1]) - 0.05  # less noise


def test_a_shorter_run_leaves_what_it_has(model, clips, tmp_path):
    settings = dataclasses.replace(QUICK, steps=5, lora_rank=2)
    with pytest.raises(StoppedError):
        run(model(), clips, settings, tmp_path / "run", check=stop_before(3))
    made = run(model(), clips, dataclasses.replace(settings, steps=2), tmp_path / "run")
    assert made.is_file()
    assert len(losses(tmp_path / "run")) == 3


def test_seconds_of_steps_do_not_overlap(tmp_path):
    nothing = jnp.float32(0)
    progress, start = Progress(Loss(nothing, nothing, nothing), nothing, nothing), time.perf_counter()
    with contextlib.closing(Teller(tmp_path / "log.csv", 0, 4, visible=False)) as teller:
        for step in range(1, 5):
            begun = time.perf_counter()
            time.sleep(0.05)
            teller.later(step, begun, progress)
        teller.wait()
    with (tmp_path / "log.csv").open() as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert len(seconds) == 4
    assert 0.2 < sum(seconds) < time.perf_counter() - start


def test_latents_are_made_once(model, clips, tmp_path, monkeypatch):
    run(model(), clips, QUICK, tmp_path / "first")
    monkeypatch.setattr(post_training, "frames", lambda *_: pytest.fail("encoded again"))
    run(model(), clips, QUICK, tmp_path / "second")


def test_sigterm_saves_and_ends(clips, folders, tmp_path):
    paths = {"checkpoint": folders("small"), "data": clips, "out": tmp_path / "run"}
    numbers = {"num-frames": 5, "height": 32, "width": 48, "steps": 100_000, "batch-size": 2}
    flags = [str(part) for name, value in (paths | numbers).items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "cosmos3_jax.train", *flags]
    log, deadline = tmp_path / "run" / "log.csv", time.monotonic() + 120
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 143
    assert said.splitlines()[-1] == "error: stopped by SIGTERM"
    states = [int(path.name) for path in (tmp_path / "run" / "states").iterdir()]
    assert states == [len(losses(tmp_path / "run"))]


def test_samples_are_written(model, clips, tmp_path):
    settings = dataclasses.replace(QUICK, sample_every=1, sample_prompts=("noise", "more noise"))
    run(model(), clips, settings, tmp_path / "run")
    found = sorted(str(path.relative_to(tmp_path / "run" / "samples")) for path in (tmp_path / "run").rglob("*.mp4"))
    assert found == [f"step-00000{step}/{i}.mp4" for step in (1, 2) for i in (0, 1)]


def test_a_folder_goes_on_with_its_own_run_alone(model, clips, tmp_path):
    run(model(), clips, QUICK, tmp_path / "run")
    with pytest.raises(InputError, match=r"holds a run with seed=0; give the same"):
        run(model(), clips, dataclasses.replace(QUICK, seed=1), tmp_path / "run")
    others = tmp_path / "others"
    shutil.copytree(clips, others)
    result_files.write(others / "still.png", np.zeros((1, 48, 64, 3), np.uint8), 24.0)
    with pytest.raises(InputError, match="holds a run with clips="):
        run(model(), others, QUICK, tmp_path / "run")


def test_a_run_is_known_again_though_json_has_no_tuples(tmp_path):
    data = SimpleNamespace(get_state=dict)
    Run(tmp_path, {"plan": {"seeds": (1, 2)}}).save(TrainState(jnp.int32(1), {}, ()), data)
    Run(tmp_path, {"plan": {"seeds": (1, 2)}})
    with pytest.raises(InputError, match=r"holds a run with plan=\{'seeds': \[1, 2\]\}"):
        Run(tmp_path, {"plan": {"seeds": (1, 3)}})


def test_a_folder_does_not_go_on_with_another_base(model, clips, folders, tmp_path):
    bases = [tmp_path / name / "checkpoint" for name in "ab"]
    for base in bases:
        shutil.copytree(folders("small"), base)
    made = run(model(folder=bases[0]), clips, QUICK, tmp_path / "run")
    shutil.rmtree(bases[1] / "transformer")
    shutil.copytree(made / "transformer", bases[1] / "transformer")  # of the same name and the same sizes
    with pytest.raises(InputError, match="holds a run with weights='sample of sha256"):
        run(model(folder=bases[1]), clips, QUICK, tmp_path / "run")


@pytest.mark.parametrize("lora", [{}, ADAPTERS], ids=["whole", "adapters"])
def test_what_no_run_of_the_folder_left_is_not_replaced(model, clips, tmp_path, lora):
    settings = dataclasses.replace(QUICK, **lora)
    result = tmp_path / ("lora.safetensors" if lora else "checkpoint")
    result.mkdir()
    with pytest.raises(InputError, match="is there already, and no state of a run"):
        run(model(), clips, settings, tmp_path)
    assert result.is_dir()


def test_a_result_is_replaced_whole_or_not_at_all(model, clips, tmp_path, monkeypatch):
    made = run(model(), clips, QUICK, tmp_path / "run")
    first = contents(made)
    longer = dataclasses.replace(QUICK, steps=3)

    def full(source, dst):
        raise InputError(f"{dst}: needs 2 GB, but there is 1 GB free")

    with monkeypatch.context() as patch:
        patch.setattr(results, "publish", full)
        with pytest.raises(RunError, match="needs 2 GB"):
            run(model(), clips, longer, tmp_path / "run")
    assert contents(made) == first
    assert run(model(), clips, longer, tmp_path / "run") == made
    assert contents(made).keys() == first.keys()
    assert contents(made) != first
    assert sorted(path.name for path in made.parent.iterdir()) == ["checkpoint", "log.csv", "states"]


def test_a_full_disk_is_told(model, clips, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(latent_cache.np, "savez", full)
        with pytest.raises(RunError, match=r"\.npz: cannot be written .*No space left"):
            post_train(model(), find_clips(clips), QUICK, tmp_path / "run", tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(saved.ocp.training.Checkpointer, "save", full)
        with pytest.raises(RunError, match=r"states: cannot be written .*No space left"):
            run(model(), clips, QUICK, tmp_path / "run")
    (tmp_path / "other" / "log.csv").mkdir(parents=True)
    with pytest.raises(RunError, match=r"log\.csv: cannot be written"):
        run(model(), clips, QUICK, tmp_path / "other")


def test_numbers_may_be_numpys(model, clips, tmp_path):
    sizes = {name: np.int64(x) for name, x in SMALL.items()}
    settings = dataclasses.replace(QUICK, **sizes, fps=np.float32(24), train_text_tower=np.bool_(False), seed=np.uint8(0))
    run(model(), clips, settings, tmp_path / "run")
    run(model(), clips, QUICK, tmp_path / "run")  # the same run


def test_of_pictures_frames_need_not_be_told(model, tmp_path):
    made = run(model(), stills(tmp_path), dataclasses.replace(QUICK, num_frames=6), tmp_path / "run")
    assert made.is_dir()


def test_a_distilled_checkpoint_is_trained_with_a_warning(model, clips, tmp_path, caplog):
    few = model()
    scheduler = dataclasses.replace(few.checkpoint.scheduler, distilled_sigmas=(1.0, 0.5))
    few = dataclasses.replace(few, checkpoint=dataclasses.replace(few.checkpoint, scheduler=scheduler))
    run(few, clips, dataclasses.replace(QUICK, lora_rank=1), tmp_path / "run")
    assert "the checkpoint is distilled for few steps" in caplog.text


def test_what_cannot_be_used_is_said_before_clips_are_encoded(model, clips, tmp_path):
    for change in ({"lora_rank": 2, "lora_targets": ("to_x",)}, {"sample_prompts": ("very " * 9000,)}):
        settings = dataclasses.replace(QUICK, **change)
        with pytest.raises(InputError):
            post_train(model(), find_clips(clips), settings, tmp_path / "run", tmp_path / "cache", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_run_among_the_clips_is_refused(clips, folders, capsys):
    for out in (clips, clips / "run"):
        flags = ["--checkpoint", str(folders("small")), "--data", str(clips), "--out", str(out)]
        assert train.main(flags) == 2
        assert "its samples would be taken for clips" in capsys.readouterr().err


def test_a_result_does_not_replace_what_it_begins_with(model, clips, folders, tmp_path):
    shutil.copytree(folders("small"), tmp_path / "checkpoint")
    with pytest.raises(InputError, match="the checkpoint to begin with is in there"):
        run(model(folder=tmp_path / "checkpoint"), clips, QUICK, tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(model, clips, tmp_path):
    too_fast = dataclasses.replace(QUICK, steps=50, learning_rate=1.0, clip_norm=1e6, weight_decay=10.0)
    with pytest.raises(RunError, match=r"in step \d+: a lower learning rate"):
        run(model(), clips, too_fast, tmp_path / "run")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "no clips there"),
        ({"a.mp4": ""}, r"a\.mp4: no caption; a\.txt or a\.json belongs beside it"),
        ({"a.mp4": "", "a.txt": "x", "a.json": "{}"}, r"a\.json: a\.txt is there as well"),
        ({"a.txt": "x"}, r"a\.txt: no clip of that name"),
        ({"a.mp4": "", "a.png": "", "a.txt": "x"}, "two clips have one caption"),
        ({"a.mp4": "", "a.txt": " "}, r"a\.txt: 0 characters"),
        ({"a.mp4": "", "a.json": '"hi"'}, r"a\.json: no JSON object; plain text belongs into a\.txt"),
    ],
)
def test_folders_that_cannot_be_learned_from(tmp_path, files, sentence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=sentence):
        find_clips(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps=0: a whole number of at least 1"),
        ({"seed": 2**31}, "seed=2147483648: at most 2147483647 is possible"),
        ({"train_text_tower": "no"}, "train_text_tower='no': True or False"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: a number from"),
        ({"learning_rate": 10**400}, "learning_rate=1000"),
        ({"average": 2.0}, "average=2.0: a number from 0 to 1"),
        ({"image_share": 0.7, "clip_share": 0.7}, "at most 1 together"),
        ({"lora_targets": ("to_q",)}, "give lora_rank too"),
        ({"lora_rank": 2, "lora_targets": ("to_q",), "train_text_tower": True}, "lora_targets name all that is trained"),
        ({"lora_rank": 2, "lora_targets": ("to_x",)}, "'to_x' is no projection"),
        ({"sample_prompts": "noise"}, "sample_prompts='noise': a list of texts"),
        ({"sample_prompts": ("very " * 9000,)}, r"the sample prompt 'very .*: \d+ tokens; 8192 are possible"),
        ({"num_frames": 6}, "num_frames=6: one frame and then groups of 4"),
        ({"num_frames": 9}, r"\.mp4: 7 frames at 24 a second, 9 are expected"),
        ({"enable_sound": True}, "no sound tokenizer, or was loaded"),
    ],
)
def test_settings_that_cannot_be_used(model, clips, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        run(model(), clips, dataclasses.replace(QUICK, **change), tmp_path / "run")


def test_a_batch_divides_over_cfg(model, clips, tmp_path):
    with pytest.raises(InputError, match="batch_size=1: cfg=2 does not divide it; use 2"):
        run(model(2, 1), clips, dataclasses.replace(QUICK, batch_size=1), tmp_path / "run")

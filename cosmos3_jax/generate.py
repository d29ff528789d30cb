"""The command line: `python -m cosmos3_jax.generate --prompt "a red ball rolls to the right" --out ball.mp4`.

Flags are the fields of `Request` with dashes (but `--steps` and `--sound`). Wrong input is one sentence on stderr and exit code
2, before any weight is loaded and with no file left behind. The last line on stdout is a JSON object.

Several processes run the same command (processes.py); the first of them prints and writes. `--dry-run` tells what a request
would need (dry_run.py), and loads nothing.
"""

import argparse
import dataclasses
import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TextIO

import jax

from cosmos3_jax import __version__, media, processes
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.checkpoint import BUILT_IN, Checkpoint
from cosmos3_jax.config import PRESETS, SOUND_TOKENIZER, UNIPC, WAN_VAE, SchedulerConfig
from cosmos3_jax.dry_run import dry_run
from cosmos3_jax.errors import InputError
from cosmos3_jax.estimate import TEXT_TOKENS, Job, virtual_devices
from cosmos3_jax.networks import TEXT_TOWER
from cosmos3_jax.pipeline import DTYPES, Cosmos3Pipeline, open_media, token_ids
from cosmos3_jax.prompt import load_tokenizer
from cosmos3_jax.request import Request, ResolvedRequest, resolve

# A first video within a minute on two CPU cores, where Request's own defaults (720p, 189 frames) would take hours.
BUILT_IN_DEFAULTS = {"prompt": "A red ball rolls to the right.", "num_frames": 33, "height": 128, "width": 224}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}", file=sys.stderr)
        try:
            if arguments.preset is not None and not arguments.dry_run:
                raise InputError("--preset has no weights: it is for --dry-run; give a --checkpoint")
            (_dry_run if arguments.dry_run else _generate)(arguments)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            processes.leave(2)
            return 2
        except BaseException as error:
            if processes.are_several():
                traceback.print_exc()
                print(f"error: this process ends, and with it the others: {error!r}", file=sys.stderr)
                processes.leave(1)
            raise
    return 0


def _say(*values: object, file: TextIO | None = None) -> None:
    """Prints, once for all processes."""
    if processes.is_first():
        print(*values, file=file, flush=True)


def _generate(arguments: argparse.Namespace) -> None:
    """Checks everything, loads, generates, writes, and tells."""
    processes.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    path = BUILT_IN if arguments.checkpoint is None else arguments.checkpoint
    checkpoint = Checkpoint.open(path, weights=False, sound=bool(arguments.enable_sound))
    request = resolve(_request(arguments), *checkpoint.configs)
    default = "cosmos3.png" if request.metadata.is_image and not request.enable_sound else "cosmos3.mp4"
    out = Path(default if arguments.out is None else arguments.out)
    wave = None if arguments.save_sound is None else Path(arguments.save_sound)
    if wave is not None and not request.enable_sound:
        raise InputError("--save-sound without --sound: there is none to save")
    if wave is not None and wave.suffix.lower() not in media.SOUND_SUFFIXES:
        raise InputError(f"--save-sound {wave}: a .wav is expected")
    files = [out] if wave is None else [out, wave]
    if processes.is_first():
        for file in files:
            media.check_writable(file, request.num_frames, has_sound=request.enable_sound)
    request = open_media(request, checkpoint.vae)
    mesh = make_mesh(arguments.cfg, arguments.tp)

    if arguments.checkpoint is None:
        _say("no --checkpoint: this is the built-in one. It is tiny and its weights are random, so expect coloured noise.")
    if arguments.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    start = time.perf_counter()
    pipe = Cosmos3Pipeline.from_pretrained(
        path,
        mesh=mesh,
        dtype=arguments.dtype,
        text_tower=arguments.text_tower,
        quantize=arguments.quantize,
        sound=bool(request.enable_sound),
    )
    load = time.perf_counter() - start
    settings = {
        "checkpoint": str(pipe.checkpoint.folder),
        "dtype": pipe.dtype,
        "mesh": _mesh_in_words(arguments),
        "text_tower": pipe.residence.text_tower,
        **({"quantize": arguments.quantize} if arguments.quantize else {}),
        **_settings(request, checkpoint.scheduler),
    }
    for name, value in (settings | {"text_tower": pipe.residence}).items():
        _say(f"{name:>20}  {value}")

    result = pipe.run(request)
    start = time.perf_counter()
    for file in files:
        result.save(file)
    write = time.perf_counter() - start
    seconds = {**result.seconds, "load": round(load + result.seconds["load"], 3), "write": round(write, 3)}
    for stage, value in seconds.items():
        _say(f"{stage:>20}  {value:.2f} s")
    written: dict[str, object] = {"out": str(out)}
    if wave is not None:
        written["save_sound"] = str(wave)
    if request.step_cache:
        written["computed_steps"] = result.computed_steps
        _say(f"{'computed steps':>20}  {result.computed_steps} of {request.num_inference_steps}")
    _say(json.dumps({**written, "seconds": seconds, "version": __version__, **settings}))


def _dry_run(arguments: argparse.Namespace) -> None:
    """Tells what the request would need on this mesh, and on every mesh of one host."""
    if arguments.preset is not None and arguments.checkpoint is not None:
        raise InputError("--preset and --checkpoint: give one of them")
    path, sound = arguments.checkpoint or BUILT_IN, bool(arguments.enable_sound)
    checkpoint = None if arguments.preset else Checkpoint.open(path, weights=False, sound=sound)
    configs = (PRESETS[arguments.preset], WAN_VAE, UNIPC, SOUND_TOKENIZER) if checkpoint is None else checkpoint.configs
    transformer, vae, _, sound_tokenizer = configs
    transformer.check_tensor_parallel(arguments.tp)
    virtual_devices(max(8, 2 * arguments.tp))
    request = open_media(resolve(_request(arguments), *configs), vae)
    text_tokens = TEXT_TOKENS
    if checkpoint is not None and (checkpoint.folder / "text_tokenizer").is_dir():
        tokenizer = load_tokenizer(checkpoint.folder / "text_tokenizer", transformer.vocab_size)
        text_tokens = token_ids(request, checkpoint, tokenizer, arguments.cfg)[0].shape[1]
    job = Job(transformer, vae, request, arguments.dtype or "bfloat16", text_tokens, sound_tokenizer, arguments.quantize)
    tables, answer = dry_run(job, arguments.cfg, arguments.tp)
    print(tables)
    print(json.dumps(answer))


def _mesh_in_words(arguments: argparse.Namespace) -> str:
    used, present = arguments.cfg * arguments.tp, jax.device_count()
    of = f"{used} of {present}" if used < present else str(present)
    return f"cfg={arguments.cfg} tp={arguments.tp} on {of} {jax.default_backend()} device(s)"


def _request(arguments: argparse.Namespace) -> Request:
    """The flags that were given, as a request."""
    names = {field.name for field in dataclasses.fields(Request)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    for name in ("prompt", "negative_prompt"):
        if given.get(name, "").startswith("@"):
            given[name] = _read_text(given[name][1:])
    if arguments.dry_run:
        given = {"prompt": ""} | given
    if arguments.checkpoint is None and arguments.preset is None:
        given = BUILT_IN_DEFAULTS | given
    if "prompt" not in given:
        raise InputError("--prompt is missing; give a text, or @FILE to read it from a file")
    return Request(output_type="pil", **given)


def _settings(request: ResolvedRequest, scheduler: SchedulerConfig) -> dict[str, object]:
    """The resolved request as JSON has it: images by their size, and only what applies."""
    settings: dict[str, object] = {}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if field.name == "image" and value is not None:
            value = f"{value.width}x{value.height}"
        if field.name == "video" and value is not None:
            value = f"{len(value)} frames of {value[0].width}x{value[0].height}"
        if value is not None and field.name != "output_type":
            settings[field.name] = value
    if request.sigmas == "karras" or scheduler.distilled_sigmas:  # where it has no effect
        del settings["flow_shift"]
    for name in ("enable_sound", "step_cache"):
        if not settings[name]:
            del settings[name]
    if request.video is None:
        del settings["condition_frame_indexes_vision"], settings["condition_video_keep"]
    return settings


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"@{path}: no text file that can be read ({error})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cosmos3_jax.generate", description="Generate a video or an image with NVIDIA Cosmos3."
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR|ID",
        help="folder, or Hugging Face id (with @REVISION); a tiny built-in one if left out",
    )
    add("--prompt", metavar="TEXT|@FILE", help="what to show: text or a JSON caption")
    add("--negative-prompt", metavar="TEXT|@FILE", help="what not to show")
    add("--image", metavar="FILE", help="first frame")
    add("--video", metavar="FILE", help="clip to go on from")
    add("--condition-frame-indexes-vision", metavar="I", type=int, nargs="+", help="latent frames that --video gives (0 1)")
    add("--condition-video-keep", choices=("first", "last"), help="the end of --video that is taken (first)")
    add("--num-frames", metavar="N", type=int, help="1 for an image, else 1 + 4k (189)")
    add("--height", metavar="H", type=int, help="pixels, a multiple of 16 (720)")
    add("--width", metavar="W", type=int, help="pixels, a multiple of 16 (1280)")
    add("--fps", metavar="F", type=float, help="frames a second (24)")
    add("--steps", metavar="N", type=int, dest="num_inference_steps", help="denoising steps (35; image 50)")
    add("--guidance-scale", metavar="G", type=float, help="weight of the prompt, off at 1 (6; image 4)")
    add("--flow-shift", metavar="S", type=float, help="more of the steps at high noise (10; image 3)")
    add("--sigmas", choices=("native", "linear", "karras"), help="noise levels (native)")
    add("--seed", metavar="N", type=int, help="of the noise (42)")
    add("--sound", action="store_const", const=True, dest="enable_sound", help="with a soundtrack")
    add("--save-sound", metavar="FILE", help="the sound in a file of its own, too: .wav")
    add("--prompt-style", choices=("native", "diffusers"), help="what is added to the prompt (native)")
    add("--steps-per-call", metavar="N", type=int, help="steps in one program (1)")
    add("--step-cache", metavar="X", type=float, help="steps reuse a velocity while the latents move less than X (0: none)")
    add("--cfg", type=int, default=1, help="2: the branches of guidance on two halves of the devices (1)")
    add("--tp", metavar="N", type=int, default=1, help="devices that share the heads (1)")
    add("--dtype", choices=DTYPES, help="of weights and activations (bfloat16 on GPUs, else float32)")
    add("--text-tower", choices=TEXT_TOWER, default="auto", help="after a prompt: kept, parked on the host, or dropped (auto)")
    add(
        "--quantize",
        choices=("fp8",),
        help="the generating tower's matrices in FP8: less memory, faster from Hopper on, not exact",
    )
    add("--no-compilation-cache", action="store_true", help="compile anew, and keep nothing for the next run")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, where several processes meet (not needed under SLURM)")
    add("--num-processes", metavar="N", type=int, help="how many run this command")
    add("--process-id", metavar="I", type=int, help="which of them this is, from 0")
    add(
        "--dry-run",
        action="store_true",
        help="tell the memory, FLOPs and least time; needs no GPU and no weights",
    )
    add("--preset", choices=("nano", "super", "edge"), help="the model of a dry run without --checkpoint")
    add("--out", metavar="FILE", help=".mp4, or .png, .jpg, .webp of one frame (cosmos3.mp4)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

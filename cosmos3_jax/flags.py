"""The flags of the command line: the fields of `Request` with dashes (but `--steps` and `--sound`), where and how to run."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from cosmos3_jax.errors import InputError
from cosmos3_jax.networks import TEXT_TOWER
from cosmos3_jax.pipeline import DTYPES
from cosmos3_jax.request import Request

# What the built-in checkpoint was trained for, where Request's own defaults are those of the published ones.
BUILT_IN_DEFAULTS: dict[str, Any] = {
    "prompt": "A red ball rolls to the right.",
    "num_frames": 25,
    "height": 128,
    "width": 128,
    "num_inference_steps": 35,
    "guidance_scale": 2.0,
    "flow_shift": 3.0,
}


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Request` that were given. Raises InputError for a text that cannot be read."""
    names = {field.name for field in dataclasses.fields(Request)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    for name in ("prompt", "negative_prompt"):
        if name in given:
            given[name] = text_of(given[name])
    if arguments.checkpoint is None and arguments.preset is None:
        given = BUILT_IN_DEFAULTS | given
    return {"output_type": "pil"} | given


def text_of(value: str) -> str:
    """A flag's text, or what the file has that "@FILE" names. Raises InputError for a file that cannot be read."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{value}: no text file that can be read ({error})") from error


def file_and_scale(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE, of which a colon that no number follows is part of FILE."""
    file, colon, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def parser() -> argparse.ArgumentParser:
    """What `--help` tells."""
    made = argparse.ArgumentParser(
        prog="python -m cosmos3_jax.generate", description="Generate a video or an image with NVIDIA Cosmos3."
    )
    add = made.add_argument
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
    add(
        "--lora",
        metavar="FILE[:SCALE]",
        type=file_and_scale,
        action="append",
        default=[],
        help="adapters added to the weights, also several times; no effect on a dry run",
    )
    process_flags(made)
    add(
        "--dry-run",
        action="store_true",
        help="tell the memory, FLOPs and least time; needs no GPU and no weights",
    )
    add("--preset", choices=("nano", "super", "edge"), help="the model of a dry run without --checkpoint")
    add("--out", metavar="FILE", help=".mp4, or .png, .jpg, .webp of one frame (cosmos3.mp4)")
    add(
        "--requests",
        metavar="FILE",
        help="many: a JSON object a line, a name and the words of Request; flags are defaults",
    )
    add("--out-dir", metavar="DIR", help="where --requests go; what is finished there is left alone")
    add("--fail-fast", action="store_true", help="end at the first of --requests that fails")
    add("--no-guardrails", action="store_const", const=False, dest="guardrails", help="no safety checks (on if installed)")
    add("--guardrails", action="store_const", const=True, help="safety checks, or an error where they are not installed")
    loudness = made.add_mutually_exclusive_group()
    loudness.add_argument("--verbose", action="store_true", help="also tell the time of each stage, as it ends")
    loudness.add_argument("--quiet", action="store_true", help="tell errors and the last line alone")
    return made


def process_flags(made: argparse.ArgumentParser) -> None:
    """Adds what every command that runs on a mesh has: its compiled programs, and the processes that run it together."""
    add = made.add_argument
    add("--no-compilation-cache", action="store_true", help="compile anew, and keep nothing for the next run")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, where several processes meet (not needed under SLURM)")
    add("--num-processes", metavar="N", type=int, help="how many run this command")
    add("--process-id", metavar="I", type=int, help="which of them this is, from 0")

"""The command line of training: `python -m cosmos3_jax.train --checkpoint DIR --data FOLDER --out RUN`.

The same command goes on where it was stopped (Ctrl-C, SIGTERM, a machine that died). What goes wrong is one sentence on stderr
and an exit code (errors.py); the last line on stdout is a JSON object that names what was made.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from cosmos3_jax import console, flags, processes
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.checkpoint import Checkpoint
from cosmos3_jax.compilation_cache import use_compilation_cache
from cosmos3_jax.errors import InputError
from cosmos3_jax.pipeline import DTYPES, dtype_on
from cosmos3_jax.prompt import load_tokenizer
from cosmos3_jax.stop import stoppable
from cosmos3_jax.training.clips import find_clips
from cosmos3_jax.training.post_training import Model, post_train
from cosmos3_jax.training.settings import Training

log = console.LOGGER


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit code: that of the error, or 0."""
    arguments = parser().parse_args(argv)
    with console.speaking(verbose=arguments.verbose, quiet=arguments.quiet):
        return console.ending(lambda: _train(arguments), verbose=arguments.verbose)


def _train(arguments: argparse.Namespace) -> int:
    processes.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    start, settings = time.perf_counter(), Training(**_settings(arguments)).checked()
    data, out = Path(arguments.data), Path(arguments.out)
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.absolute().parent}; create it first")
    if out.resolve().is_relative_to(data.resolve()):
        raise InputError(f"{out}: lies in {data}, so that its samples would be taken for clips; give a folder beside it")
    clips = find_clips(data)
    parts = {"sound": settings.lora_rank is None, "sound_encoder": settings.enable_sound}  # a folder is left with all there is
    Checkpoint.open(arguments.checkpoint, weights=False, **parts)
    mesh = make_mesh(arguments.cfg, arguments.tp)
    dtype = dtype_on(mesh, arguments.dtype)
    checkpoint = Checkpoint.open(arguments.checkpoint, **parts)
    checkpoint.transformer.check_tensor_parallel(arguments.tp)
    tokenizer = load_tokenizer(checkpoint.folder / "text_tokenizer", checkpoint.transformer.vocab_size)
    if arguments.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    use_compilation_cache()
    shown = {"checkpoint": checkpoint.folder, "data": f"{data}: {len(clips)} clips", "dtype": dtype, **dict(mesh.shape)}
    for name, value in (shown | {name: value for name, value in vars(settings).items() if value not in (None, ())}).items():
        log.info("%20s  %s", name, value)
    cache = Path(arguments.cache) if arguments.cache else data / ".latents"
    model = Model(checkpoint, tokenizer, mesh, dtype)
    with stoppable() as check:
        made = post_train(model, clips, settings, out, cache, check=check, progress=not arguments.quiet)
    if processes.is_first():
        print(json.dumps({"out": str(made), "seconds": round(time.perf_counter() - start, 1)}))
    return 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(Training)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    return given | {"sample_prompts": [flags.text_of(prompt) for prompt in arguments.sample_prompts or ()]}


def parser() -> argparse.ArgumentParser:
    """What `--help` tells."""
    made = argparse.ArgumentParser(prog="python -m cosmos3_jax.train", description="Train NVIDIA Cosmos3 on clips of your own.")
    add = made.add_argument
    add("--checkpoint", metavar="DIR|ID", required=True, help="folder, or Hugging Face id, to begin with")
    add("--data", metavar="FOLDER", required=True, help="name.mp4 or name.png, with name.txt or name.json")
    add("--out", metavar="RUN", required=True, help="folder of the run; the same command goes on in it")
    add("--cache", metavar="DIR", help="where latents of the clips are kept (FOLDER/.latents)")
    add("--num-frames", metavar="N", type=int, help="of a clip, 1 + 4k (189)")
    add("--height", metavar="H", type=int, help="pixels, a multiple of 16 (720)")
    add("--width", metavar="W", type=int, help="pixels, a multiple of 16 (1280)")
    add("--fps", metavar="F", type=float, help="frames a second that are taken of a clip (24)")
    add("--sound", action="store_const", const=True, dest="enable_sound", help="learn the soundtracks too")
    add(
        "--steps",
        metavar="N",
        type=int,
        help="of the optimizer, over which the rate falls (1000); once done, the result is left",
    )
    add("--batch-size", metavar="N", type=int, help="clips in a batch, divided over --cfg (1)")
    add("--accumulate", metavar="N", type=int, help="batches in a step (1)")
    add("--learning-rate", metavar="R", type=float, help="the highest (1e-4 for LoRA, else 2e-5)")
    add("--warmup", metavar="N", type=int, help="steps in which it rises, at most half of all (100)")
    add("--weight-decay", metavar="X", type=float, help="of matrices (0.01)")
    add("--clip-norm", metavar="X", type=float, help="of all gradients together, at most (1)")
    add("--ema", metavar="X", type=float, dest="average", help="leave a moving average of the weights, 0.999 say (none)")
    add("--flow-shift", metavar="S", type=float, help="more of the noise levels at high noise (10; images 3)")
    add("--caption-dropout", metavar="X", type=float, help="share of clips without their caption (0.1)")
    add("--image-share", metavar="X", type=float, help="share of clips of which the first frame is given (0.2)")
    add("--clip-share", metavar="X", type=float, help="share of clips of which the first five frames are given (0.1)")
    add("--sound-weight", metavar="X", type=float, help="of the sound's loss (1)")
    add("--train-text-tower", action="store_const", const=True, help="train the text tower too")
    add("--lora-rank", metavar="R", type=int, help="train adapters of this rank, instead of all weights")
    add("--lora-alpha", metavar="X", type=float, help="their scale is alpha / rank (the rank)")
    add("--lora-targets", metavar="NAME", nargs="+", help="modules, by diffusers' names (the attention of what is trained)")
    add("--seed", metavar="N", type=int, help="of all that is drawn (0)")
    add("--save-every", metavar="N", type=int, help="steps between two states from which a run can go on (500)")
    add("--sample-every", metavar="N", type=int, help="steps between two samples (500)")
    add("--sample-prompt", metavar="TEXT", action="append", dest="sample_prompts", help="of samples, or @FILE; may be repeated")
    add("--cfg", type=int, default=1, help="parts that a batch is divided into, 1 or 2 (1)")
    add("--tp", metavar="N", type=int, default=1, help="devices that share the heads (1)")
    add("--dtype", choices=DTYPES, help="that is computed in (bfloat16 on GPUs, else float32); what is trained is float32")
    flags.process_flags(made)
    loudness = made.add_mutually_exclusive_group()
    loudness.add_argument("--verbose", action="store_true", help="also tell what is logged on the way")
    loudness.add_argument("--quiet", action="store_true", help="tell errors and the last line alone")
    return made


if __name__ == "__main__":
    sys.exit(main())

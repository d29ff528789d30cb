"""The command line: `python -m cosmos3_jax.generate --prompt "a red ball rolls to the right" --out ball.mp4`.

What goes wrong is one sentence on stderr and an exit code (errors.py): wrong input before any weight is loaded, and never with
a file half written. The last line on stdout is a JSON object.

`--requests` does many requests, with one loaded pipeline (batch.py). Several processes run the same command (processes.py); the
first of them prints and writes. `--dry-run` tells what a request would need (dry_run.py), and loads nothing.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from cosmos3_jax import console, flags, processes, result_files, safety
from cosmos3_jax.axes import make_mesh
from cosmos3_jax.batch import Batch
from cosmos3_jax.checkpoint import BUILT_IN, Checkpoint
from cosmos3_jax.config import PRESETS, SOUND_TOKENIZER, UNIPC, WAN_VAE
from cosmos3_jax.dry_run import dry_run
from cosmos3_jax.errors import InputError, OutOfMemoryError
from cosmos3_jax.estimate import TEXT_TOKENS, Job, virtual_devices
from cosmos3_jax.lora_files import open_loras
from cosmos3_jax.output_folder import OutputFolder
from cosmos3_jax.pipeline import Cosmos3Pipeline, dtype_on, open_media, token_ids
from cosmos3_jax.prompt import load_tokenizer
from cosmos3_jax.provenance import provenance
from cosmos3_jax.remedy import memory_of, remedy
from cosmos3_jax.request import Request, ResolvedRequest, resolve
from cosmos3_jax.requests_file import Line, read_requests
from cosmos3_jax.result import Result
from cosmos3_jax.stop import stoppable
from cosmos3_jax.version import VERSION

log = console.LOGGER


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit code: that of the error, 0, or 1 where some of many requests failed."""
    arguments = flags.parser().parse_args(argv)
    with console.speaking(verbose=arguments.verbose, quiet=arguments.quiet):
        return console.ending(lambda: _command(arguments)(arguments), verbose=arguments.verbose)


def _command(arguments: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """What the flags ask for. Raises InputError for flags that do not go together."""
    if arguments.dry_run:
        if arguments.requests is not None:
            raise InputError("--dry-run tells of one request: leave --requests out, and give the flags of the largest")
        return _dry_run
    if arguments.preset is not None:
        raise InputError("--preset has no weights: it is for --dry-run; give a --checkpoint")
    if (arguments.requests is None) != (arguments.out_dir is None):
        raise InputError("--requests FILE and --out-dir DIR belong together; give both")
    if arguments.requests is None:
        if arguments.fail_fast:
            raise InputError("--fail-fast is for --requests")
        return _generate
    for name in ("out", "save_sound"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} with --requests: each has its own file in --out-dir; leave it out")
    return _generate_many


def _generate(arguments: argparse.Namespace) -> int:
    """Checks everything, loads, generates, writes, and tells."""
    processes.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    given = flags.settings(arguments)
    checkpoint = Checkpoint.open(_path(arguments), weights=False, sound=bool(arguments.enable_sound))
    request = resolve(_request(given), *checkpoint.configs)
    files = _files(arguments, request)
    request = open_media(request, checkpoint.vae)
    pipe, load = _load(arguments, sound=bool(request.enable_sound))
    settings = _settings(arguments, pipe)
    settings |= {name: value for name, value in pipe.metadata(request).items() if name not in {"cfg", "tp", *settings}}
    for name, value in (settings | {"text_tower": pipe.residence}).items():
        log.info("%20s  %s", name, value)

    with stoppable() as check:
        result = _run(arguments, pipe, check, request)
        start = time.perf_counter()
        for file in files:
            result.save(file)
        write = time.perf_counter() - start
    seconds = {**result.seconds, "load": round(load + result.seconds["load"], 3), "write": round(write, 3)}
    for stage, value in seconds.items():
        log.info("%20s  %.2f s", stage, value)
    written: dict[str, Any] = dict(zip(("out", "save_sound"), map(str, files), strict=False))
    if request.step_cache:
        log.info("%20s  %s of %s", "computed steps", result.computed_steps, request.num_inference_steps)
        written["computed_steps"] = result.computed_steps
    _tell({**written, "seconds": seconds, **settings})
    return 0


def _generate_many(arguments: argparse.Namespace) -> int:
    """Does what a file of requests asks for, as far as it is not done."""
    processes.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    start, given = time.perf_counter(), flags.settings(arguments)
    lines = read_requests(arguments.requests)
    sound = bool(arguments.enable_sound) or any(line.words.get("enable_sound") for line in lines)
    checkpoint, mesh = Checkpoint.open(_path(arguments), weights=False, sound=sound), make_mesh(arguments.cfg, arguments.tp)
    lora, guardrails = [each.identity for each in open_loras(arguments.lora)], safety.planned(arguments.guardrails)
    dtype, folder = dtype_on(mesh, arguments.dtype), OutputFolder(Path(arguments.out_dir)) if processes.is_first() else None

    def resolved(line: Line) -> ResolvedRequest:
        return resolve(line.request(given), *checkpoint.configs)

    def metadata(request: ResolvedRequest) -> Mapping[str, Any]:
        request = open_media(request, checkpoint.vae)
        return provenance(request, checkpoint, mesh, dtype, quantize=arguments.quantize, guardrails=guardrails, lora=lora)

    batch = Batch(lines, folder, resolved, metadata, fail_fast=arguments.fail_fast)
    with stoppable() as check:
        if batch.survey():
            pipe, _ = _load(arguments, sound=sound)
            for name, value in (_settings(arguments, pipe) | {"text_tower": pipe.residence}).items():
                log.info("%20s  %s", name, value)
            batch.work(functools.partial(_run, arguments, pipe, check), check)
    tally = batch.tally
    for what, names in vars(tally).items():
        log.info("%20s  %d", what.replace("_", " "), len(names))
    seconds = round(time.perf_counter() - start, 3)
    _tell({"out_dir": arguments.out_dir, "requests": len(lines), **vars(tally), "seconds": seconds, "version": VERSION})
    return min(1, processes.told(len(tally.failed)))


def _path(arguments: argparse.Namespace) -> str | Path:
    return BUILT_IN if arguments.checkpoint is None else arguments.checkpoint


def _request(given: Mapping[str, Any]) -> Request:
    if "prompt" not in given:
        raise InputError("--prompt is missing; give a text, or @FILE to read it from a file")
    return Request(**given)


def _files(arguments: argparse.Namespace, request: ResolvedRequest) -> list[Path]:
    """Where the result goes: --out, and the sound to --save-sound. Raises InputError where it cannot go."""
    files = [Path(f"cosmos3{request.suffix}" if arguments.out is None else arguments.out)]
    if arguments.save_sound is not None:
        files.append(Path(arguments.save_sound))
        if not request.enable_sound:
            raise InputError("--save-sound without --sound: there is none to save")
        if files[1].suffix.lower() not in result_files.SOUND_SUFFIXES:
            raise InputError(f"--save-sound {files[1]}: a .wav is expected")
    if processes.is_first():
        for file in files:
            result_files.check_writable(file, request.num_frames, has_sound=bool(request.enable_sound))
    return files


def _load(arguments: argparse.Namespace, *, sound: bool) -> tuple[Cosmos3Pipeline, float]:
    """The pipeline, and the seconds that it took."""
    mesh = make_mesh(arguments.cfg, arguments.tp)
    if arguments.checkpoint is None:
        known = flags.BUILT_IN_DEFAULTS["prompt"]
        log.info("no --checkpoint: this is the built-in one. It knows one or two coloured shapes that move, as in %r", known)
    if arguments.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    start = time.perf_counter()
    pipe = Cosmos3Pipeline.from_pretrained(
        _path(arguments),
        mesh=mesh,
        dtype=arguments.dtype,
        text_tower=arguments.text_tower,
        quantize=arguments.quantize,
        lora=arguments.lora,
        sound=sound,
        safety_checker=arguments.guardrails,
        progress=not arguments.quiet,
    )
    return pipe, time.perf_counter() - start


def _settings(arguments: argparse.Namespace, pipe: Cosmos3Pipeline) -> dict[str, Any]:
    """How and where everything runs."""
    used, present = arguments.cfg * arguments.tp, jax.device_count()
    of = f"{used} of {present}" if used < present else str(present)
    return {
        "checkpoint": str(pipe.checkpoint.folder),
        "dtype": pipe.dtype,
        "mesh": f"cfg={arguments.cfg} tp={arguments.tp} on {of} {jax.default_backend()} device(s)",
        "text_tower": pipe.residence.text_tower,
        "guardrails": safety.in_words(pipe.safety_checker, arguments.guardrails),
    }


def _run(arguments: argparse.Namespace, pipe: Cosmos3Pipeline, check: Callable[[], None], request: ResolvedRequest) -> Result:
    """The result. Where a device's memory ends, the error says what would fit."""
    try:
        return pipe.run(request, callback_on_step_end=lambda *_: check(), progress=not arguments.quiet)
    except OutOfMemoryError as error:
        if processes.are_several():
            raise

        log.info("%s; looking for what would fit", error)
        raise OutOfMemoryError(f"{error}; {_advice(arguments, pipe, request)}", error.stage) from None


def _advice(arguments: argparse.Namespace, pipe: Cosmos3Pipeline, request: ResolvedRequest) -> str:
    """What a request would need, and what would fit here."""
    checkpoint, tower = pipe.checkpoint, pipe.residence.text_tower
    text_tokens = token_ids(request, checkpoint, pipe.tokenizer, arguments.cfg)[0].shape[1]
    job = Job(checkpoint.transformer, checkpoint.vae, request, pipe.dtype, text_tokens, checkpoint.sound, arguments.quantize)
    shared = jax.default_backend() == "cpu"
    return remedy(job, arguments.cfg, arguments.tp, memory_of(pipe.mesh), jax.device_count(), tower, shared=shared)


def _dry_run(arguments: argparse.Namespace) -> int:
    """Tells what the request would need on this mesh, and on every mesh of one host."""
    if arguments.preset is not None and arguments.checkpoint is not None:
        raise InputError("--preset and --checkpoint: give one of them")
    sound = bool(arguments.enable_sound)
    checkpoint = None if arguments.preset else Checkpoint.open(_path(arguments), weights=False, sound=sound)
    configs = (PRESETS[arguments.preset], WAN_VAE, UNIPC, SOUND_TOKENIZER) if checkpoint is None else checkpoint.configs
    transformer, vae, _, sound_tokenizer = configs
    transformer.check_tensor_parallel(arguments.tp)
    virtual_devices(max(8, 2 * arguments.tp))
    request = open_media(resolve(_request({"prompt": ""} | flags.settings(arguments)), *configs), vae)
    text_tokens = TEXT_TOKENS
    if checkpoint is not None and (checkpoint.folder / "text_tokenizer").is_dir():
        tokenizer = load_tokenizer(checkpoint.folder / "text_tokenizer", transformer.vocab_size)
        text_tokens = token_ids(request, checkpoint, tokenizer, arguments.cfg)[0].shape[1]
    job = Job(transformer, vae, request, arguments.dtype or "bfloat16", text_tokens, sound_tokenizer, arguments.quantize)
    tables, answer = dry_run(job, arguments.cfg, arguments.tp)
    print(tables)
    print(json.dumps(answer))
    return 0


def _tell(told: Mapping[str, Any]) -> None:
    """The last line, once for all processes."""
    if processes.is_first():
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    sys.exit(main())

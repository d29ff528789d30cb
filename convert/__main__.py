"""The command line: `python -m convert SRC DST`, a published folder in, a folder that starts faster out.

    python -m convert SRC DST [--dtype D] [--only transformer,vae] [--verify]
    python -m convert SRC --to-safetensors DST [--dtype D]
    python -m convert --inspect SRC

Wrong input is a sentence on stderr and exit code 2. The last line on stdout is a JSON object.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax

from convert.folders import convert, export, verify
from convert.inspection import inspect
from cosmos3_jax.config import InputError
from cosmos3_jax.pipeline import DTYPES


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.src is None) == (arguments.inspect is None):
        parser.error("give SRC and DST, SRC and --to-safetensors DST, or --inspect SRC")
    if arguments.inspect is None and (arguments.dst is None) == (arguments.to_safetensors is None):
        parser.error("give one place to write to: DST, or --to-safetensors DST")
    jax.config.update("jax_platforms", "cpu")  # weights pass through the host alone
    try:
        answer = _inspect(arguments) if arguments.inspect is not None else _write(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(answer))
    return 0


def _inspect(arguments: argparse.Namespace) -> dict[str, object]:
    words, answer = inspect(arguments.inspect)
    print(words)
    if answer["faults"]:
        raise InputError(f"{arguments.inspect}: {len(answer['faults'])} faults")
    return answer


def _write(arguments: argparse.Namespace) -> dict[str, object]:
    start = time.perf_counter()
    only = None if arguments.only is None else [part for part in arguments.only.split(",") if part]
    if arguments.to_safetensors is not None:
        if only is not None or arguments.verify:
            raise InputError("--only and --verify are for our own layout, not for --to-safetensors")
        export(arguments.src, arguments.to_safetensors, dtype=arguments.dtype, progress=True)
        return {"out": arguments.to_safetensors, "seconds": round(time.perf_counter() - start, 1)}
    there = arguments.verify and Path(arguments.dst).exists()  # then there is nothing to do but to compare
    if not there:
        convert(arguments.src, arguments.dst, dtype=arguments.dtype, only=only, progress=True)
    answer: dict[str, object] = {"out": arguments.dst, "seconds": round(time.perf_counter() - start, 1)}
    if arguments.verify:
        answer["equal_arrays"] = verify(arguments.src, arguments.dst, progress=True)
        print(f"{arguments.dst}: all {answer['equal_arrays']} arrays are bit for bit those of {arguments.src}")
    return answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert", description="Convert a Cosmos3 checkpoint between the published layout and our own."
    )
    add = parser.add_argument
    add("src", metavar="SRC", nargs="?", help="folder in either layout, or Hugging Face id")
    add("dst", metavar="DST", nargs="?", help="the folder to write, in our own layout")
    add("--dtype", choices=DTYPES, help="of the weights (as they are)")
    add("--only", metavar="PART,...", help="transformer, vae, sound_tokenizer (all that there are)")
    add("--verify", action="store_true", help="read DST back and compare every weight, bit for bit")
    add("--inspect", metavar="SRC", help="tell what a folder is and what is wrong with it; write nothing")
    add("--to-safetensors", metavar="DST", help="write the published layout, which diffusers reads")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m convert SRC DST`, a published folder in, one in our own layout out.

    python -m convert SRC DST [--dtype D] [--only transformer,vae] [--verify]
    python -m convert SRC --to-safetensors DST [--dtype D]
    python -m convert --inspect SRC

What goes wrong is a sentence on stderr and an exit code (cosmos3_jax/errors.py). The last line on stdout is a JSON object.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax

from convert.inspection import inspect
from cosmos3_jax import console
from cosmos3_jax.conversion import convert, export, verify
from cosmos3_jax.errors import InputError
from cosmos3_jax.pipeline import DTYPES


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.src is None) == (arguments.inspect is None):
        parser.error("give SRC and DST, SRC and --to-safetensors DST, or --inspect SRC")
    if arguments.inspect and (arguments.dtype or arguments.only or arguments.verify or arguments.to_safetensors):
        parser.error("--inspect stands alone")
    if arguments.inspect is None and (arguments.dst is None) == (arguments.to_safetensors is None):
        parser.error("give one place to write to: DST, or --to-safetensors DST")
    jax.config.update("jax_platforms", "cpu")  # weights pass through the host alone
    with console.speaking():
        return console.ending(lambda: _command(arguments))


def _command(arguments: argparse.Namespace) -> int:
    answer, code = (_write if arguments.inspect is None else _inspect)(arguments)
    print(json.dumps(answer))
    return code


def _inspect(arguments: argparse.Namespace) -> tuple[dict[str, object], int]:
    words, answer = inspect(arguments.inspect)
    print(words)
    return answer, 2 if answer["faults"] else 0


def _write(arguments: argparse.Namespace) -> tuple[dict[str, object], int]:
    start = time.perf_counter()
    only = None if arguments.only is None else [part.strip() for part in arguments.only.split(",") if part.strip()]
    out, answer = arguments.dst, {}
    if arguments.to_safetensors is not None:
        if only is not None or arguments.verify:
            raise InputError("--only and --verify are for our own layout, not for --to-safetensors")
        out = arguments.to_safetensors
        export(arguments.src, out, dtype=arguments.dtype, progress=True)
    elif not (arguments.verify and Path(out).exists()):  # else there is nothing to do but to compare
        convert(arguments.src, out, dtype=arguments.dtype, only=only, progress=True)
    if arguments.verify:
        counts = verify(arguments.src, out, dtype=arguments.dtype, only=only, progress=True)
        listed = ", ".join(f"{count} of {store}" for store, count in counts.items())
        print(f"{out}: bit for bit what {arguments.src} converts to: {listed}")
        answer = {"equal_arrays": counts}
    return {"out": out, "seconds": round(time.perf_counter() - start, 1), **answer}, 0


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

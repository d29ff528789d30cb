"""Whether the built-in checkpoint does what it is told: `python -m benchmarks.small_world.measure` prints a table.

Sixty prompts, of which 20 are of combinations that were never trained on, as text to video with sound, with guidance and
without, and as image to video from a first frame. The judge (judge.py) sees decoded frames and samples of the sound alone.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.record import finish
from benchmarks.small_world.film import CLIP, PITCH
from benchmarks.small_world.judge import look, pitch, right, semitones
from benchmarks.small_world.prompts import Prompt, prompts
from cosmos3_jax import Cosmos3Pipeline
from cosmos3_jax.checkpoint import BUILT_IN
from cosmos3_jax.flags import BUILT_IN_DEFAULTS
from cosmos3_jax.result import Result

Marks = dict[str, bool]
"""What was right of one result."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_world.measure", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=BUILT_IN, help="another than the built-in one")
    parser.add_argument("--steps", type=int, default=BUILT_IN_DEFAULTS.get("num_inference_steps", 35))
    parser.add_argument("--guidance-scale", type=float, default=BUILT_IN_DEFAULTS.get("guidance_scale", 6.0))
    parser.add_argument("--flow-shift", type=float, default=BUILT_IN_DEFAULTS.get("flow_shift", 10.0))
    parser.add_argument("--count", type=int, default=60, help="of the prompts, the first ones (60)")
    parser.add_argument("--out", type=Path, help="a file for the record")
    arguments = parser.parse_args(argv)
    pipe = Cosmos3Pipeline.from_pretrained(arguments.checkpoint, progress=False)
    settings = {"num_inference_steps": arguments.steps, "flow_shift": arguments.flow_shift}
    start, asked = time.perf_counter(), prompts()[: arguments.count]
    rows: dict[str, dict[str, float]] = {}
    for name, scale, with_image in (
        ("text to video", arguments.guidance_scale, False),
        ("text to video, guidance scale 1", 1.0, False),
        ("image to video", arguments.guidance_scale, True),
    ):
        marks = [
            judged(pipe, prompt, with_image=with_image, guidance_scale=scale, **settings) for prompt in tqdm(asked, desc=name)
        ]
        rows |= shares(name, asked, marks)
    print(table(rows))
    record = {"benchmark": "small world", "guidance_scale": arguments.guidance_scale, **settings, "rows": rows}
    finish(record | {"seconds": round(time.perf_counter() - start, 1)}, arguments.out)


def judged(pipe: Cosmos3Pipeline, prompt: Prompt, *, with_image: bool, **settings: Any) -> Marks:
    """What is right of what the model makes of a prompt, or of its first frame."""
    image = Image.fromarray(prompt.first_frame()) if with_image else None
    result = pipe(
        prompt.text,
        image=image,
        num_frames=CLIP.num_frames,
        height=CLIP.height,
        width=CLIP.width,
        fps=CLIP.fps,
        enable_sound=True,
        seed=prompt.seed,
        progress=False,
        **settings,
    )
    frames = np.rint(result.video * 255).astype(np.uint8)
    found = right(prompt.told, look(frames, CLIP.fps))
    marks = {
        "colour and shape": found["colour"] and found["shape"],
        "direction": found["direction"],
        "all that is told": found["all"],
        "pitch": in_tune(prompt, result),
    }
    if with_image:
        marks["first frame above 25 dB"] = psnr(result.video[0], prompt.first_frame() / 255) > 25
    return marks


def in_tune(prompt: Prompt, result: Result) -> bool:
    """Whether the sound is within a semitone of what the shape of the first thing asks for."""
    assert result.sample_rate is not None
    assert result.sound is not None
    heard = pitch(result.sound, result.sample_rate)
    return heard is not None and abs(semitones(heard, PITCH[prompt.told.things[0].shape])) <= 1


def psnr(frame: np.ndarray, expected: np.ndarray) -> float:
    """Of pictures in [0, 1], in decibels."""
    return -10 * float(np.log10(np.mean(np.square(frame - expected)) + 1e-12))


def shares(name: str, asked: Sequence[Prompt], marks: Sequence[Marks]) -> dict[str, dict[str, float]]:
    """Of each mark, in percent, how many of all, of the seen and of the unseen prompts have it."""
    of: Mapping[str, Callable[[Prompt], bool]] = {
        "all": lambda prompt: True,
        "seen": lambda prompt: not prompt.held_out,
        "never seen": lambda prompt: prompt.held_out,
    }
    rows: dict[str, dict[str, float]] = {}
    for what in marks[0]:
        row = rows[f"{name}: {what}"] = {}
        for group, belongs in of.items():
            counted = [mark[what] for prompt, mark in zip(asked, marks, strict=True) if belongs(prompt)]
            row[group] = 100 * sum(counted) / max(len(counted), 1)
    return rows


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """As Markdown has it."""
    head = ["| right, of 60 prompts | all | 40 of seen combinations | 20 never seen |", "|---|---|---|---|"]
    body = [f"| {name} | {' | '.join(f'{share:.0f} %' for share in row.values())} |" for name, row in rows.items()]
    return "\n".join(head + body)


if __name__ == "__main__":
    main()

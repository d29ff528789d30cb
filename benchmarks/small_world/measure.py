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

from benchmarks.draw import small_world_table
from benchmarks.record import finish, surroundings
from benchmarks.small_world.film import CLIP, PITCH
from benchmarks.small_world.judge import look, pitch, right, semitones
from benchmarks.small_world.prompts import Prompt, prompts
from benchmarks.small_world.show import sheet
from cosmos3_jax import Cosmos3Pipeline
from cosmos3_jax.checkpoint import BUILT_IN
from cosmos3_jax.flags import BUILT_IN_DEFAULTS
from cosmos3_jax.result import Result

SHOWN = 10  # prompts on the sheet, evenly among all

Marks = dict[str, bool]
"""What was right of one result."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_world.measure", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=BUILT_IN, help="another than the built-in one")
    parser.add_argument("--steps", type=int, default=BUILT_IN_DEFAULTS["num_inference_steps"])
    parser.add_argument("--guidance-scale", type=float, default=BUILT_IN_DEFAULTS["guidance_scale"])
    parser.add_argument("--flow-shift", type=float, default=BUILT_IN_DEFAULTS["flow_shift"])
    parser.add_argument("--every", type=int, default=1, help="of the prompts, to be quick (1)")
    parser.add_argument("--sheet", type=Path, help="a picture of some prompts and their videos")
    parser.add_argument("--out", type=Path, help="a file for the record")
    arguments = parser.parse_args(argv)
    pipe = Cosmos3Pipeline.from_pretrained(arguments.checkpoint, progress=False)
    settings = {"num_inference_steps": arguments.steps, "flow_shift": arguments.flow_shift}
    start, asked = time.perf_counter(), prompts()[:: arguments.every]
    rows: dict[str, dict[str, float]] = {}
    shown: list[tuple[str, np.ndarray]] = []
    for name, scale, with_image in (
        ("text to video", arguments.guidance_scale, False),
        ("text to video, guidance scale 1", 1.0, False),
        ("image to video", arguments.guidance_scale, True),
    ):
        marks = []
        for prompt in tqdm(asked, desc=name):
            result = generated(pipe, prompt, with_image=with_image, guidance_scale=scale, **settings)
            marks.append(judged(prompt, result, with_image=with_image))
            if not rows:
                shown.append((titled(prompt, marks[-1]), frames_of(result)))
        rows |= shares(name, asked, marks)
    model = "the built-in checkpoint" if arguments.checkpoint == BUILT_IN else arguments.checkpoint.name
    record = {"kind": "small_world", "checkpoint": model, **settings, "guidance_scale": arguments.guidance_scale, "rows": rows}
    if arguments.sheet:
        sheet(shown[:: max(1, len(shown) // SHOWN)]).save(arguments.sheet, quality=90)
        record["sheet"] = arguments.sheet.name
    print(small_world_table({"measured": record | surroundings()}))
    finish(record | {"seconds": round(time.perf_counter() - start, 1)}, arguments.out)


def generated(pipe: Cosmos3Pipeline, prompt: Prompt, *, with_image: bool, **settings: Any) -> Result:
    """What the model makes of a prompt, or of its first frame."""
    return pipe(
        prompt.text,
        image=Image.fromarray(prompt.first_frame()) if with_image else None,
        num_frames=CLIP.num_frames,
        height=CLIP.height,
        width=CLIP.width,
        fps=CLIP.fps,
        enable_sound=True,
        seed=prompt.seed,
        progress=False,
        **settings,
    )


def judged(prompt: Prompt, result: Result, *, with_image: bool) -> Marks:
    """What is right of it."""
    found = right(prompt.told, look(frames_of(result), CLIP.fps))
    marks = {
        "colour and shape": found["colour"] and found["shape"],
        "direction": found["direction"],
        "all that is told": found["all"],
        "pitch": in_tune(prompt, result),
    }
    if with_image:
        marks["first frame is the image (above 25 dB)"] = psnr(result.video[0], prompt.first_frame() / 255) > 25
    return marks


def frames_of(result: Result) -> np.ndarray:
    """Of uint8, [t, h, w, 3]."""
    return np.rint(result.video * 255).astype(np.uint8)


def titled(prompt: Prompt, marks: Marks) -> str:
    """The prompt, whether its combination was trained on, and what is wrong of shape and colour or direction."""
    wrong = [what for what in ("colour and shape", "direction") if not marks[what]]
    told = ["never seen"] * prompt.held_out + [f"wrong: {', '.join(wrong)}"] * bool(wrong)
    return prompt.text + (f" ({'; '.join(told)})" if told else "")


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
    """Of each mark, in percent, how many of all prompts and of each group of them have it."""
    groups: Mapping[str, Callable[[Prompt], bool]] = {
        "prompts": lambda prompt: True,
        "of one thing as in training": lambda prompt: not prompt.held_out and len(prompt.scene.things) == 1,
        "of one thing never seen": lambda prompt: prompt.held_out,
        "of two things": lambda prompt: len(prompt.scene.things) == 2,
    }
    rows: dict[str, dict[str, float]] = {}
    for what in marks[0]:
        row = rows[f"{name}: {what}"] = {}
        for group, belongs in groups.items():
            counted = [mark[what] for prompt, mark in zip(asked, marks, strict=True) if belongs(prompt)]
            row[f"{len(counted)} {group}"] = 100 * sum(counted) / max(len(counted), 1)
    return rows


if __name__ == "__main__":
    main()

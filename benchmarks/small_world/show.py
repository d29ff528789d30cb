"""Shows the small world: drawn scenes with their captions, as one picture or as videos with sound.

    python -m benchmarks.small_world.show SHEET.png [--count 12] [--seed 0]
    python -m benchmarks.small_world.show FOLDER [--count 12] [--seed 0]

A row of the picture is a scene, five frames from the first to the last. The folder gets an .mp4 a scene, named by its caption.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.small_world.film import CLIP, frames, sound
from benchmarks.small_world.scene import caption, draw_scene
from cosmos3_jax import result_files

SAMPLE_RATE = 16_000
SHOWN = 5  # frames in a row of the sheet
SPACE = 4  # pixels between them
LINE = 18  # the height of a caption


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a .png or .webp, or a folder")
    parser.add_argument("--count", type=int, default=12, help="of scenes (12)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (0)")
    arguments = parser.parse_args(argv)
    random = np.random.default_rng(arguments.seed)
    scenes = [draw_scene(random) for _ in range(arguments.count)]
    films = [(caption(scene, random), frames(scene, random)) for scene in scenes]
    if arguments.out.suffix:
        sheet(films).save(arguments.out)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, (scene, (text, film_thwc)) in enumerate(zip(scenes, films, strict=True)):
        wave_cn = sound(scene, round(SAMPLE_RATE * len(film_thwc) / CLIP.fps), SAMPLE_RATE)
        path = arguments.out / f"{number:02} {text.rstrip('.')}.mp4"
        result_files.write(path, film_thwc, CLIP.fps, result_files.Sound(wave_cn, SAMPLE_RATE))
        print(path)


def sheet(films: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """Captions and films, uint8 [t, h, w, 3] and all of one size, below each other in two columns."""
    _, height, width, _ = films[0][1].shape
    column, row = SHOWN * (width + SPACE) + 3 * SPACE, LINE + height + 2 * SPACE
    picture = Image.new("RGB", (2 * column, -(-len(films) // 2) * row), "white")
    pen = ImageDraw.Draw(picture)
    for number, (text, film_thwc) in enumerate(films):
        left, top = number % 2 * column + 2 * SPACE, number // 2 * row
        pen.text((left, top + SPACE), text, fill="black")
        for place, shown in enumerate(np.linspace(0, len(film_thwc) - 1, SHOWN).round().astype(int)):
            picture.paste(Image.fromarray(film_thwc[shown]), (left + place * (width + SPACE), top + LINE))
    return picture


if __name__ == "__main__":
    main()

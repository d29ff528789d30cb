"""How good the judge is: of rendered scenes, damaged as a lossy autoencoder or a file would, how many it tells right.

    python -m benchmarks.small_world.validate [--count 500]

A scene is right if all of it is: shape, colour, direction, size and speed of each thing, and the background. Then what the
judge makes of films that show no scene: how often shape, colour and direction are those of a scene that was drawn for it.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from benchmarks.small_world.film import CLIP, RGB, background, frames
from benchmarks.small_world.judge import look, right
from benchmarks.small_world.scene import Scene, draw_scene
from cosmos3_jax import media, result_files

Damage = Callable[[np.ndarray, Generator], np.ndarray]
"""uint8 [t, h, w, 3] to the same."""


def each(change: Callable[[Image.Image], Image.Image]) -> Damage:
    """The same for each frame."""
    return lambda film_thwc, _: np.stack([np.asarray(change(Image.fromarray(frame))) for frame in film_thwc])


def noisy(film_thwc: np.ndarray, random: Generator) -> np.ndarray:
    """Noise of a deviation of 8."""
    noise = random.standard_normal(film_thwc.shape, np.float32)
    return np.clip(np.rint(film_thwc + 8 * noise), 0, 255).astype(np.uint8)


def shifted(film_thwc: np.ndarray, random: Generator) -> np.ndarray:
    """Each channel 15 brighter or darker."""
    return np.clip(film_thwc + random.choice([-15, 15], 3), 0, 255).astype(np.uint8)


def coarse(image: Image.Image) -> Image.Image:
    """Of half the size, and back."""
    width, height = image.size
    return image.resize((width // 2, height // 2), Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR)


def jpeg(image: Image.Image) -> Image.Image:
    """Of quality 40."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file)


def h264(film_thwc: np.ndarray, _: Generator) -> np.ndarray:
    """Written as a result and read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        result_files.write(path, film_thwc, CLIP.fps)
        return np.stack([np.asarray(frame) for frame in media.open_clip(path, len(film_thwc))])


blurred = each(lambda image: image.filter(ImageFilter.GaussianBlur(1.5)))

DAMAGES: dict[str, Damage] = {
    "clean": lambda film_thwc, _: film_thwc,
    "blur of deviation 1.5": blurred,
    "noise of deviation 8": noisy,
    "JPEG of quality 40": each(jpeg),
    "half the size and back": each(coarse),
    "colours shifted by 15": shifted,
    "H.264": h264,
    "blur, shift and noise": lambda film_thwc, random: noisy(shifted(blurred(film_thwc, random), random), random),
}


def blobs(random: Generator) -> np.ndarray:
    """One soft spot of a colour of the world, that wanders at random."""
    y, x = np.mgrid[:128, :128]
    path_t2 = random.uniform(30, 98, 2) + np.cumsum(random.normal(0, 2.5, (25, 2)), axis=0)
    far_thw = (x - path_t2[:, :1, None]) ** 2 + (y - path_t2[:, 1:, None]) ** 2
    amount_thwc = np.exp(-far_thw / 2 / random.uniform(6, 14) ** 2)[..., None]
    behind = background(str(random.choice(["plain", "striped"])), 128, 128)
    return (behind + amount_thwc * (np.array(RGB[str(random.choice(list(RGB)))]) - behind)).astype(np.uint8)


def clouds(random: Generator) -> np.ndarray:
    """Coloured noise, as smooth as random weights make it."""
    small = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
    frame = np.asarray(small.resize((128, 128), Image.Resampling.BICUBIC))
    return np.clip(frame + 20 * random.standard_normal((25, 1, 1, 3)), 0, 255).astype(np.uint8)


def another(random: Generator) -> np.ndarray:
    """A scene, but another."""
    return frames(draw_scene(random), random)


def swapped(random: Generator) -> np.ndarray:
    """A scene, its frames in disorder."""
    return random.permutation(another(random))


NO_SCENES: dict[str, Callable[[Generator], np.ndarray]] = {
    "noise": lambda random: random.integers(0, 256, (25, 128, 128, 3), np.uint8),
    "clouds": clouds,
    "an empty background": lambda random: np.repeat(background("striped", 128, 128)[None], 25, axis=0),
    "wandering soft spots": blobs,
    "frames in disorder": swapped,
    "another scene": another,
}


def accuracy(damage: Damage, count: int, things: int, seed: int = 0) -> tuple[float, list[Scene]]:
    """The share of scenes of so many things of which all is right, and the scenes that are not."""
    random, wrong = np.random.default_rng(seed), []
    drawn = 0
    while drawn < count:
        scene = draw_scene(random)
        if len(scene.things) == things:
            drawn += 1
            film_thwc = damage(frames(scene, random), random)
            if not right(scene, look(film_thwc))["all"]:
                wrong.append(scene)
    return 1 - len(wrong) / count, wrong


def mistaken(make: Callable[[Generator], np.ndarray], count: int, seed: int = 0) -> dict[str, float]:
    """How often a film that does not show a scene of one thing is taken for it, in each of its attributes."""
    random, total = np.random.default_rng(seed), dict.fromkeys(("shape", "colour", "direction", "all"), 0.0)
    for _ in range(count):
        scene = draw_scene(random)
        told = Scene(tuple(scene.things[:1]))
        answers = right(told, look(make(random)))
        for name in total:
            total[name] += answers[name] / count
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="of scenes, for each row (500)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    print("| damage | one thing | two things |\n|---|---|---|")
    for name, damage in DAMAGES.items():
        shares = [accuracy(damage, arguments.count, things) for things in (1, 2)]
        print(f"| {name} | {shares[0][0]:.1%} | {shares[1][0]:.1%} |", flush=True)
    print("\n| what shows no such scene | shape | colour | direction | all |\n|---|---|---|---|---|")
    for name, make in NO_SCENES.items():
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in mistaken(make, arguments.count).values())} |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

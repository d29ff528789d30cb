"""The prompts that a model is measured with: 40 of combinations that were trained on, 20 of those that were held out.

They are always the same. Shapes, colours and directions are as evenly there as what is held out lets them; the 17 combinations
that are held out all are.
"""

import collections
import dataclasses
import functools
import itertools

import numpy as np
from numpy.random import Generator

from benchmarks.small_world.film import frames
from benchmarks.small_world.scene import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Scene,
    Thing,
    caption,
    draw_scene,
    filled,
    is_held_out,
    read,
)

SEED = 60
SEEN, OF_TWO, HELD_OUT = 40, 4, 20


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption, and the scene that its first frame is of; the scene has in it what the caption leaves free."""

    text: str
    scene: Scene
    held_out: bool
    seed: int

    @property
    def told(self) -> Scene:
        """What must be seen."""
        return read(self.text)

    def first_frame(self) -> np.ndarray:
        """Where a film may begin, for image-to-video: uint8 [h, w, 3]."""
        return self.film()[0]

    def film(self) -> np.ndarray:
        """How it may go on: uint8 [t, h, w, 3]."""
        return frames(self.scene, np.random.default_rng([SEED, self.seed]))


@functools.cache
def prompts() -> tuple[Prompt, ...]:
    """All 60: of one thing, of two, held out."""
    random = np.random.default_rng(SEED)
    singles = [Scene((Thing(*values),)) for values in itertools.product(SHAPES, COLOURS, DIRECTIONS)]
    held_out = [scene for scene in singles if is_held_out(scene)]
    scenes = balanced([scene for scene in singles if not is_held_out(scene)], SEEN - OF_TWO, random)
    drawn = (draw_scene(random) for _ in itertools.count())
    scenes += itertools.islice((scene for scene in drawn if len(scene.things) == 2), OF_TWO)
    scenes += held_out + balanced(held_out, HELD_OUT - len(held_out), random)
    whole = [filled(scene, random) for scene in scenes]
    return tuple(Prompt(caption(scene, random), scene, is_held_out(scene), seed) for seed, scene in enumerate(whole))


def balanced(scenes: list[Scene], count: int, random: Generator) -> list[Scene]:
    """So many of the scenes of one thing, in which shapes, colours and directions are about as often as each other."""
    left = [scenes[place] for place in random.permutation(len(scenes))]
    often: collections.Counter[str] = collections.Counter()
    chosen = []
    for _ in range(count):
        best = min(left, key=lambda scene: sum(often[value] ** 2 for value in _values(scene)))
        often.update(_values(best))
        left.remove(best)
        chosen.append(best)
    return chosen


def _values(scene: Scene) -> tuple[str, str, str]:
    return scene.things[0].shape, scene.things[0].colour, scene.things[0].direction

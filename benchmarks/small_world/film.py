"""Pictures and sounds of a scene. All lengths are in pixels of a picture of 128x128; others are scaled to their shorter side.

A shape is a disc, or a star of some points that has straight edges from tip to notch: squares and triangles are stars too, with
shallow notches. So the distance of a pixel from the nearest edge has one formula, and with it the share of the pixel that is
covered: edges are smooth at any place without drawing larger first.
"""

import dataclasses
import functools
import math

import numpy as np
from numpy.random import Generator

from benchmarks.small_world.scene import Scene, Thing

RGB = {
    "red": (226, 52, 48),
    "green": (52, 186, 84),
    "blue": (44, 106, 240),
    "yellow": (250, 204, 52),
    "white": (246, 244, 238),
    "purple": (172, 62, 214),
}
BACKGROUND: dict[str | None, tuple] = {  # the two grays of the stripes
    "plain": ((64, 65, 70), (64, 65, 70)),
    "striped": ((51, 52, 57), (77, 78, 83)),
}
STRIPE = 16  # a stripe's width along either side; they are diagonal
DIAMETER: dict[str | None, float] = {"small": 30.0, "large": 44.0}
PIXELS_PER_SECOND: dict[str | None, float] = {"slow": 24.0, "fast": 56.0}
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}  # (x, y), y downwards
PITCH = {"ball": 300, "square": 400, "triangle": 500, "star": 600}  # Hz; multiples of 25, so that each 1/25 s is the same
HARMONICS = 0.4, 0.15, 0.05  # a peak of 0.48
GAP = 4.0  # between two things
TRIES = 64  # to place two things apart


@dataclasses.dataclass(frozen=True)
class Clip:
    """The size of a film."""

    num_frames: int = 25
    height: int = 128
    width: int = 128
    fps: float = 24.0

    @property
    def scale(self) -> float:
        """Pixels for each of 128."""
        return min(self.height, self.width) / 128


CLIP = Clip()


@dataclasses.dataclass(frozen=True)
class Outline:
    """A star, or a disc if it has no points. Radii are in diameters of a thing; areas of the four are alike to the eye."""

    outer: float  # from the centre to the tips, or of the disc
    points: int = 0
    inner: float = 0.0  # from the centre to the notches
    turn: float = -math.pi / 2  # of a tip: upwards

    @property
    def area(self) -> float:
        """In squares of a thing's diameter."""
        return (
            self.points * math.sin(math.pi / self.points) * self.outer * self.inner if self.points else math.pi * self.outer**2
        )


OUTLINES = {
    "ball": Outline(0.5),
    "square": Outline(0.64, 4, 0.64 * math.cos(math.pi / 4), math.pi / 4),
    "triangle": Outline(0.68, 3, 0.34),
    "star": Outline(0.70, 5, 0.28),
}


def frames(scene: Scene, random: Generator, clip: Clip = CLIP) -> np.ndarray:
    """The scene as uint8 [t, h, w, 3]. `random` places the things, as `paths` says.

    Raises KeyError for a scene that leaves something free; `scene.filled` draws what is.
    """
    film_thwc = np.repeat(background(scene.background, clip.height, clip.width)[None], clip.num_frames, axis=0)
    for thing, path_t2 in zip(scene.things, paths(scene, random, clip), strict=True):
        _paint(film_thwc, thing, path_t2, clip)
    return film_thwc


def paths(scene: Scene, random: Generator, clip: Clip = CLIP) -> np.ndarray:
    """Where the centre of each thing is, (x, y) in pixels from the upper left corner: [things, t, 2].

    A thing stays in the picture for the whole clip; if the way is too long for it, it begins at an edge. Two things stay
    apart, or, if they could not be placed so, as far as they could be.
    """
    seconds_t = np.arange(clip.num_frames) / clip.fps
    picture_2 = np.array([clip.width, clip.height])
    tried = []
    for thing in scene.things:
        radius, speed = _radius(thing, clip), 0.0 if thing.direction == "still" else PIXELS_PER_SECOND[thing.speed] * clip.scale
        way_t2 = seconds_t[:, None] * speed * np.array(STEP[thing.direction])
        least_2 = radius - np.minimum(way_t2[-1], 0)
        spare_2 = np.maximum(picture_2 - radius - np.maximum(way_t2[-1], 0) - least_2, 0)
        start_n2 = np.clip(least_2, radius, picture_2 - radius) + random.random((TRIES, 2)) * spare_2
        tried.append(start_n2[:, None] + way_t2)
    if len(tried) == 1:
        return tried[0][:1]
    apart_n = np.linalg.norm(tried[0] - tried[1], axis=-1).min(axis=-1)
    enough_n = apart_n >= sum(_radius(thing, clip) for thing in scene.things) + GAP * clip.scale
    chosen = np.argmax(enough_n) if enough_n.any() else np.argmax(apart_n)
    return np.stack([path_nt2[chosen] for path_nt2 in tried])


def sound(scene: Scene, num_samples: int, sample_rate: int = 16_000, channels: int = 2) -> np.ndarray:
    """A tone as high as the shape of the first thing says, float32 [channels, n] in [-1, 1], all channels alike."""
    phase_n = np.arange(num_samples) * (2 * math.pi * PITCH[scene.things[0].shape] / sample_rate)
    wave_n = sum(loud * np.sin(times * phase_n) for times, loud in enumerate(HARMONICS, 1))
    return np.tile(np.asarray(wave_n, np.float32), (channels, 1))


def coverage(shape: str, diameter: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The share of a pixel, in [0, 1], that a thing covers, whose centre is `x` and `y` pixels before that of the pixel."""
    outline = OUTLINES[shape]
    squared = x * x + y * y
    if not outline.points:
        return np.clip(outline.outer * diameter - np.sqrt(squared) + 0.5, 0, 1)
    # All points are alike: seen from the nearest tip, a pixel lies so far along its axis, and so far to the side.
    turns = [outline.turn + 2 * math.pi * point / outline.points for point in range(outline.points)]
    along = functools.reduce(np.maximum, (math.cos(turn) * x + math.sin(turn) * y for turn in turns))
    aside = np.sqrt(np.maximum(squared - along * along, 0))
    half = math.pi / outline.points
    normal = np.array([outline.inner * math.sin(half), outline.outer - outline.inner * math.cos(half)])
    normal /= np.linalg.norm(normal)
    return np.clip(0.5 - (along - outline.outer * diameter) * normal[0] - aside * normal[1], 0, 1)


@functools.lru_cache(maxsize=8)
def background(name: str | None, height: int, width: int) -> np.ndarray:
    """A background, uint8 [h, w, 3], the same each time; not to be written to."""
    dark, light = np.array(BACKGROUND[name])
    picture_hwc = np.rint(dark + stripes(height, width)[..., None] * (light - dark)).astype(np.uint8)
    picture_hwc.flags.writeable = False
    return picture_hwc


def stripes(height: int, width: int) -> np.ndarray:
    """How much of each pixel is of the light stripes, in [0, 1]: [h, w]."""
    wide = STRIPE * min(height, width) / 128
    along_hw = (np.arange(height)[:, None] + np.arange(width) + 1) / wide
    return np.clip(0.5 + (np.abs(along_hw % 2 - 1) - 0.5) * wide / math.sqrt(2), 0, 1)


def _radius(thing: Thing, clip: Clip) -> float:
    """Of the circle around it, in pixels."""
    return OUTLINES[thing.shape].outer * _diameter(thing, clip)


def _diameter(thing: Thing, clip: Clip) -> float:
    return DIAMETER[thing.size] * clip.scale


def _paint(film_thwc: np.ndarray, thing: Thing, path_t2: np.ndarray, clip: Clip) -> None:
    """Paints a thing over each frame. Pixels beyond an edge become pixels of the edge, to which the same is done twice."""
    reach = math.ceil(_radius(thing, clip)) + 1
    box = np.arange(-reach, reach + 1)
    corner_t2 = np.floor(path_t2).astype(int)
    x_tp = np.clip(corner_t2[:, :1] + box, 0, clip.width - 1)
    y_tp = np.clip(corner_t2[:, 1:] + box, 0, clip.height - 1)
    from_x_tp = (x_tp + 0.5 - path_t2[:, :1]).astype(np.float32)
    from_y_tp = (y_tp + 0.5 - path_t2[:, 1:]).astype(np.float32)
    covered_tpq = coverage(thing.shape, _diameter(thing, clip), from_x_tp[:, None, :], from_y_tp[:, :, None])
    where = np.arange(len(path_t2))[:, None, None], y_tp[:, :, None], x_tp[:, None, :]
    behind_tpqc = film_thwc[where]
    painted_tpqc = behind_tpqc + covered_tpq[..., None] * (np.array(RGB[thing.colour], np.float32) - behind_tpqc)
    film_thwc[where] = np.rint(painted_tpqc)

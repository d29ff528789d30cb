"""What is in a film of the small world, found in its pixels and samples alone, to say whether a model did what it was told.

It wants clear answers: what is missing in more than a fifth of the frames, has a rival of its own colour, becomes another on
the way or is between two answers has none, and that counts as wrong. What is faint, small or of no colour of this world is not
seen.

A colour is a direction in RGB, seen from the gray of the backgrounds, so that a soft edge between the two is of the same
colour. The things are the largest connected parts of each colour. A shape is compared with soft pictures of all four.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from benchmarks.small_world.film import BACKGROUND, DIAMETER, OUTLINES, PIXELS_PER_SECOND, RGB, STEP, coverage, stripes
from benchmarks.small_world.scene import COLOURS, SHAPES, Scene

GRAY = np.array(BACKGROUND["plain"][0], np.float32)
AWAY_K3 = np.array([RGB[colour] for colour in COLOURS], np.float32) - GRAY
FAR_K = np.linalg.norm(AWAY_K3, axis=-1)
COSINE = 0.85  # with the nearest colour, of the pixels that are of a colour
HALF = 0.45  # of the way from gray to a colour: where a thing ends
FAINT = 0.2  # of a thing's colour: what has less is of the stripes, or noise
SMALLEST = 60.0  # square pixels; the small star has 518
SECOND = 0.4  # of the largest part: another of the same colour, which leaves open which one is meant
NEIGHBOURS = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3])  # of a pixel, in its own frame
PRESENT = 0.8  # of the frames show a thing; what fewer show is no thing
STRAY = 0.2  # of the frames; what fewer show is nothing
NEARER = 0.75  # at most, the distance to the best answer over that to the next
GRID = np.linspace(-1.05, 1.05, 25)  # where shapes are compared, in roots of a thing's area, from its centre
BLURS = 0.0, 0.06, 0.12, 0.18  # deviations, in the same unit
ALIKE, AHEAD = 0.94, 0.006  # of the correlation with the best shape, and how much it is above the next
THIRDS = 3  # of a film in which a thing must have the same shape
STILL = 8.0  # pixels a second (of 128x128)
SLOWEST = 14.0
FASTEST = 84.0
SIDEWAYS = math.tan(math.radians(25))
UNEVEN = 2.5  # pixels by which the centre is off an even motion, root mean square
SILENT = 0.01
ZOOM = 4  # steps of frequency for each that a sound's length tells apart
FUNDAMENTAL = 0.2  # of the strongest harmonic, at least
CLEAR = 0.6  # of a sound's energy is in its tone and the harmonics


@dataclasses.dataclass(frozen=True)
class Seen:
    """A thing in a film, each answer None where there is no clear one. Lengths are pixels of a picture of 128x128."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    size: str | None = None
    speed: str | None = None  # also None for what stands still
    velocity: tuple[float, float] | None = None  # (x, y) a second


@dataclasses.dataclass(frozen=True)
class View:
    """What is seen in a film."""

    things: tuple[Seen, ...]
    background: str | None  # None: neither


def look(frames_thwc: np.ndarray, fps: float = 24.0) -> View:
    """What is in a film, uint8 [t, h, w, 3]; of one frame all but motion."""
    scale = min(frames_thwc.shape[1:3]) / 128
    pixels_thwc = frames_thwc.astype(np.float32)
    labels_thw = _labels(pixels_thwc)
    things = []
    for number in np.unique(labels_thw[labels_thw >= 0]):
        part_thw, clear_t = largest_part(labels_thw == number, SMALLEST * scale**2)
        if clear_t.mean() >= PRESENT:
            others_thw = (labels_thw >= 0) & (labels_thw != number)
            things.append(_seen(pixels_thwc, part_thw, others_thw, np.flatnonzero(clear_t), fps, scale))
        elif part_thw.any(axis=(1, 2)).mean() > STRAY:
            things.append(Seen())
    return View(tuple(things), _background(pixels_thwc, labels_thw))


def right(told: Scene, view: View) -> dict[str, bool]:
    """Whether it is seen what a caption tells: by "shape", "colour", "direction", what else is told, and "all" of these.

    Of two things both must be right. If there are more or fewer things than told, nothing of them is right.
    """
    asked = [name for name in ("shape", "colour", "direction", "size", "speed") if any(getattr(x, name) for x in told.things)]
    best = dict.fromkeys(asked, False)
    if len(view.things) == len(told.things):
        for order in itertools.permutations(view.things):
            answers = {
                name: all(getattr(x, name) in (None, getattr(y, name)) for x, y in zip(told.things, order, strict=True))
                for name in asked
            }
            best = max(best, answers, key=lambda each: sum(each.values()))
    if told.background:
        best["background"] = view.background == told.background
    return best | {"all": all(best.values())}


def pitch(wave_cn: np.ndarray, sample_rate: int) -> float | None:
    """The pitch of a waveform [channels, n] in Hz; None for silence, noise and what else has no clear tone, or is too short."""
    wave_n = wave_cn.mean(axis=0) - wave_cn.mean()
    if len(wave_n) < sample_rate / 10 or not np.isfinite(wave_n).all() or np.abs(wave_n).max() < SILENT:
        return None
    bins = ZOOM * len(wave_n)
    loud_f = np.abs(np.fft.rfft(wave_n * np.hanning(len(wave_n)), bins))
    low, high = (round(hertz * bins / sample_rate) for hertz in (50, 4000))
    strongest = low + int(np.argmax(loud_f[low:high]))
    # The strongest may be a harmonic: a third or half of it is the pitch, if that is there too.
    lower = [_peak(loud_f, round(strongest / part)) for part in (3, 2)]
    peak = next((place for place in lower if place > low and loud_f[place] > FUNDAMENTAL * loud_f[strongest]), strongest)
    place_f = np.arange(len(loud_f))
    off_f = np.abs((place_f + peak / 2) % peak - peak / 2)  # the next harmonic
    if (loud_f[(place_f > peak / 2) & (off_f < 2.5 * ZOOM)] ** 2).sum() < CLEAR * (loud_f**2).sum():
        return None
    before, at, after = np.log(loud_f[peak - 1 : peak + 2])
    return float(peak + (before - after) / 2 / (before - 2 * at + after)) * sample_rate / bins


def _peak(loud_f: np.ndarray, place: int) -> int:
    """The loudest frequency near a place, within the width that the window gives to a tone."""
    first = max(place - 2 * ZOOM, 0)
    return first + int(np.argmax(loud_f[first : place + 2 * ZOOM + 1]))


def semitones(pitch: float, other: float) -> float:
    """How far `other` is above `pitch`."""
    return 12 * math.log2(other / pitch)


def largest_part(mask_thw: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest 4-connected part of each frame, of at least `least` pixels, as a mask; and the frames [t] where there is one
    that has no rival.
    """
    parts_thw, _ = ndimage.label(mask_thw, NEIGHBOURS)
    kept_thw, clear_t = np.zeros_like(mask_thw), np.zeros(len(mask_thw), bool)
    for t, parts_hw in enumerate(parts_thw):
        numbers, sizes = np.unique(parts_hw[parts_hw > 0], return_counts=True)
        second, first = np.sort(np.append(sizes, (0, 0)))[-2:]
        if first >= least:
            kept_thw[t] = parts_hw == numbers[np.argmax(sizes)]
            clear_t[t] = second < SECOND * first
    return kept_thw, clear_t


def _labels(pixels_thwc: np.ndarray) -> np.ndarray:
    """The number of each pixel's colour, -1 for the background and what is between colours: int [t, h, w]."""
    away_thwc = pixels_thwc - GRAY
    far_thw = np.sqrt(np.einsum("thwc,thwc->thw", away_thwc, away_thwc))
    coloured_thw = far_thw > HALF * FAR_K.min()  # few are, and the rest is for these
    along_nk = away_thwc[coloured_thw] @ (AWAY_K3 / FAR_K[:, None]).T
    best_n, along_n = np.argmax(along_nk, axis=-1), np.max(along_nk, axis=-1)
    sure_n = (along_n > HALF * FAR_K[best_n]) & (along_n > COSINE * far_thw[coloured_thw])
    labels_thw = np.full(far_thw.shape, -1)
    labels_thw[coloured_thw] = np.where(sure_n, best_n, -1)
    return labels_thw


def _seen(
    pixels_thwc: np.ndarray, part_thw: np.ndarray, others_thw: np.ndarray, clear: np.ndarray, fps: float, scale: float
) -> Seen:
    """Measures one thing, of which `part_thw` is roughly it, in the frames `clear`."""
    soft = 1 + round(3 * scale)  # pixels that its edge may reach beyond it
    rows, columns = (slice(max(at.min() - soft, 0), at.max() + soft + 1) for at in np.nonzero(part_thw.any(axis=0)))
    pixels_thwc, part_thw, others_thw = (each[clear, rows, columns] for each in (pixels_thwc, part_thw, others_thw))
    colour_3 = np.median(pixels_thwc[part_thw], axis=0)
    distance_k = np.linalg.norm(AWAY_K3 + GRAY - colour_3, axis=-1)
    nearest, next_ = np.sort(distance_k)[:2]
    away_3 = colour_3 - GRAY
    amount_thw = np.clip((pixels_thwc - GRAY) @ (away_3 / (away_3 @ away_3)), 0, 1)
    amount_thw = np.where(others_thw | (amount_thw < FAINT) | ~_grown(part_thw, soft), 0, amount_thw)
    area_t = amount_thw.sum(axis=(1, 2))
    x_t = (amount_thw.sum(axis=1) @ (np.arange(amount_thw.shape[2]) + 0.5)) / area_t
    y_t = (amount_thw.sum(axis=2) @ (np.arange(amount_thw.shape[1]) + 0.5)) / area_t
    side = float(np.sqrt(np.median(area_t)))
    around_t = _around(amount_thw, x_t, y_t, side)
    shape = _shape(np.median(around_t, axis=0))
    if any(_shape(np.median(part, axis=0)) != shape for part in np.array_split(around_t, min(THIRDS, len(around_t)))):
        shape = None
    diameter = side / math.sqrt(OUTLINES[shape].area) / scale if shape else None
    path_t2 = np.stack([x_t + columns.start, y_t + rows.start], axis=1) / scale
    velocity, direction, speed = _motion(path_t2, clear / fps)
    return Seen(
        COLOURS[int(np.argmin(distance_k))] if nearest < NEARER * next_ else None,
        shape,
        direction,
        _nearest(DIAMETER, diameter),
        speed,
        velocity,
    )


def _grown(mask_thw: np.ndarray, pixels: int) -> np.ndarray:
    """The mask and what is that near to it, up and down and sideways."""
    for _ in range(pixels):
        padded = np.pad(mask_thw, ((0, 0), (1, 1), (1, 1)))
        tall = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
        mask_thw = tall[:, :, :-2] | tall[:, :, 1:-1] | tall[:, :, 2:]
    return mask_thw


def _around(amount_thw: np.ndarray, x_t: np.ndarray, y_t: np.ndarray, side: float) -> np.ndarray:
    """Each frame at GRID around its centre, between its pixels: [t, GRID, GRID]."""
    padded = np.pad(amount_thw, ((0, 0), (1, 1), (1, 1)))
    at = np.arange(len(padded))[:, None, None]

    def places(centre_t: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        place = np.clip(centre_t[:, None] + side * GRID + 0.5, 0, size + 0.999)
        return place.astype(int), place % 1

    (left, right_share), (top, below_share) = places(x_t, amount_thw.shape[2]), places(y_t, amount_thw.shape[1])
    left, right_share, top, below_share = left[:, None], right_share[:, None], top[..., None], below_share[..., None]
    upper = padded[at, top, left] * (1 - right_share) + padded[at, top, left + 1] * right_share
    lower = padded[at, top + 1, left] * (1 - right_share) + padded[at, top + 1, left + 1] * right_share
    return upper * (1 - below_share) + lower * below_share


@functools.cache
def _templates() -> np.ndarray:
    """Soft pictures of all shapes, as `_around` makes them, of mean 0 and length 1: [shapes, blurs, GRID * GRID]."""
    place = np.arange(160) + 0.5 - 80
    pictures = []
    for shape, blur in itertools.product(SHAPES, BLURS):
        picture = Image.fromarray(np.uint8(255 * coverage(shape, 64, place[None], place[:, None])))
        side = 64 * math.sqrt(OUTLINES[shape].area)
        soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur * side)), np.float32)[None] / 255
        pictures.append(_around(soft, np.array([80.0]), np.array([80.0]), side)[0])
    return np.stack([_normalized(picture) for picture in pictures]).reshape(len(SHAPES), len(BLURS), -1)


def _normalized(picture: np.ndarray) -> np.ndarray:
    values = picture.reshape(-1) - picture.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


def _shape(picture: np.ndarray) -> str | None:
    """The shape in a picture at GRID, if it is clearly one."""
    alike_s = (_templates() @ _normalized(picture)).max(axis=1)
    next_, best = np.sort(alike_s)[-2:]
    return SHAPES[int(np.argmax(alike_s))] if best > ALIKE and best - next_ > AHEAD else None


def _motion(path_t2: np.ndarray, seconds_t: np.ndarray) -> tuple[tuple[float, float] | None, str | None, str | None]:
    """Velocity, direction and speed of an even motion along an axis."""
    if len(path_t2) < 2:
        return None, None, None
    line = np.polynomial.Polynomial.fit
    fits = [line(seconds_t, path_t2[:, axis], 1) for axis in (0, 1)]
    off_t2 = np.stack([fit(seconds_t) for fit in fits], axis=1) - path_t2
    x, y = (float(fit.deriv()(0)) for fit in fits)
    fast, aside = max(abs(x), abs(y)), min(abs(x), abs(y))
    if np.sqrt((off_t2**2).sum(axis=1).mean()) > UNEVEN:
        return (x, y), None, None
    if math.hypot(x, y) < STILL:
        return (x, y), "still", None
    if not SLOWEST < fast < FASTEST or aside > SIDEWAYS * fast:
        return (x, y), None, None
    step = (int(np.sign(x)), 0) if abs(x) > abs(y) else (0, int(np.sign(y)))
    return (x, y), next(name for name, each in STEP.items() if each == step), _nearest(PIXELS_PER_SECOND, fast)


def _nearest(values: dict[str | None, float], found: float | None) -> str | None:
    """The name of the value that is found, if it is not halfway between two of them or far from all."""
    if found is None:
        return None
    off = {name: abs(math.log(found / value)) for name, value in values.items()}
    best, next_ = sorted(off.values())[:2]
    return min(off, key=lambda name: off[name]) if best < NEARER * next_ and best < 0.5 else None


def _background(pixels_thwc: np.ndarray, labels_thw: np.ndarray) -> str | None:
    """By how much it is brighter where stripes would be light, over how much those are."""
    light_hw = stripes(*labels_thw.shape[1:])
    bare_thw = ~_grown(labels_thw >= 0, 3)
    gray_thw = pixels_thwc @ np.full(3, 1 / 3, np.float32)
    light_thw, dark_thw = bare_thw & (light_hw > 0.99), bare_thw & (light_hw < 0.01)
    if not light_thw.any() or not dark_thw.any():
        return None
    dark, light = (float(np.mean(gray)) for gray in BACKGROUND["striped"])
    contrast = float(gray_thw[light_thw].mean() - gray_thw[dark_thw].mean()) / (light - dark)
    if abs(contrast) < 0.25:
        return "plain"
    return "striped" if 0.5 < contrast < 1.5 else None

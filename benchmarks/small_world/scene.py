"""What there is in the small world, and the sentences that tell of it: a scene to a caption, a caption to what it says.

One or two coloured things move, or stand still, over a gray background. Shape, colour and direction are always told; size,
speed and background are told or not, and what is not told is free. How things look and sound is not here, but in film.py.
"""

import dataclasses
import re

from numpy.random import Generator

SHAPES = "ball", "square", "triangle", "star"
COLOURS = "red", "green", "blue", "yellow", "white", "purple"
DIRECTIONS = "left", "right", "up", "down", "still"
SIZES = "small", "large"
SPEEDS = "slow", "fast"
BACKGROUNDS = "plain", "striped"

WORDS = {  # what is not named here is said by its own name
    "small": ("small", "little"),
    "large": ("large", "big"),
    "slow": ("slowly",),
    "fast": ("fast", "quickly"),
    "left": ("to the left", "left", "from right to left"),
    "right": ("to the right", "right", "from left to right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "still": ("stands still", "does not move", "stays where it is"),
}
VERBS = "moves", "goes", "slides"
BALL_VERBS = "rolls", "moves", "goes"
PLACES = "over", "on", "in front of"
JOINTS = " and ", " while "
TOLD = 0.5  # how often size, speed and background are
TWO = 0.25  # how often two things are drawn, if nothing else is said; fewer stay, for either may be held out
MODULUS = 7  # of the rule of what is held out


@dataclasses.dataclass(frozen=True)
class Thing:
    """A thing, or what is told of it."""

    shape: str
    colour: str
    direction: str
    size: str | None = None  # None: not told
    speed: str | None = None  # None: not told, or it stands still


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two things and what is behind them, or what is told of it."""

    things: tuple[Thing, ...]
    background: str | None = None  # None: not told


def is_held_out(scene: Scene) -> bool:
    """Whether a thing of the scene is one of the 17 in 120 combinations of shape, colour and direction never trained on.

    A sum over a prime that is greater than the number of shapes, of colours and of directions: each two of the three are
    seen together with all values of the third but at most one.
    """
    return any(
        (SHAPES.index(thing.shape) + 2 * COLOURS.index(thing.colour) + 3 * DIRECTIONS.index(thing.direction)) % MODULUS == 1
        for thing in scene.things
    )


def draw_scene(random: Generator, two: float = TWO) -> Scene:
    """A scene to train on: every attribute is as likely as its alternatives, but for what is held out; colours differ."""
    while True:
        colours = random.permutation(COLOURS)[: 1 + (random.random() < two)]
        things = (Thing(_one(SHAPES, random), str(colour), _one(DIRECTIONS, random)) for colour in colours)
        if not is_held_out(scene := Scene(tuple(things))):
            return filled(scene, random)


def filled(scene: Scene, random: Generator) -> Scene:
    """The scene, with what it leaves free drawn at random."""
    things = tuple(
        dataclasses.replace(
            thing,
            size=thing.size or _one(SIZES, random),
            speed=None if thing.direction == "still" else thing.speed or _one(SPEEDS, random),
        )
        for thing in scene.things
    )
    return Scene(things, scene.background or _one(BACKGROUNDS, random))


def caption(scene: Scene, random: Generator) -> str:
    """A sentence that tells of the scene, with other words each time: "A red ball rolls slowly to the right."

    The thing that is named first is the first of the scene. Size, speed and background are told half of the time, where the
    scene has them.
    """
    text = _one(JOINTS, random).join(_clause(thing, random) for thing in scene.things)
    if scene.background and random.random() < TOLD:
        place = f"{_one(PLACES, random)} a {scene.background} background"
        text = f"{text} {place}" if random.random() < 0.75 else f"{place}, {text}"
    return f"{text[0].upper()}{text[1:]}." if random.random() < 0.5 else text


def _clause(thing: Thing, random: Generator) -> str:
    size = f"{_word(thing.size, random)} " if thing.size and random.random() < TOLD else ""
    told = f"a {size}{thing.colour} {thing.shape}"
    if thing.direction == "still":
        return f"{told} {_word('still', random)}"
    how = [_word(thing.direction, random)]
    if thing.speed and random.random() < TOLD:
        how.insert(int(random.integers(2)), _word(thing.speed, random))
    return " ".join([told, _one(BALL_VERBS if thing.shape == "ball" else VERBS, random), *how])


def _word(value: str, random: Generator) -> str:
    return _one(WORDS[value], random)


def _one(values: tuple[str, ...], random: Generator) -> str:
    return values[random.integers(len(values))]


def _either(*values: str) -> str:
    """A pattern for any word of these values."""
    return "|".join(word for value in values for word in WORDS.get(value, (value,)))


MOVING = tuple(direction for direction in DIRECTIONS if direction != "still")
SPEED = rf"(?: ({_either(*SPEEDS)}))?"
CLAUSE = re.compile(
    rf"a (?:({_either(*SIZES)}) )?({_either(*COLOURS)}) ({_either(*SHAPES)}) "
    rf"(?:({_either('still')})|(?:{_either(*{*VERBS, *BALL_VERBS})}){SPEED} ({_either(*MOVING)}){SPEED})"
)
BACKGROUND = rf"(?:{_either(*PLACES)}) a ({_either(*BACKGROUNDS)}) background"
SENTENCE = re.compile(rf"(?:{BACKGROUND}, )?(.*?)(?: {BACKGROUND})?\.?")
VALUES = {word: value for value, words in WORDS.items() for word in words}


def read(text: str) -> Scene:
    """What a caption says; None is what it leaves free. Raises ValueError for a text that is no caption of this world."""
    sentence = SENTENCE.fullmatch(text[:1].lower() + text[1:])
    clauses = [CLAUSE.fullmatch(clause) for clause in re.split(_either(*JOINTS), sentence[2])] if sentence else []
    if not sentence or not all(clauses) or len(clauses) > 2:
        raise ValueError(f"{text!r}: not a caption of the small world, such as 'A red ball rolls slowly to the right.'")
    things = []
    for clause in filter(None, clauses):
        size, colour, shape, still, before, direction, after = clause.groups()
        told = [VALUES[word] if word else None for word in (still or direction, size, before or after)]
        things.append(Thing(shape, colour, str(told[0]), told[1], told[2]))
    return Scene(tuple(things), sentence[1] or sentence[3])

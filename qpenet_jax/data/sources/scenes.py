"""What an image of the procedural set shows and where, and how it is painted.

The geometry comes first and decides the labels; colours and patterns follow.
"""

import colorsys
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float

from qpenet_jax.data.sources.silhouettes import (
    OUTLINES,
    Box,
    Contour,
    Field,
    bounding_box,
    coverage,
    even_angles,
    outline,
    polar,
    rectangle,
    rotation,
)

MAIN_SIZE = (0.36, 0.54)
OTHER_SIZE = (0.16, 0.30)
"""Ranges of the square root of an object's area, in image sides: the main object covers
13 to 29 % of the image, the others, mostly of other classes, 3 to 9 %."""

MAX_TILT = np.deg2rad(25)
MAX_STRETCH = 1.2
OTHER_OBJECTS = (0.35, 0.45, 0.20)
"""Probabilities of 1, 2 and 3 objects besides the main one."""

SAME_CLASS = 0.12
"""Probability that another object repeats the class of the main one."""


class Thing(NamedTuple):
    """Something in a scene: class 0 is clutter. Contours and size in pixels."""

    class_id: int
    contours: list[Contour]
    centre: Float[np.ndarray, "2"]
    size: float
    tilt: float


def scene(rng: np.random.Generator, side: int) -> list[Thing]:
    """Draws the things of one image, back to front."""
    clutter = [_blob(rng, side) for _ in range(rng.integers(2, 5))]
    clutter += [_stick(rng, side) for _ in range(rng.integers(1, 4))]
    occluders = [_stick(rng, side) for _ in range(rng.integers(0, 3))]
    return clutter + _objects(rng, side) + occluders


def _objects(rng: np.random.Generator, side: int) -> list[Thing]:
    count = 2 + rng.choice(len(OTHER_OBJECTS), p=OTHER_OBJECTS)
    ids = rng.integers(1, len(OUTLINES) + 1, count)
    ids[1:][rng.random(count - 1) < SAME_CLASS] = ids[0]
    objects: list[Thing] = []
    for class_id in ids:
        size = side * rng.uniform(*(OTHER_SIZE if objects else MAIN_SIZE))
        centre = _free_place(rng, side, size, objects)
        objects.append(_place(rng, int(class_id), centre, size))
    return [objects[i] for i in rng.permutation(count)]


def _free_place(
    rng: np.random.Generator, side: int, size: float, others: list[Thing]
) -> Float[np.ndarray, "2"]:
    """Returns the roomiest of a few random places: occlusion stays partial."""
    places = rng.uniform(0.45 * size, side - 0.45 * size, (8, 2))
    if not others:
        return places[0]
    gaps = [np.linalg.norm(places - o.centre, axis=1) - o.size / 2 for o in others]
    return places[np.argmax(np.min(gaps, axis=0))]


def _place(
    rng: np.random.Generator, class_id: int, centre: np.ndarray, size: float
) -> Thing:
    """Returns the outline of a class, tilted, stretched, mirrored, of area size**2."""
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)
    stretch = np.sqrt(MAX_STRETCH) ** rng.uniform(-1, 1)
    mirror = rng.choice([-1, 1])
    shape = np.diag([mirror * stretch, 1 / stretch]) @ rotation(tilt) * size
    contours = [contour @ shape + centre for contour in outline(class_id)]
    return Thing(class_id, contours, centre, size, tilt)


def _blob(rng: np.random.Generator, side: int) -> Thing:
    """Draws a smooth shape without a name: a circle with three random harmonics."""
    size = side * rng.uniform(0.15, 0.4)
    angle = even_angles(40)
    radius = np.full(40, 0.5)
    for k in (2, 3, 5):
        radius += rng.uniform(0.03, 0.13) * np.cos(k * angle + rng.uniform(0, 7))
    centre = rng.uniform(0, side, 2)
    return Thing(0, [polar(angle, radius) * size + centre], centre, size, 0.0)


def _stick(rng: np.random.Generator, side: int) -> Thing:
    """Draws a thin bar at any angle."""
    length, width = side * rng.uniform(0.3, 0.9), side * rng.uniform(0.012, 0.035)
    centre, tilt = rng.uniform(0, side, 2), rng.uniform(0, np.pi)
    bar = rectangle(-width / 2, -length / 2, width / 2, length / 2) @ rotation(tilt)
    return Thing(0, [bar + centre], centre, width, tilt)


PATTERN_FIDELITY = 0.95
"""Probability that an object wears the pattern of its class, not a random one.

The set's difficulty: at 0 only the silhouette is left, which a few minutes of training
do not learn; at 1 the pattern narrows the class to two of twenty.
"""

PATTERN_PERIOD = (0.17, 0.28)
"""Period of a pattern, in sizes of the object that wears it."""

PATTERN_TILT = np.deg2rad(12)
"""Standard deviation of the angle between a pattern and its object."""

VIVID = ((0.45, 0.95), 0.55)
MUTED = ((0.05, 0.35), 0.25)
"""Range of saturations and contrast in value, of objects and of all else."""

Planes = Float[np.ndarray, "3 h w"]


# --- Surface patterns: -1..1 over coordinates in periods. ----------------------------


def _wave(x: Field) -> Field:
    """Returns a triangle wave of period 1 between -1 and 1."""
    return 4 * np.abs(x - np.floor(x + 0.5)) - 1


def _dots(u: Field, v: Field) -> Field:
    return 0.65 - np.hypot(_wave(u) + 1, _wave(v) + 1)


def _scales(u: Field, v: Field) -> Field:
    row = np.floor(2 * v)
    along = _wave(u + 0.5 * np.mod(row, 2)) + 1
    return 2 * np.mod(2 * v, 1) - 0.5 * along**2 - 0.4


def _bricks(u: Field, v: Field) -> Field:
    row = np.floor(1.25 * v)
    along = _wave(0.6 * u + 0.5 * np.mod(row, 2))
    return 0.6 - np.maximum(_wave(1.25 * v + 0.5), along * 1.8 - 0.8)


def _blotches(u: Field, v: Field) -> Field:
    a = np.sin(3.1 * u + 1.9 * np.sin(2.3 * v))
    b = np.sin(2.7 * v + 1.9 * np.sin(1.9 * u + 1.0))
    return a + b


PATTERNS: tuple[Callable[[Field, Field], Field], ...] = (
    lambda u, v: _wave(u),  # stripes
    _dots,
    lambda u, v: _wave(u) * _wave(v),  # checks
    lambda u, v: _wave(np.hypot(u, v)),  # rings
    _blotches,
    lambda u, v: _wave(u + 0.5 * np.abs(_wave(v / 1.5))),  # zigzag
    lambda u, v: np.maximum(_wave(u), _wave(v)) - 0.5,  # grid
    _scales,
    lambda u, v: _wave(np.arctan2(v, u) * (5 / np.pi)),  # rays
    _bricks,
)


def pattern_of(class_id: int) -> int:
    """Returns the index of the pattern of a class: folds 0, 2 and 1, 3 share five."""
    fold, place = divmod(class_id - 1, 5)
    return fold % 2 * 5 + (place + fold) % 5


# --- Painting -----------------------------------------------------------------------


def _texture(rng: np.random.Generator, which: int, box: Box, thing: Thing) -> Field:
    """Returns a pattern of random scale and angle over a box, 0..1, [h, w]."""
    period = rng.uniform(*PATTERN_PERIOD) * thing.size
    turn = rotation(thing.tilt + rng.normal(0, PATTERN_TILT)) / period
    turn = turn.astype(np.float32)
    left, top = (float(c) - 0.5 for c in thing.centre)
    x = np.arange(box.left, box.right, dtype=np.float32) - left
    y = np.arange(box.top, box.bottom, dtype=np.float32)[:, None] - top
    u = x * turn[0, 0] + y * turn[1, 0]
    v = x * turn[0, 1] + y * turn[1, 1]
    # A pattern crosses from dark to light within about a pixel.
    return (0.5 + 0.25 * period * PATTERNS[which](u, v)).clip(0, 1)


def _two_colours(
    rng: np.random.Generator, saturation: tuple[float, float], contrast: float
) -> Float[np.ndarray, "2 3 1 1"]:
    """Draws a dark and a light colour of independent hues, in random order."""
    light = rng.uniform(0.75, 1.0)
    values = (light, light * (1 - contrast))
    colours = [
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), value)
        for value in values
    ]
    return rng.permutation(np.array(colours, np.float32))[..., None, None]


def paint(canvas: Planes, rng: np.random.Generator, thing: Thing) -> None:
    """Paints a thing over the canvas: a pattern of two colours, and a dark rim."""
    box = bounding_box(thing.contours, canvas.shape[1])
    if box.top >= box.bottom or box.left >= box.right:
        return
    alpha = coverage(thing.contours, box)
    which = int(rng.integers(len(PATTERNS)))
    if thing.class_id and rng.random() < PATTERN_FIDELITY:
        which = pattern_of(thing.class_id)
    texture = _texture(rng, which, box, thing)
    first, second = _two_colours(rng, *(VIVID if thing.class_id else MUTED))
    paint = first + texture * (second - first)
    if thing.class_id:
        paint *= 0.5 + 0.5 * cv2.blur(alpha, (5, 5), borderType=cv2.BORDER_CONSTANT)
    area = canvas[:, box.top : box.bottom, box.left : box.right]
    area += alpha * (paint - area)


def backdrop(rng: np.random.Generator, side: int) -> Planes:
    """Paints two muted colours mixed by smooth noise and a faint, coarse pattern."""
    noise = np.zeros((side, side), np.float32)
    for cells, weight in ((3, 0.6), (8, 0.3), (32, 0.25)):
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        noise += weight * cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
    frame = Box(0, 0, side, side)
    centre = rng.uniform(0, side, 2)
    surface = Thing(0, [], centre, side * rng.uniform(0.2, 0.5), rng.uniform(0, 7))
    pattern = _texture(rng, int(rng.integers(len(PATTERNS))), frame, surface)
    mix = (0.5 + 0.5 * noise + rng.uniform(0, 0.35) * (pattern - 0.5)).clip(0, 1)
    first, second = _two_colours(rng, *MUTED)
    return first + mix * (second - first)

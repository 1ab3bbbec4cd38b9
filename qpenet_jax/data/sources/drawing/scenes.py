"""What an image of the procedural set shows and where: geometry alone.

It decides the labels; colours and patterns come later (painting.py).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qpenet_jax.data.sources.drawing.outlines import (
    OUTLINES,
    Contour,
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
    """Tilts, stretch, mirror and moves the outline of a class; its area is size**2."""
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

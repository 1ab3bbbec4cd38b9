"""A procedural few-shot segmentation set: the embedded default, nothing to download.

Twenty silhouettes in four folds of five, laid out as PASCAL-5i. Colour says nothing
about the class; the outline does, and, most of the time, a surface pattern that each
class shares with one class of another fold.
"""

import colorsys
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from qpenet_jax.errors import InputError

PATTERN_FIDELITY = 0.95
"""Probability that an object wears the pattern of its class, not a random one.

The set's difficulty: at 0 only the silhouette is left, which a few minutes of training
do not learn; at 1 the pattern narrows the class to two of twenty.
"""

SHAPE_SIZE = (0.28, 0.46)
"""Range of the square root of an object's area, in image sides: 8 to 21 % of it."""

MAX_TILT = np.deg2rad(25)
MAX_STRETCH = 1.2
EXTRA_OBJECTS = (0.45, 0.45, 0.10)
"""Probabilities of 1, 2 and 3 objects besides the first."""

SAME_CLASS = 0.12
"""Probability that a further object repeats the class of the first."""

PERIOD = (0.17, 0.28)
"""Period of a pattern, in sizes of the object that wears it."""

PATTERN_TILT = np.deg2rad(12)
"""Standard deviation of the angle between a pattern and its object."""

VIVID = ((0.45, 0.95), 0.55)
MUTED = ((0.05, 0.35), 0.25)
"""Range of saturations and contrast in value, of objects and of all else."""

GRAIN = 0.02
"""Standard deviation of the pixel noise; images are 0..1 until they are stored."""

SPLITS = ("train", "val")
MIN_SIDE = 32
SUBROWS = 4
"""Scan lines per pixel row of the rasteriser (columns are integrated exactly)."""

Contour = Float[np.ndarray, "_ 2"]
Field = Float[np.ndarray, "h w"]
Planes = Float[np.ndarray, "3 h w"]


# --- Silhouettes: solid and hole contours, x to the right and y down, any scale. ---


class Outline(NamedTuple):
    """Solid contours, whose union is taken, and holes cut out of it."""

    solids: tuple[Contour, ...]
    holes: tuple[Contour, ...] = ()


def _polygon(*points) -> Contour:
    return np.array(points, np.float64)


def _box(x0, y0, x1, y1) -> Contour:
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _polar(angle: np.ndarray, radius: np.ndarray | float) -> Contour:
    """Return points at clockwise angles from 12 o'clock."""
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=-1)


def _turn(count: int) -> np.ndarray:
    return np.arange(count) * (2 * np.pi / count)


def _circle(radius, x=0.0, y=0.0) -> Contour:
    return _polar(_turn(64), radius) + np.array([x, y])


def _gear() -> Contour:
    teeth = np.tile([0.76, 0.76, 1.0, 1.0], 8)
    return _polar(_turn(32) + np.tile([0.03, -0.03, 0.03, -0.03], 8), teeth)


def _heart() -> Contour:
    t = _turn(64)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=-1)


def _crescent() -> Contour:
    """Return a unit circle out of which a smaller one, moved right, is cut."""
    radius, shift = 0.78, 0.42
    tip_x = (1 + shift**2 - radius**2) / (2 * shift)
    tip = np.arccos(tip_x)
    bite_tip = np.arccos((tip_x - shift) / radius)
    rim = _arc(tip, 2 * np.pi - tip, 1.0)
    bite = _arc(2 * np.pi - bite_tip, bite_tip, radius) + np.array([shift, 0])
    return np.concatenate([rim, bite[1:-1]])


def _arc(start: float, stop: float, radius: float) -> Contour:
    angle = np.linspace(start, stop, 48)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _pinwheel() -> tuple[Contour, ...]:
    blade = _polygon((-0.06, 0.06), (0.0, -1.0), (0.72, -0.62), (0.06, 0.06))
    return tuple(blade @ _rotation(a) for a in _turn(4))


def _rotation(angle: float) -> Float[np.ndarray, "2 2"]:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


# fmt: off
OUTLINES: dict[str, Outline] = {
    # Fold 0
    "disc": Outline((_circle(1.0),)),
    "frame": Outline((_box(-1, -1, 1, 1),), (_box(-0.52, -0.52, 0.52, 0.52),)),
    "star": Outline((_polar(_turn(10), np.tile([1.0, 0.45], 5)),)),
    "arrow": Outline((_polygon((0, -1), (0.85, -0.05), (0.35, -0.05), (0.35, 1),
                               (-0.35, 1), (-0.35, -0.05), (-0.85, -0.05)),)),
    "crescent": Outline((_crescent(),)),
    # Fold 1
    "square": Outline((_box(-1, -1, 1, 1),)),
    "gear": Outline((_gear(),), (_circle(0.34),)),
    "cross": Outline((_box(-0.34, -1, 0.34, 1), _box(-1, -0.34, 1, 0.34))),
    "bolt": Outline((_polygon((0.15, -1), (-0.65, 0.2), (-0.1, 0.2), (-0.35, 1),
                              (0.65, -0.3), (0.1, -0.3), (0.6, -1)),)),
    "heart": Outline((_heart(),)),
    # Fold 2
    "triangle": Outline((_polar(_turn(3), 1.0),)),
    "ring": Outline((_circle(1.0),), (_circle(0.54),)),
    "flower": Outline((_polar(_turn(80), 0.72 + 0.28 * np.cos(6 * _turn(80))),)),
    "hourglass": Outline((_polygon((-0.75, -1), (0.75, -1), (0.16, 0), (0.75, 1),
                                   (-0.75, 1), (-0.16, 0)),)),
    "fish": Outline((_circle(0.62, -0.3) * (1.0, 0.8),
                     _polygon((0.1, 0), (1.0, -0.55), (0.8, 0), (1.0, 0.55)))),
    # Fold 3
    "hexagon": Outline((_polar(_turn(6), 1.0),)),
    "key": Outline((_circle(0.52, 0, -0.48), _box(-0.17, -0.1, 0.17, 1),
                    _box(0.1, 0.28, 0.5, 0.52), _box(0.1, 0.76, 0.5, 1)),
                   (_circle(0.22, 0, -0.48),)),
    "pinwheel": Outline(_pinwheel()),
    "tree": Outline((_polygon((0, -1), (0.5, -0.35), (-0.5, -0.35)),
                     _polygon((0, -0.7), (0.65, 0.15), (-0.65, 0.15)),
                     _polygon((0, -0.3), (0.8, 0.65), (-0.8, 0.65)),
                     _box(-0.17, 0.6, 0.17, 1))),
    "mushroom": Outline((_polar(np.linspace(-0.5, 0.5, 33) * np.pi, 1.0),
                         _box(-0.33, -0.1, 0.33, 0.85))),
}
# fmt: on


@functools.cache
def outline(class_id: int) -> tuple[Contour, ...]:
    """Return the contours of a class, centred, of unit area, solids and holes opposed.

    Orientation tells solids from holes, so the rasteriser need only add up.
    """
    solids, holes = tuple(OUTLINES.values())[class_id - 1]
    contours = [c if _signed_area(c) > 0 else c[::-1] for c in solids]
    contours += [c if _signed_area(c) < 0 else c[::-1] for c in holes]
    points = np.concatenate(contours)
    low, high = points.min(axis=0), points.max(axis=0)
    zoom = 240 / (high - low).max()
    contours = [128 + zoom * (c - (low + high) / 2) for c in contours]
    # Solids may overlap, so that the area of the union is measured, not summed.
    area = coverage(contours, (0, 0, 256, 256)).sum()
    return tuple((c - 128) / np.sqrt(area) for c in contours)


def _signed_area(points: Contour) -> float:
    x, y = points.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


# --- Rasteriser ---------------------------------------------------------------------


class Box(NamedTuple):
    """A half-open pixel rectangle."""

    top: int
    left: int
    bottom: int
    right: int


def coverage(contours: list[Contour], box: tuple[int, int, int, int]) -> Field:
    """Return which part of each pixel of `box` the contours cover, 0..1, [h, w].

    Every scan line adds up the signed area right of each edge that crosses it; NumPy
    alone, so that labels do not depend on a drawing library. Points are (x, y) in
    pixels, pixel (0, 0) spans 0..1; overlapping solids saturate.
    """
    top, left, bottom, right = box
    height, width = bottom - top, right - left
    start = np.concatenate(contours) - (left, top)
    end = np.concatenate([np.roll(c, -1, axis=0) for c in contours]) - (left, top)
    # Scan line r lies at y = (r + 0.5) / SUBROWS; an edge crosses those in [lo, hi).
    first = np.ceil(start[:, 1] * SUBROWS - 0.5).clip(0, height * SUBROWS)
    last = np.ceil(end[:, 1] * SUBROWS - 0.5).clip(0, height * SUBROWS)
    crossings = np.abs(last - first).astype(np.int64)
    edge = np.repeat(np.arange(len(start)), crossings)
    step = np.arange(len(edge)) - np.repeat(crossings.cumsum() - crossings, crossings)
    row = np.minimum(first, last).astype(np.int64)[edge] + step
    x0, y0 = start[edge].T
    x1, y1 = end[edge].T
    x = x0 + (x1 - x0) * (((row + 0.5) / SUBROWS - y0) / (y1 - y0))
    x = x.clip(0, width)
    sign = np.sign(last - first)[edge] / SUBROWS
    column = x.astype(np.int64)
    cell = row // SUBROWS * (width + 2) + column
    inside = column + 1 - x
    cells = np.bincount(cell, sign * inside, height * (width + 2))
    cells[1:] += np.bincount(cell, sign * (1 - inside), height * (width + 2))[:-1]
    winding = cells.reshape(height, width + 2).cumsum(axis=1)[:, :width]
    return np.abs(winding).clip(0, 1).astype(np.float32)


def _bounding_box(contours: list[Contour], side: int) -> Box:
    points = np.concatenate(contours)
    left, top = np.floor(points.min(axis=0)).clip(0, side).astype(int)
    right, bottom = np.ceil(points.max(axis=0)).clip(0, side).astype(int)
    return Box(int(top), int(left), int(bottom), int(right))


# --- Scenes: geometry alone, which decides the labels. ------------------------------


class Thing(NamedTuple):
    """Something in a scene: class 0 is clutter. Contours and size in pixels."""

    class_id: int
    contours: list[Contour]
    centre: Float[np.ndarray, "2"]
    size: float
    tilt: float


def _scene(rng: np.random.Generator, side: int) -> list[Thing]:
    """Draw the things of one image, back to front."""
    clutter = [_blob(rng, side) for _ in range(rng.integers(2, 5))]
    clutter += [_stick(rng, side) for _ in range(rng.integers(1, 4))]
    occluders = [_stick(rng, side) for _ in range(rng.integers(0, 3))]
    return clutter + _objects(rng, side) + occluders


def _objects(rng: np.random.Generator, side: int) -> list[Thing]:
    count = 2 + rng.choice(len(EXTRA_OBJECTS), p=EXTRA_OBJECTS)
    ids = rng.integers(1, len(OUTLINES) + 1, count)
    ids[1:][rng.random(count - 1) < SAME_CLASS] = ids[0]
    objects: list[Thing] = []
    for class_id in ids:
        size = side * rng.uniform(*SHAPE_SIZE)
        centre = _free_place(rng, side, size, objects)
        objects.append(_place(rng, int(class_id), centre, size))
    return [objects[i] for i in rng.permutation(count)]


def _free_place(
    rng: np.random.Generator, side: int, size: float, others: list[Thing]
) -> Float[np.ndarray, "2"]:
    """Return the roomiest of a few random places: occlusion stays partial."""
    places = rng.uniform(0.45 * size, side - 0.45 * size, (8, 2))
    if not others:
        return places[0]
    gaps = [np.linalg.norm(places - o.centre, axis=1) - o.size / 2 for o in others]
    return places[np.argmax(np.min(gaps, axis=0))]


def _place(
    rng: np.random.Generator, class_id: int, centre: np.ndarray, size: float
) -> Thing:
    """Tilt, stretch, mirror and move the outline of a class; its area is size**2."""
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)
    stretch = np.sqrt(MAX_STRETCH) ** rng.uniform(-1, 1)
    mirror = rng.choice([-1, 1])
    shape = np.diag([mirror * stretch, 1 / stretch]) @ _rotation(tilt) * size
    contours = [contour @ shape + centre for contour in outline(class_id)]
    return Thing(class_id, contours, centre, size, tilt)


def _blob(rng: np.random.Generator, side: int) -> Thing:
    """Draw a smooth shape without a name: a circle with three random harmonics."""
    size = side * rng.uniform(0.15, 0.4)
    angle = _turn(40)
    radius = np.full(40, 0.5)
    for k in (2, 3, 5):
        radius += rng.uniform(0.03, 0.13) * np.cos(k * angle + rng.uniform(0, 7))
    centre = rng.uniform(0, side, 2)
    return Thing(0, [_polar(angle, radius) * size + centre], centre, size, 0.0)


def _stick(rng: np.random.Generator, side: int) -> Thing:
    """Draw a thin bar at any angle."""
    length, width = side * rng.uniform(0.3, 0.9), side * rng.uniform(0.012, 0.035)
    centre, tilt = rng.uniform(0, side, 2), rng.uniform(0, np.pi)
    bar = _box(-width / 2, -length / 2, width / 2, length / 2) @ _rotation(tilt)
    return Thing(0, [bar + centre], centre, width, tilt)


# --- Surface patterns: -1..1 over coordinates in periods. ----------------------------


def _wave(x: Field) -> Field:
    """Return a triangle wave of period 1 between -1 and 1."""
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
    """Return the index of the pattern of a class: folds 0, 2 and 1, 3 share five."""
    fold, place = divmod(class_id - 1, 5)
    return fold % 2 * 5 + (place + fold) % 5


def _texture(rng: np.random.Generator, which: int, box: Box, thing: Thing) -> Field:
    """Return a pattern of random scale and angle over a box, 0..1, [h, w]."""
    period = rng.uniform(*PERIOD) * thing.size
    turn = _rotation(thing.tilt + rng.normal(0, PATTERN_TILT)) / period
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
    """Draw a dark and a light colour of independent hues, in random order."""
    light = rng.uniform(0.75, 1.0)
    values = (light, light * (1 - contrast))
    colours = [
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), value)
        for value in values
    ]
    return rng.permutation(np.array(colours, np.float32))[..., None, None]


def _paint(canvas: Planes, rng: np.random.Generator, thing: Thing) -> None:
    """Paint a thing over the canvas: a pattern of two colours, and a dark rim."""
    box = _bounding_box(thing.contours, canvas.shape[1])
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


def _backdrop(rng: np.random.Generator, side: int) -> Planes:
    """Paint two muted colours mixed by smooth noise and a faint, coarse pattern."""
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


# --- The data set -------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """`size` square images of 2 to 4 shapes each, with exact masks (no 255).

    Image i depends on (seed, split, i) alone; "train" and "val" are two streams.
    Sides are in pixels. Raises `InputError` for a value that cannot be drawn.
    """

    split: str
    size: int
    side: int = 161
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f'Shapes split {self.split!r}: use "train" or "val"')
        if self.size < 1 or self.seed < 0 or self.side < MIN_SIDE:
            raise InputError(
                f"Shapes size={self.size}, side={self.side}, seed={self.seed}: use "
                f"size >= 1, side >= {MIN_SIDE} and seed >= 0"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the twenty shapes in the order of their ids."""
        return tuple(OUTLINES)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Split and number of every image."""
        return tuple(f"{self.split}_{i:06d}" for i in range(self.size))

    @functools.cached_property
    def counts(self) -> Int[np.ndarray, "images classes"]:
        """Pixels of each class in each label, found without drawing the images."""
        bins = len(OUTLINES) + 1
        labels = (self.label(i) for i in range(self.size))
        return np.stack([np.bincount(x.ravel(), minlength=bins)[1:] for x in labels])

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return image `index`, RGB."""
        rng = self._generator(index, "texture")
        canvas = _backdrop(rng, self.side)
        for thing in _scene(self._generator(index, "geometry"), self.side):
            _paint(canvas, rng, thing)
        canvas += GRAIN * rng.standard_normal((self.side, self.side), np.float32)
        return cv2.merge(list((255 * canvas).clip(0, 255).astype(np.uint8)))

    def label(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Return label `index`: a pixel belongs to what covers at least half of it."""
        label = np.zeros((self.side, self.side), np.uint8)
        for thing in _scene(self._generator(index, "geometry"), self.side):
            box = _bounding_box(thing.contours, self.side)
            area = label[box.top : box.bottom, box.left : box.right]
            area[coverage(thing.contours, box) >= 0.5] = thing.class_id
        return label

    def _generator(
        self, index: int, stream: Literal["geometry", "texture"]
    ) -> np.random.Generator:
        if not 0 <= index < self.size:
            raise IndexError(f"image {index} of {self.size}")
        # Two 64-bit words: the seed, and image, split and stream side by side.
        word = index * 4 + SPLITS.index(self.split) * 2 + (stream == "texture")
        key = np.array([self.seed, word], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

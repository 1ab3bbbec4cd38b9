"""The silhouettes of the twenty shapes, and the rasteriser that fills them: geometry.

Contours are points (x, y), x to the right and y down. NumPy alone, so that labels do
not depend on a drawing library.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SCAN_LINES = 4
"""Scan lines per pixel row of the rasteriser (columns are integrated exactly)."""

Contour = Float[np.ndarray, "_ 2"]
Field = Float[np.ndarray, "h w"]


# --- Silhouettes, at any scale ------------------------------------------------------


class Outline(NamedTuple):
    """Solid contours, whose union is taken, and holes cut out of it."""

    solids: tuple[Contour, ...]
    holes: tuple[Contour, ...] = ()


def _polygon(*points) -> Contour:
    return np.array(points, np.float64)


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Contour:
    """Returns the corners of an upright rectangle, clockwise."""
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def polar(
    angle: Float[np.ndarray, "_"], radius: Float[np.ndarray, "_"] | float
) -> Contour:
    """Returns points at clockwise angles from 12 o'clock."""
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=-1)


def even_angles(count: int) -> Float[np.ndarray, "_"]:
    """Returns `count` angles that divide a full turn, from 0 on."""
    return np.arange(count) * (2 * np.pi / count)


def _circle(radius, x=0.0, y=0.0) -> Contour:
    return polar(even_angles(64), radius) + np.array([x, y])


def _gear() -> Contour:
    teeth = np.tile([0.76, 0.76, 1.0, 1.0], 8)
    return polar(even_angles(32) + np.tile([0.03, -0.03, 0.03, -0.03], 8), teeth)


def _flower() -> Contour:
    angle = even_angles(80)
    return polar(angle, 0.72 + 0.28 * np.cos(6 * angle))


def _heart() -> Contour:
    t = even_angles(64)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=-1)


def _crescent() -> Contour:
    """Returns a unit circle out of which a smaller one, moved right, is cut."""
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
    return tuple(blade @ rotation(a) for a in even_angles(4))


def rotation(angle: float) -> Float[np.ndarray, "2 2"]:
    """Returns the matrix that turns row vectors: `points @ rotation(angle)`."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


# fmt: off
OUTLINES: dict[str, Outline] = {
    # Fold 0
    "disc": Outline((_circle(1.0),)),
    "frame": Outline((rectangle(-1, -1, 1, 1),),
                     (rectangle(-0.52, -0.52, 0.52, 0.52),)),
    "star": Outline((polar(even_angles(10), np.tile([1.0, 0.45], 5)),)),
    "arrow": Outline((_polygon((0, -1), (0.85, -0.05), (0.35, -0.05), (0.35, 1),
                               (-0.35, 1), (-0.35, -0.05), (-0.85, -0.05)),)),
    "crescent": Outline((_crescent(),)),
    # Fold 1
    "square": Outline((rectangle(-1, -1, 1, 1),)),
    "gear": Outline((_gear(),), (_circle(0.34),)),
    "cross": Outline((rectangle(-0.34, -1, 0.34, 1), rectangle(-1, -0.34, 1, 0.34))),
    "bolt": Outline((_polygon((0.15, -1), (-0.65, 0.2), (-0.1, 0.2), (-0.35, 1),
                              (0.65, -0.3), (0.1, -0.3), (0.6, -1)),)),
    "heart": Outline((_heart(),)),
    # Fold 2
    "triangle": Outline((polar(even_angles(3), 1.0),)),
    "ring": Outline((_circle(1.0),), (_circle(0.54),)),
    "flower": Outline((_flower(),)),
    "hourglass": Outline((_polygon((-0.75, -1), (0.75, -1), (0.16, 0), (0.75, 1),
                                   (-0.75, 1), (-0.16, 0)),)),
    "fish": Outline((_circle(0.62, -0.3) * (1.0, 0.8),
                     _polygon((0.1, 0), (1.0, -0.55), (0.8, 0), (1.0, 0.55)))),
    # Fold 3
    "hexagon": Outline((polar(even_angles(6), 1.0),)),
    "key": Outline((_circle(0.52, 0, -0.48), rectangle(-0.17, -0.1, 0.17, 1),
                    rectangle(0.1, 0.28, 0.5, 0.52), rectangle(0.1, 0.76, 0.5, 1)),
                   (_circle(0.22, 0, -0.48),)),
    "pinwheel": Outline(_pinwheel()),
    "tree": Outline((_polygon((0, -1), (0.5, -0.35), (-0.5, -0.35)),
                     _polygon((0, -0.7), (0.65, 0.15), (-0.65, 0.15)),
                     _polygon((0, -0.3), (0.8, 0.65), (-0.8, 0.65)),
                     rectangle(-0.17, 0.6, 0.17, 1))),
    "mushroom": Outline((polar(np.linspace(-0.5, 0.5, 33) * np.pi, 1.0),
                         rectangle(-0.33, -0.1, 0.33, 0.85))),
}
# fmt: on


@functools.cache
def outline(class_id: int) -> tuple[Contour, ...]:
    """Returns the contours of a class, centred, of unit area, solids and holes opposed.

    Solids and holes turn in opposite ways, so the rasteriser only adds up.
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
    """Returns which part of each pixel of `box` the contours cover, 0..1, [h, w].

    Every scan line adds up the signed area right of each edge that crosses it. Points
    are in pixels, pixel (0, 0) spans 0..1; overlapping solids saturate.
    """
    top, left, bottom, right = box
    height, width = bottom - top, right - left
    start = np.concatenate(contours) - (left, top)
    end = np.concatenate([np.roll(c, -1, axis=0) for c in contours]) - (left, top)
    # Scan line r lies at y = (r + 0.5) / SCAN_LINES; an edge crosses those in [lo, hi).
    first = np.ceil(start[:, 1] * SCAN_LINES - 0.5).clip(0, height * SCAN_LINES)
    last = np.ceil(end[:, 1] * SCAN_LINES - 0.5).clip(0, height * SCAN_LINES)
    crossings = np.abs(last - first).astype(np.int64)
    edge = np.repeat(np.arange(len(start)), crossings)
    step = np.arange(len(edge)) - np.repeat(crossings.cumsum() - crossings, crossings)
    row = np.minimum(first, last).astype(np.int64)[edge] + step
    x0, y0 = start[edge].T
    x1, y1 = end[edge].T
    x = x0 + (x1 - x0) * (((row + 0.5) / SCAN_LINES - y0) / (y1 - y0))
    x = x.clip(0, width)
    sign = np.sign(last - first)[edge] / SCAN_LINES
    column = x.astype(np.int64)
    cell = row // SCAN_LINES * (width + 2) + column
    inside = column + 1 - x
    cells = np.bincount(cell, sign * inside, height * (width + 2))
    cells[1:] += np.bincount(cell, sign * (1 - inside), height * (width + 2))[:-1]
    winding = cells.reshape(height, width + 2).cumsum(axis=1)[:, :width]
    return np.abs(winding).clip(0, 1).astype(np.float32)


def bounding_box(contours: list[Contour], side: int) -> Box:
    """Returns the pixels that contours touch, cut to a `side` x `side` image."""
    points = np.concatenate(contours)
    left, top = np.floor(points.min(axis=0)).clip(0, side).astype(int)
    right, bottom = np.ceil(points.max(axis=0)).clip(0, side).astype(int)
    return Box(int(top), int(left), int(bottom), int(right))

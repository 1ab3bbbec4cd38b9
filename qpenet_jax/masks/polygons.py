"""A mask as polygons through the centres of its border's pixels, and back.

A polygon marks its border's pixels too, as labelme and Pillow draw it.
"""

import itertools
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image, ImageDraw

Points = Int[np.ndarray, "n 2"]
"""x and y of a closed polygon's corners, in pixels."""

SHARE = 0.02
"""Of a part's pixels, so many could change at the most where corners are saved. On 120
objects of VOC at four times their size, the IoU stayed above 0.993."""


def outlines(mask: Shaped[np.ndarray, "h w"]) -> list[Points]:
    """Returns a polygon of three points or more for each part of a mask that isn't 0.

    What touches at a corner is one part. A hole is reached from the outline by a cut,
    there and back: the polygon passes that way twice. Large parts lose some corners
    (`SHARE`), and have an IoU of 0.99 or more with the mask; small ones lose nothing.
    """
    inside = (mask != 0).astype(np.uint8)
    rings, tree = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    found = []
    for i, ring in enumerate(rings):
        *_, hole, parent = tree[0, i]
        if parent >= 0:
            continue
        holes = []
        while hole >= 0:
            holes.append(rings[hole][:, 0])
            hole = tree[0, hole][0]
        found.append(_polygon(inside, ring[:, 0], holes))
    return found


def fill(
    polygon: Float[np.ndarray, "n 2"], size: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """Returns what a polygon of three points or more marks in an image of `size`.

    Where it passes twice over one place, as around a hole, inside and outside change.
    Its numbers must be checked before: Pillow's C code takes them as they are.
    """
    canvas = Image.new("1", (size[1], size[0]))
    corners = [(float(x), float(y)) for x, y in polygon]
    ImageDraw.Draw(canvas).polygon(corners, fill=1, outline=1)
    return np.array(canvas)


def _polygon(inside, ring: Points, holes: Sequence[Points]) -> Points:
    area = cv2.contourArea(ring) - sum(cv2.contourArea(hole) for hole in holes)
    length = sum(cv2.arcLength(part, True) for part in (ring, *holes))
    joined, ends = _with_cuts(inside, ring, holes)
    tolerance = SHARE * max(area, 0) / max(length, 1)
    parts = []
    for a, b in itertools.pairwise([*np.flatnonzero(ends), len(joined) - 1]):
        piece = cv2.approxPolyDP(joined[a : b + 1], tolerance, closed=False)[:, 0]
        parts += [joined[a : a + 1], piece[1:-1]]
    corners = np.concatenate(parts)
    missing = max(3 - len(corners), 0)
    return np.concatenate([corners, np.repeat(corners[-1:], missing, axis=0)])


def _with_cuts(
    inside: UInt8[np.ndarray, "h w"], ring: Points, holes: Sequence[Points]
) -> tuple[Points, Bool[np.ndarray, " n"]]:
    """Returns one closed line through the ring and all holes, and where its pieces end.

    A cut goes from a hole's leftmost pixel straight to the left, where the ring is or a
    hole that begins farther left: from left to right, each is joined to what is. The
    first point stands again at the end.
    """
    points, ends = list(map(tuple, ring.tolist())), {0, _farthest(ring)}
    after = [*range(1, len(points)), -1]  # the point that follows each one
    place = {point: i for i, point in reversed(list(enumerate(points)))}
    for hole in sorted(holes, key=lambda hole: hole[:, 0].min()):
        turned = np.roll(hole, -hole[:, 0].argmin(), axis=0)
        x, y = turned[0].tolist()
        beside = np.flatnonzero(inside[y, :x] == 0)
        at = place[int(beside[-1]) + 1 if beside.size else 0, y]
        first, around = len(points), list(map(tuple, turned.tolist()))
        points += [*around, around[0], points[at]]
        last = len(points) - 1
        after += [*range(first + 1, last + 1), after[at]]
        after[at] = first
        ends |= {at, first, first + _farthest(turned), last - 1, last}
        for i, point in enumerate(around, first):
            place.setdefault(point, i)
    order = [0]
    while after[order[-1]] >= 0:
        order.append(after[order[-1]])
    line = np.array([points[i] for i in [*order, 0]], np.int32)
    return line, np.array([i in ends for i in order] + [False])


def _farthest(ring: Points) -> int:
    """Returns the point farthest from the first: a closed line has two open halves."""
    return int(((ring - ring[0]) ** 2).sum(1).argmax())

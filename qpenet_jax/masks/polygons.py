"""A mask as polygons through the centres of its border's pixels, and back.

A polygon marks its border's pixels too, as labelme and Pillow draw it.
"""

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image, ImageDraw

Points = Int[np.ndarray, "n 2"]
"""x and y of a closed polygon's corners, in pixels."""

SHARE = 0.02
"""Of a polygon's pixels, so many could change at the most where corners are saved. On
120 objects of VOC at four times their size, the IoU stayed above 0.993."""


def outlines(mask: Shaped[np.ndarray, "h w"]) -> list[Points]:
    """Returns polygons of three points or more that mark where a mask isn't 0.

    What touches at a corner is one part, with a polygon of its own. A part with holes
    is divided through them: no polygon has a hole. Large polygons lose some corners
    (`SHARE`), and have an IoU of 0.99 or more with the mask; small ones lose nothing.
    """
    inside = (mask != 0).astype(np.uint8)
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(inside, connectivity=8)
    found = []
    for number in range(1, count):
        left, top, width, height = boxes[number, :4]
        box = labels[top : top + height, left : left + width]
        found += [
            np.add(polygon, (left, top))
            for polygon in _of_part((box == number).astype(np.uint8))
        ]
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


def _of_part(part: UInt8[np.ndarray, "h w"]) -> list[Points]:
    """Returns the polygons of pixels that hang together, in a box around them."""
    rings, tree = cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    holes = [ring for ring, link in zip(rings, tree[0], strict=True) if link[3] >= 0]
    if not holes:
        return [_polygon(rings[0][:, 0])]
    # In the middle of the middle hole, so that few pixels are looked at again.
    across = holes[len(holes) // 2][:, 0, 0]
    column = int(across.min() + across.max() + 1) // 2
    return [
        *outlines(part[:, :column]),
        *(np.add(polygon, (column, 0)) for polygon in outlines(part[:, column:])),
    ]


def _polygon(ring: Points) -> Points:
    """Returns a ring of pixels without the corners that it can do without."""
    tolerance = SHARE * cv2.contourArea(ring) / max(cv2.arcLength(ring, True), 1)
    corners = cv2.approxPolyDP(ring, tolerance, closed=True)[:, 0]
    missing = max(3 - len(corners), 0)
    return np.concatenate([corners, np.repeat(corners[-1:], missing, axis=0)])

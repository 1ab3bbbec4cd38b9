"""The JSON of labelme: shapes read as marks, masks written as polygons.

One file a photo, which names the photo by its path from the file. Format: labelme 6.3,
`_label_file.py` and `utils/shape.py`; older versions wrote the same fields.
"""

import base64
import functools
import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from qpenet_jax.core.errors import InputError, reason
from qpenet_jax.data.images import check_same_size, decoding
from qpenet_jax.data.prepare.instances import FORMAT_ERRORS
from qpenet_jax.masks.polygons import fill, outlines
from qpenet_jax.masks.tasks import Segmentation

VERSION = "5.5.0"
"""The version of labelme that a written file names; those after it read it as well."""

Shape = dict[str, Any]


def labelme_marks(
    path: Path, content: dict[str, Any], size: tuple[int, int]
) -> list[tuple[str, Callable[[], Bool[np.ndarray, "h w"]]]]:
    """Returns for each shape of a file's content its label and a call that draws it.

    The call raises InputError for a shape without an area, or of another photo.

    Raises:
        InputError: another size than the photo's `size`. ValueError, LookupError,
            TypeError: no content of such a file.
    """
    stored = content.get("imageHeight"), content.get("imageWidth")
    if None not in stored:
        check_same_size(stored, size, path)
    marks = []
    for number, shape in enumerate(content["shapes"], 1):
        if not isinstance(shape["label"], str):
            raise ValueError(f"label {shape['label']!r} is no text")
        name = f"{path}: shape {number}, of the label {shape['label']},"
        marks.append((shape["label"], functools.partial(_drawn, name, shape, size)))
    return marks


def _drawn(name: str, shape: Shape, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    try:
        return _shape_mask(shape, size)
    except FORMAT_ERRORS as error:
        raise InputError(
            f"{name} can't be drawn ({reason(error)}); correct it or take it out"
        ) from None


def _shape_mask(shape: Shape, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    kind = shape.get("shape_type") or "polygon"
    points = _checked(shape["points"], max(size))
    if kind in ("polygon", "oriented_rectangle"):
        if len(points) < 3:
            raise ValueError("a polygon needs three points or more")
        return fill(points, size)
    if kind not in ("rectangle", "circle", "mask"):
        raise ValueError(f"a {kind} has no area")
    if len(points) != 2:
        raise ValueError(f"a {kind} has two points, this one {len(points)}")
    if kind == "mask":
        return _pasted(shape["mask"], points.astype(int), size)
    canvas = Image.new("1", (size[1], size[0]))
    pen = ImageDraw.Draw(canvas)
    if kind == "circle":  # its centre and a point of its rim
        radius = math.dist(*points.tolist())
        box = (*(points[0] - radius), *(points[0] + radius))
        pen.ellipse(box, fill=1, outline=1)
    else:
        pen.rectangle((*points.min(0), *points.max(0)), fill=1, outline=1)
    return np.array(canvas)


def _checked(points: Any, side: int) -> np.ndarray:
    """Returns points as an array; tools let them lie somewhat outside of the photo."""
    for point in points:
        for value in point:
            if type(value) not in (int, float) or not -side <= value <= 2 * side:
                raise ValueError(f"{value!r} is no coordinate in this image")
    array = np.array(points, float)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError("points are x and y")
    return array


def _pasted(text: str, corners: np.ndarray, size: tuple[int, int]):
    """Returns a mask that is stored as a PNG of the box between two pixels."""
    (left, top), (right, bottom) = corners
    mask = np.zeros(size, bool)
    part = mask[max(top, 0) : bottom + 1, max(left, 0) : right + 1]
    data = base64.b64decode(text, validate=True)
    with decoding("its PNG"), Image.open(io.BytesIO(data)) as image:
        if (image.height, image.width) != (bottom + 1 - top, right + 1 - left):
            raise ValueError("its PNG hasn't the size of its box")
        stored = np.asarray(image.convert("L")) != 0
    if part.shape != stored.shape:
        raise ValueError("it isn't inside of the photo")
    part[:] = stored
    return mask


def labelme_file(
    path: Path, photo: Path, found: Segmentation, classes: Sequence[str]
) -> dict[str, Any]:
    """Returns the content of a file at `path` about a photo: polygons of each class.

    Those of one class share a `group_id`; its score stands beside each. A part with a
    hole has several (`outlines`). The photo itself isn't embedded.
    """
    height, width = found.index.shape
    shapes = []
    for number, (name, score) in enumerate(zip(classes, found.scores, strict=True), 1):
        polygons = outlines(found.index == number)
        shapes += [
            {
                "label": name,
                "points": polygon.tolist(),
                "group_id": number if len(polygons) > 1 else None,
                "description": "",
                "shape_type": "polygon",
                "flags": {},
                "mask": None,
                "score": score,
            }
            for polygon in polygons
        ]
    return {
        "version": VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": _relative(photo, path.parent),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _relative(path: Path, folder: Path) -> str:
    """Returns the way from a folder to a file; the whole path from another drive."""
    whole = path.parent.resolve() / path.name
    try:
        return Path(os.path.relpath(whole, folder.resolve())).as_posix()
    except ValueError:
        return whole.as_posix()

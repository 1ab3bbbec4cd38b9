"""Strokes of the page's brush: sent to it with the photos, read back as masks.

They travel as JSON: for each photo its `key` and its `mask`, a PNG as a data URL that
is opaque where it is marked. To the page also go the photo's `name`, and as `photo` a
small picture of it with its `width` and `height`.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import decoding
from qpenet_jax.data.transforms import nearest
from qpenet_jax.demo.grabcut import object_around
from qpenet_jax.demo.photos import RGB, data_url, read_photo, shrunk
from qpenet_jax.evaluation.pictures import SUPPORT

Marked = Bool[np.ndarray, "h w"]

MOST_SUPPORTS = 5

CANVAS = 640
"""The longest side of a picture that is brushed; on a page it is hardly larger."""

OPAQUE = 128
"""From this opacity on a pixel is marked; the edge of a stroke is blurred."""

MOST_POINTS = 10_000
"""The most points that the page sends of a stroke."""

START = "data:image/png;base64,"


class SupportPhoto(NamedTuple):
    """A photo with the object marked in it: 1 the object, 0 the rest."""

    name: str
    pixels: RGB
    mask: UInt8[np.ndarray, "h w"]


def canvases(files: Sequence[Path], masks: Mapping[str, Marked]) -> str:
    """Returns what the page shows for brushing; `masks` are already marked, by key.

    Raises:
        InputError: more than `MOST_SUPPORTS`, or a file that `read_photo` refuses.
    """
    if len(files) > MOST_SUPPORTS:
        raise InputError(
            f"{len(files)} photos to mark: give {MOST_SUPPORTS} at most, and the "
            "others as photos to segment"
        )
    return json.dumps([_canvas(file, masks.get(str(file))) for file in files])


def _canvas(file: Path, mask: Marked | None) -> dict[str, Any]:
    picture = shrunk(read_photo(file), CANVAS)
    height, width = picture.shape[:2]
    return {
        "key": str(file),
        "name": file.name,
        "width": width,
        "height": height,
        "photo": data_url(picture),
        "mask": "" if mask is None else data_url(_painted(mask), "png"),
    }


def _painted(mask: Marked) -> UInt8[np.ndarray, "h w 4"]:
    return mask[..., None] * np.array((*SUPPORT, 255), np.uint8)


def read_marks(text: str | None) -> dict[str, Marked]:
    """Returns what is marked in each photo by its key; nothing where nothing is.

    Raises:
        InputError: no text that the page sends.
    """
    with _values_of_the_page():
        return {
            str(given["key"]): _unpacked(given["mask"])
            for given in json.loads(text or "[]")
            if given["mask"]
        }


def _unpacked(url: str) -> Marked:
    data = base64.b64decode(url.removeprefix(START), validate=True)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if max(image.size) > CANVAS:
            raise ValueError(f"a mask of {image.size}")
        return np.asarray(image.convert("RGBA"))[..., 3] >= OPAQUE


def _values_of_the_page():
    """Refuses what the page doesn't send, whatever it is."""
    return decoding("the marks of this page")


def supports_of(files: Sequence[Path], text: str | None) -> list[SupportPhoto]:
    """Returns photos and what is marked in them, at the photos' own sizes.

    Raises:
        InputError: no photo, one without a mark, or marks of other photos.
    """
    if not files:
        raise InputError("no photo shows the object yet: add one, and mark it there")
    marks, supports = read_marks(text), []
    for file in files:
        pixels, mask = read_photo(file), marks.get(str(file))
        if mask is None or not mask.any():
            raise InputError(
                f"{file.name}: nothing is marked in this photo; brush or click the "
                "object, or take the photo away"
            )
        height, width = pixels.shape[:2]
        whole = nearest(mask.astype(np.uint8), width, height)
        supports.append(SupportPhoto(file.name, pixels, whole))
    return supports


def add_object(files: Sequence[Path], text: str | None) -> str:
    """Returns `canvases` in which what the last stroke touches is marked as well.

    The photo it was drawn in has a `stroke` beside its mask: its `points` (x, y) and
    its `width`, in pixels of the picture. Other marks stay.

    Raises:
        InputError: as `read_marks` and `canvases`.
    """
    marks = read_marks(text)
    with _values_of_the_page():
        strokes = {
            str(x["key"]): x["stroke"]
            for x in json.loads(text or "[]")
            if x.get("stroke")
        }
    for file in files:
        if given := strokes.get(str(file)):
            picture = shrunk(read_photo(file), CANVAS)
            with _values_of_the_page():
                touched = stroke(given["points"], given["width"], picture.shape[:2])
                marks[str(file)] = marks[str(file)] | object_around(picture, touched)
    return canvases(files, marks)


def stroke(points: Any, width: Any, size: tuple[int, int]) -> Marked:
    """Returns what a round brush touches along points (x, y) of a picture of `size`.

    Raises:
        ValueError, TypeError: no such points, or none in the picture.
    """
    array = np.array(points[:MOST_POINTS], float).reshape(-1, 2)
    if not np.isfinite(array).all():
        raise ValueError("no points")
    line = np.rint(array.clip(0, (size[1] - 1, size[0] - 1))).astype(np.int32)
    drawn, broad = np.zeros(size, np.uint8), max(1, min(int(width), CANVAS))
    for start, end in zip(line, [*line[1:], line[-1]], strict=True):
        cv2.line(drawn, start.tolist(), end.tolist(), 1, broad)
    return drawn == 1

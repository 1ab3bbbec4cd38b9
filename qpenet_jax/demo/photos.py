"""Photos of the page: as `qpenet predict` reads them, shown small, marked in editors.

A value of `gr.ImageEditor` is a dict: a `background`, `layers` that are opaque where
something is painted, and their `composite`. The background is a small picture of the
photo: the photo itself is read from its file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import image_size, read_image
from qpenet_jax.data.transforms import nearest
from qpenet_jax.evaluation.pictures import RGB, SUPPORT


class Picture(NamedTuple):
    """A picture and the line below it."""

    pixels: RGB
    caption: str


def shrunk(picture: RGB, side: int) -> RGB:
    """Returns a picture whose longer side is at most `side`, without aliasing."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


MOST_PIXELS = 50_000_000
"""Of a photo: those of telephones have up to 48 million. More would fill the memory."""


def read_photo(path: Path) -> RGB:
    """Returns a photo's pixels, upright, as `read_image`; messages name the file alone.

    Raises:
        InputError: no image, a broken one, or one of more than `MOST_PIXELS`.
    """
    height, width = image_size(path, path.name)
    if height * width > MOST_PIXELS:
        raise InputError(
            f"{path.name} has {width} x {height} pixels: scale it down to "
            f"{MOST_PIXELS // 1_000_000} million, or use qpenet predict"
        )
    return read_image(path, path.name)


Marked = Bool[np.ndarray, "h w"]
EditorValue = Mapping[str, Any] | None

MOST_SUPPORTS = 5

CANVAS = 640
"""The longest side of a picture that is painted on; on a page it is hardly larger."""

OPACITY = 0.7
"""Of marks, so that the photo is seen below; from half of it on a pixel is marked, as
the edge of a stroke is blurred."""


class SupportPhoto(NamedTuple):
    """A photo with the object marked in it: 1 the object, 0 the rest."""

    name: str
    pixels: RGB
    mask: UInt8[np.ndarray, "h w"]


def editor_value(file: Path, mask: Marked | None = None) -> dict[str, Any]:
    """Returns what the editor shows for a photo, with what is marked already.

    Raises:
        InputError: a file that `read_photo` refuses.
    """
    picture = shrunk(read_photo(file), CANVAS)
    layers = []
    if mask is not None:
        height, width = picture.shape[:2]
        painted = nearest(mask.astype(np.uint8), width, height)
        layers = [
            painted[..., None] * np.array((*SUPPORT, round(255 * OPACITY)), np.uint8)
        ]
    return {"background": picture, "layers": layers, "composite": None}


def read_marks(value: EditorValue) -> Marked | None:
    """Returns what is painted in an editor, or None where nothing is."""
    layers = value["layers"] if value else []
    mask = np.any([layer[..., 3] >= 127.5 * OPACITY for layer in layers], axis=0)
    return mask if mask.any() else None


def supports_of(
    files: Sequence[Path], values: Sequence[EditorValue]
) -> list[SupportPhoto]:
    """Returns photos and what is marked in them, at the photos' own sizes.

    Raises:
        InputError: no photo, too many, or one without a mark.
    """
    if not files:
        raise InputError("no photo shows the object yet: add one, and mark it there")
    check_number(files)
    supports = []
    for file, value in zip(files, values, strict=False):
        pixels, mask = read_photo(file), read_marks(value)
        if mask is None:
            raise InputError(
                f"{file.name}: nothing is marked in this photo; paint over the "
                "object, or take the photo away"
            )
        height, width = pixels.shape[:2]
        whole = nearest(mask.astype(np.uint8), width, height)
        supports.append(SupportPhoto(file.name, pixels, whole))
    return supports


def check_number(files: Sequence[Path]) -> None:
    """Raises InputError for more than `MOST_SUPPORTS` photos to mark."""
    if len(files) > MOST_SUPPORTS:
        raise InputError(
            f"{len(files)} photos to mark: give {MOST_SUPPORTS} at most, and the "
            "others as photos to segment"
        )

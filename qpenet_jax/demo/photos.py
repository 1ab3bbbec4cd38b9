"""Photos as `qpenet predict` reads them, and pictures as the page shows them."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import image_size, read_image
from qpenet_jax.masks.writers import COCO, SUMMARY

RGB = UInt8[np.ndarray, "h w 3"]

QUALITY = 90
"""Of JPEG: the notes in tiles are small."""


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


def data_url(pixels: UInt8[np.ndarray, "h w c"], kind: str = "jpeg") -> str:
    """Returns a picture, png or jpeg, as an address that holds it."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, quality=QUALITY)
    text = base64.b64encode(content.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{text}"


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


def result_names(files: Sequence[Path]) -> list[Path]:
    """Returns what the results of files are called: their names, different ones.

    Telephones call all photos alike; a number is put behind the name then. No result
    is called as the files about all photos.
    """
    taken = {about.stem for about in (SUMMARY, *COCO.values())}
    names = []
    for file in files:
        name, number = file.stem, 1
        while taken & _like(name):
            number += 1
            name = f"{file.stem}_{number}"
        taken |= _like(name)
        names.append(Path(name))
    return names


def _like(name: str) -> set[str]:
    """Returns the names of a photo's results, as systems that ignore case see them."""
    return {f"{name}{ending}".casefold() for ending in ("", "_probability", "_overlay")}

"""Pictures as the page is given them: in addresses that hold them, in a grid."""

import base64
import html
import io
from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

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


def sections(groups: Iterable[tuple[str, Iterable[Picture]]]) -> str:
    """Returns groups of pictures as `grid` does, each below its title."""
    return "".join(
        f"<h3>{html.escape(title)}</h3>{grid(pictures)}" for title, pictures in groups
    )


def grid(pictures: Iterable[Picture]) -> str:
    """Returns pictures and their captions as HTML; names of files do no harm there."""
    figures = (
        f'<figure><img src="{data_url(picture.pixels)}" alt="">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
    )
    return "".join(figures)

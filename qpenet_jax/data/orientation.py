"""Which way up an image is: its orientation as EXIF or XMP tells it."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

ORIENTATION = 0x0112
"""The EXIF tag, in an image's own metadata or in those of TIFF."""

XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\b")

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
"""What makes the stored pixels of each orientation upright."""

SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""


def orientation(image: Image.Image) -> int:
    """Returns 1 to 8 as EXIF tells, in a tag of any type, or else XMP; 1 is upright."""
    value: Any = image.getexif().get(ORIENTATION)
    if value is None:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        found = XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
        value = found[1].decode() if found else 1
    return _number(value) if _number(value) in TURNS else 1


def _number(value: Any) -> int:
    """Returns an EXIF value as a number: BYTE comes as bytes, several as a tuple."""
    try:
        return int(value[0]) if isinstance(value, bytes | tuple) else int(value)
    except (TypeError, ValueError, LookupError, ArithmeticError):
        return 0


def upright(
    image: Image.Image, pixels: Callable[[], np.ndarray]
) -> UInt8[np.ndarray, "h w *c"]:
    """Returns what `pixels` reads of an image, turned unless Pillow has done so."""
    turn, told = TURNS[orientation(image)], ORIENTATION in image.getexif()
    image.load()
    turned = told and ORIENTATION not in image.getexif()  # of a TIFF, while loading
    found = pixels()
    return found if turned else np.ascontiguousarray(turn(found))

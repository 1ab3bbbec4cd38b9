"""Reads an image or a label map; every failure names the file.

Whoever checks an image and whoever uses it reads it here, so that both see one picture.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps

from qpenet_jax.core.errors import InputError, InputWarning, refused_as
from qpenet_jax.core.types import IGNORE

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
"""What counts as an image in a user's folder."""

JPEG_FORMATS = ("JPEG", "MPO")  # MPO: several JPEGs in one file, as phones write them

ORIENTATION = 0x0112
"""The tag of EXIF; Pillow also gives it for an orientation in XMP."""

SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""

File = str | Path | io.BufferedIOBase


def read_image(file: File, name: str | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image as RGB in 0..255, turned upright as its EXIF or XMP says.

    Grey, palette, CMYK and 16-bit files are converted, an alpha channel is dropped.
    `name` stands for an open file in messages, here and below.

    Raises:
        InputError: the file is missing, truncated or no image.
    """
    with _opened(file, name) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(rgb(image, name or file))


def reread_image(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels of a file that `read_image` has read, faster for most JPEGs.

    OpenCV gives Pillow's pixels in half the time, but takes a truncated file as well.

    Raises:
        InputError: the bytes are no image.
    """
    with _opened(io.BytesIO(data), name) as image:
        jpeg = image.format in JPEG_FORMATS and image.mode in ("L", "RGB")
        if not jpeg or orientation(image) != 1:
            return read_image(io.BytesIO(data), name)
    # What OpenCV itself takes for the orientation may be another.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise InputError(f"{name}: broken image; replace the file")
    return pixels


def image_size(file: File, name: str | None = None) -> tuple[int, int]:
    """Returns height and width of `read_image(file)` from the file's header.

    Raises:
        InputError: the file is missing or no image.
    """
    with _opened(file, name) as image:
        # Pillow gives the upright size of a TIFF.
        if image.format != "TIFF" and orientation(image) in SIDEWAYS:
            return image.width, image.height
        return image.height, image.width


def orientation(image: Image.Image) -> int:
    """Returns the orientation of an image, 1 to 8; 1 is upright, also without a tag."""
    found: Any = image.getexif().get(ORIENTATION)
    return found if found in range(1, 9) else 1


def warn_of_turn(file: File, mask: File | None = None, name: str | None = None) -> None:
    """Warns where a mask's size doesn't show that it belongs to the upright image.

    A mask on the stored pixels of a photo that is turned by 180 degrees, or of a
    square one, shows no other sign. A mask with an orientation of its own is turned
    by it, and needs no warning.
    """
    with _opened(file, name) as image:
        found = orientation(image)
        swaps = found in SIDEWAYS and image.width != image.height
    if found == 1 or swaps:
        return
    if mask is not None:
        with _opened(mask) as image:
            if ORIENTATION in image.getexif():
                return
    path = name or file
    warnings.warn(
        f"{path}: its metadata turn this image (orientation {found}), so its mask must "
        "be drawn on the turned image, as viewers show it; if it was drawn on the "
        f"stored pixels, take the tag away: exiftool -n -Orientation=1 {path}",
        InputWarning,
        stacklevel=2,
    )


def read_label(file: File, name: str | None = None) -> UInt8[np.ndarray, "h w"]:
    """Reads a label map: the indices of a palette file, the values of a grey one.

    The colours of a palette are never looked at: VOC's masks hold the class id in the
    index, and a conversion to grey would turn it into a luminance. A mask with an
    orientation of its own is turned, as images are.

    Raises:
        InputError: the file is missing, broken or neither palette nor 8-bit grey.
    """
    with _opened(file, name) as image:
        if image.mode not in ("P", "L", "1"):
            raise InputError(
                f"{name or file}: a mask must be a palette or 8-bit grey PNG whose "
                f"values are class ids, this one has mode {image.mode}; save it as such"
            )
        step = _scaled_by(image)
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(image, np.uint8) // step


def _scaled_by(image: Image.Image) -> int:
    """Returns what Pillow multiplies grey values of 2 or 4 bits by, to fill 0..255.

    The indices in such a PNG are class ids as well: 1, not 17.
    """
    tiles: Any = getattr(image, "tile", ())  # of a file that isn't decoded yet
    rawmode = str(tiles[0].args) if tiles else ""
    return {"L;2": 85, "L;4": 17}.get(rawmode[:3], 1)


def check_same_size(
    mask: tuple[Any, ...], image: tuple[int, int], name: str | Path
) -> None:
    """Refuses the height and width of a mask that aren't those of its image.

    Raises:
        InputError: naming both sizes.
    """
    if tuple(mask) != tuple(image):
        raise InputError(
            f"{name}: mask of {mask[1]}x{mask[0]} pixels for an image"
            f" of {image[1]}x{image[0]}; make them equal"
        )


def check_label(
    label: UInt8[np.ndarray, "h w"], size: tuple[int, int], classes: int, name: str
) -> Int[np.ndarray, " classes"]:
    """Returns the pixels of each class 1..`classes` in a label map.

    A label map that holds 255 alone is refused: drawing programs save masks so, but in
    a data set 255 means ignored, and nothing would be left of the object.

    Raises:
        InputError: its size isn't the image's `size`, a value is no class, or 255 is
            its only value beside 0.
    """
    pixels = np.bincount(label.ravel(), minlength=IGNORE + 1)
    if pixels[IGNORE] and not pixels[1:IGNORE].any():
        raise InputError(
            f"{name}: 255 is its only value beside 0; in a data set 255 is ignored, so "
            "write the number of the class (1 for the first of the list) instead, or "
            "take the image out"
        )
    check_same_size(label.shape, size, name)
    strange = np.flatnonzero(pixels[classes + 1 : IGNORE])
    if strange.size:
        raise InputError(
            f"{name}: label value {strange[0] + classes + 1} is no class;"
            f" values must be 0..{classes} or {IGNORE}"
        )
    return pixels[1 : classes + 1]


@contextlib.contextmanager
def _opened(file: File, name: str | None = None) -> Iterator[Image.Image]:
    with decoding(name or file), contextlib.ExitStack() as stack:
        if isinstance(file, str | Path):
            # Of a path, Pillow would map a TIFF to memory, and a turned one wrongly.
            opened: Any = stack.enter_context(open(file, "rb"))
        else:
            opened = file
        yield stack.enter_context(Image.open(opened))


@contextlib.contextmanager
def decoding(path: Any) -> Iterator[None]:
    """Turns whatever Pillow raises while it reads `path` into an InputError."""
    # Pillow's decoders raise a dozen types on bad files.
    with refused_as(f"{path}: broken image", "replace the file"):
        try:
            yield
        except FileNotFoundError:  # named as the caller names it
            raise InputError(f"{path}: no such file; check the path") from None
        except Image.UnidentifiedImageError:
            raise InputError(f"{path}: not an image; replace the file") from None
        except Image.DecompressionBombError:
            raise InputError(f"{path}: far too many pixels; scale it down") from None


def rgb(image: Image.Image, name: File) -> Image.Image:
    """Returns an image of any mode as RGB, of 8 bits; the pixels as they are stored.

    Raises:
        InputError: pixels of 32 bits.
    """
    if image.mode.startswith("I;16"):
        # 65535 / 257 = 255; Pillow's own conversion would clip at 255.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{name}: 32-bit pixels; save the image with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion.
    return image.convert("RGB")


def encode_mask(label: UInt8[np.ndarray, "h w"]) -> bytes:
    """Returns a grey PNG: no palette for a reader to stumble over."""
    # The default is tuned for photos: this halves the time to decode a label map.
    strategy = (cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT)
    return cv2.imencode(".png", label, strategy)[1].tobytes()

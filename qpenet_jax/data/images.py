"""Read one image, one label map or one support mask; every failure names the file."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
"""What counts as an image in a user's folder."""

EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""

FULL_SCALE = 255
"""Foreground of a 0/255 mask, as drawing programs write it; there it isn't IGNORE."""


def read_image(
    path: str | Path | io.BufferedIOBase, name: str | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image as RGB in 0..255, upright as its EXIF orientation tells.

    Grey, palette, CMYK and 16-bit files are converted, an alpha channel is dropped.
    `name` stands for an open file in messages, here and below.

    Raises:
        InputError: the file is missing, truncated or no image.
    """
    with _opened(path, name) as image:
        return np.array(_rgb(ImageOps.exif_transpose(image), name or path))


def image_size(path: str | Path) -> tuple[int, int]:
    """Return height and width of `read_image(path)` from the file's header.

    Raises:
        InputError: the file is missing or no image.
    """
    with _opened(path) as image:
        if image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS:
            return image.width, image.height
        return image.height, image.width


def read_label(
    path: str | Path | io.BufferedIOBase, name: str | None = None
) -> UInt8[np.ndarray, "h w"]:
    """Read a label map: the indices of a palette file, the values of a grey one.

    The colours of a palette are never looked at: VOC's masks hold the class id in the
    index, and a conversion to grey would turn it into a luminance.

    Raises:
        InputError: the file is missing, broken or neither palette nor 8-bit grey.
    """
    with _opened(path, name) as image:
        if image.mode not in ("P", "L", "1"):
            raise InputError(
                f"{name or path}: a mask must be a palette or 8-bit grey PNG whose "
                f"values are class ids, this one has mode {image.mode}; save it as such"
            )
        return np.array(image, np.uint8)


def check_label(
    label: UInt8[np.ndarray, "h w"], size: tuple[int, int], classes: int, name: str
) -> Int[np.ndarray, " classes"]:
    """Return the pixels of each class 1..`classes` in a label map.

    Raises:
        InputError: its size isn't the image's `size`, or a value is no class.
    """
    if label.shape != size:
        raise InputError(
            f"{name}: mask of {label.shape[1]}x{label.shape[0]} pixels for an image"
            f" of {size[1]}x{size[0]}; make them equal"
        )
    pixels = np.bincount(label.ravel(), minlength=IGNORE + 1)
    strange = np.flatnonzero(pixels[classes + 1 : IGNORE])
    if strange.size:
        raise InputError(
            f"{name}: label value {strange[0] + classes + 1} is no class;"
            f" values must be 0..{classes} or {IGNORE}"
        )
    return pixels[1 : classes + 1]


def read_mask(path: str | Path) -> UInt8[np.ndarray, "h w"]:
    """Read a support mask given by a user: 0 background, 1 foreground, 255 ignore.

    A file of 0 and 255 alone, as drawing programs save it, is read as 0 and 1. Any
    other single value may stand for the foreground, with 255 as ignore beside it.

    Raises:
        InputError: as `read_label`; no foreground; several foreground values.
    """
    label = read_label(path)
    values = set(np.unique(label).tolist())
    foreground = (values - {0, IGNORE}) or (values & {FULL_SCALE})
    if not foreground:
        raise InputError(
            f"{path}: the mask has no foreground; paint the object with 1 or 255"
        )
    if len(foreground) > 1:
        raise InputError(
            f"{path}: the mask has several foreground values, {_listed(foreground)}; "
            "keep one object class and set the rest to 0"
        )
    mask = np.where(label == IGNORE, np.uint8(IGNORE), np.uint8(0))
    mask[label == foreground.pop()] = 1
    return mask


@contextlib.contextmanager
def _opened(
    file: str | Path | io.BufferedIOBase, name: str | None = None
) -> Iterator[Image.Image]:
    """Open an image; whatever its decoder raises becomes an InputError."""
    path = name or file
    try:
        with Image.open(cast(Any, file)) as image:
            yield image
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: not an image; replace the file") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: far too many pixels; scale it down") from None
    except Exception as error:  # Pillow's decoders raise a dozen types on bad files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: broken image ({reason}); replace the file") from None


def _rgb(image: Image.Image, path: str | Path | io.BufferedIOBase) -> Image.Image:
    if image.mode.startswith("I;16"):
        # 65535 / 257 = 255; Pillow's own conversion would clip at 255.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{path}: 32-bit pixels; save the image with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion.
    return image.convert("RGB")


def _listed(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))

"""A user's images and masks: read from files or arrays, checked, at the network's size.

The network's grid has a cell every 8 pixels, and an object of a photograph may fall
between all of them. Evaluation leaves it so, as the published codes do; whoever marks
an object means it.
"""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Bool, Int, Integer, Shaped, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import FEATURE_STRIDE, IGNORE
from qpenet_jax.data.images import (
    check_same_size,
    decoding,
    orientation,
    read_label,
    rgb,
)
from qpenet_jax.data.transforms import (
    Image,
    Mask,
    content_size,
    fit,
    fit_label,
    nearest,
    padding,
)

FULL_SCALE = 255
"""Foreground of a 0/255 mask, as drawing programs write it; there it isn't IGNORE."""

LISTED = 8
"""Values that a message names."""


def as_image(given: Any, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an array or PIL image as RGB in 0..255; `name` is for messages.

    Raises:
        InputError: another type or shape, no pixel, or metadata that turn the image.
    """
    pixels = _array(given, name, colour=True)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise InputError(
            f"{name} is {pixels.dtype}{list(pixels.shape)}: "
            "give uint8 RGB of shape [height, width, 3]"
        )
    if not pixels.size:
        raise InputError(f"{name} is {list(pixels.shape)}: it has no pixel")
    return np.ascontiguousarray(pixels)


def as_mask(given: Any, size: tuple[int, int], name: str) -> UInt8[np.ndarray, "h w"]:
    """Returns a support's mask, 1 the object and 255 ignored, for an image of `size`.

    Booleans, numbers and PIL images of indices or of grey mean what a file of these
    values means to `read_mask`; [height, width, 1] is taken as well.

    Raises:
        InputError: another shape or type; fractions; and as `support_mask`.
    """
    values = _array(given, name, colour=False)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2:
        raise InputError(f"{name} is {list(values.shape)}: give [height, width]")
    check_same_size(values.shape, size, name)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    elif np.issubdtype(values.dtype, np.floating):
        with np.errstate(invalid="ignore"):  # of what no integer can hold
            whole = values.astype(np.int64)
        if (fractions := values[whole != values]).size:
            raise InputError(
                f"{name} holds {fractions[0]:g}, which is no label: give booleans, "
                "such as mask > 0.5"
            )
        values = whole
    elif not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"{name} is {values.dtype}: give booleans or whole numbers")
    return support_mask(values, name)


def read_mask(path: str | Path) -> UInt8[np.ndarray, "h w"]:
    """Reads a support mask given by a user: 0 background, 1 foreground, 255 ignore.

    A file of 0 and 255 alone, as drawing programs save it, is read as 0 and 1. Any
    other single value may stand for the foreground, with 255 as ignore beside it.

    Raises:
        InputError: as `read_label`; no foreground; several foreground values.
    """
    return support_mask(read_label(path), path)


def support_mask(
    label: Integer[np.ndarray, "h w"], name: str | Path
) -> UInt8[np.ndarray, "h w"]:
    """Returns a support's mask from values of any integer type, as `read_mask` does.

    Raises:
        InputError: no foreground; several foreground values; a negative one.
    """
    values = set(np.unique(label).tolist())
    if min(values, default=0) < 0:
        raise InputError(
            f"{name}: the mask has the value {min(values)}; give 0 for background, 1 "
            "for the object, 255 for what is to be ignored"
        )
    foreground = (values - {0, IGNORE}) or (values & {FULL_SCALE})
    if not foreground:
        raise InputError(
            f"{name}: the mask has no foreground; paint the object with 1 or 255"
        )
    if len(foreground) > 1:
        listed = ", ".join(map(str, sorted(foreground)[:LISTED]))
        more = ", ..." if len(foreground) > LISTED else ""
        raise InputError(
            f"{name}: the mask has several foreground values, {listed}{more}; keep one "
            "object class and set the rest to 0"
        )
    mask = np.where(label == IGNORE, np.uint8(IGNORE), np.uint8(0))
    mask[label == foreground.pop()] = 1
    return mask


def _array(given: Any, name: str, *, colour: bool) -> Shaped[np.ndarray, "..."]:
    if not isinstance(given, PIL.Image.Image):
        try:
            return np.asarray(given)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: no array ({error})") from None
    with decoding(name):
        if orientation(given) != 1:
            raise InputError(
                f"{name}: its metadata turn it; give PIL.ImageOps.exif_transpose(it)"
            )
        return np.array(rgb(given, name) if colour else given)


SHARE = 8
"""A window is so many times as wide as the object: the smallest that training shows
(2,048 pixels of a photograph of 500 x 375) are about an eighth of the image wide."""

MARGIN = 1.25
"""A window is at least so much longer than the box around all marked objects."""

ENLARGED = 4
"""A window is enlarged at most so many times."""


def fit_support(
    image: Image, mask: Mask, side: int
) -> tuple[
    UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"], Bool[np.ndarray, "s s"]
]:
    """Returns image, mask and padding of a support at the size of the network.

    They are evaluation's, if a cell of the network's grid is centred on a marked pixel.
    Else the support is cropped around these pixels. Then every marked object between
    the cells marks those that it touches. The mask must have a pixel of 1.
    """
    if not (_on_grid(fit_label(mask, side)) == 1).any():
        image, mask = _window(image, mask, side)
    height, width = mask.shape
    return fit(image, side), fit_objects(mask, side), padding(height, width, side)


def fit_objects(mask: Mask, side: int) -> UInt8[np.ndarray, "s s"]:
    """Resizes a mask as `fit_label`, but lets no marked object fall between the cells.

    An object is what hangs together; one that no cell is centred on marks the cells
    that it touches.
    """
    fitted = fit_label(mask, side)
    height, width = mask.shape
    rows, columns = content_size(height, width, side)
    objects, labels = cv2.connectedComponents((mask == 1).astype(np.uint8))
    lost = np.ones(objects, bool)
    lost[0] = False  # the background
    lost[_on_grid(nearest(labels, columns, rows))] = False
    y, x = np.nonzero(lost[labels])
    cell_of_row, cell_of_column = _nearest_cells(rows), _nearest_cells(columns)
    touched = np.zeros((cell_of_row[-1] + 1, cell_of_column[-1] + 1), bool)
    touched[cell_of_row[y * rows // height], cell_of_column[x * columns // width]] = (
        True
    )
    fitted[:rows, :columns][touched[cell_of_row][:, cell_of_column]] = 1
    return fitted


def _on_grid(mask):
    return mask[::FEATURE_STRIDE, ::FEATURE_STRIDE]


def _nearest_cells(pixels: int) -> Int[np.ndarray, " pixels"]:
    """Returns the cell that is centred nearest to each of so many rows or columns."""
    last = (pixels - 1) // FEATURE_STRIDE
    return np.minimum((np.arange(pixels) + FEATURE_STRIDE // 2) // FEATURE_STRIDE, last)


def _window(image: Image, mask: Mask, side: int):
    """Returns what surrounds a support's marked pixels, shrunk without aliasing."""
    places = np.nonzero(mask == 1)
    box = max(int(np.ptp(place)) + 1 for place in places)
    wanted = max(SHARE * math.sqrt(places[0].size), MARGIN * box, side / ENLARGED)
    part = tuple(
        _around(int(place.min()), int(place.max()), math.ceil(wanted), room)
        for place, room in zip(places, mask.shape, strict=True)
    )
    image, mask = image[part], mask[part]
    height, width = mask.shape
    rows, columns = content_size(height, width, side)
    if height > rows and width > columns:
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
    return image, mask


def _around(first: int, last: int, length: int, room: int) -> slice:
    """Returns `length` places around those from `first` to `last`, or all there are."""
    start = min((first + last + 1 - length) // 2, room - length)
    return slice(max(start, 0), max(start, 0) + length)

"""A user's support at the size of the network, with every marked object in it.

The network's grid has a cell every 8 pixels, and an object of a photograph may fall
between all of them. Evaluation leaves it so, as the published codes do; whoever marks
an object means it.
"""

import math

import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8

from qpenet_jax.core.types import FEATURE_STRIDE
from qpenet_jax.data.transforms import (
    Image,
    Mask,
    content_size,
    fit,
    fit_label,
    nearest,
    padding,
)

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
    """Returns image, mask and padding of a support; as evaluation's where that shows it.

    If no cell of the network's grid is centred on a marked pixel, the support is
    cropped around them. Then every marked object between the cells marks those that it
    touches. The mask must have a pixel of 1.
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
    """Returns what surrounds the marked pixels of a support; shrunk without aliasing."""
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

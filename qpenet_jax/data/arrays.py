"""Images and masks that a program hands over, checked before they are cast to uint8."""

from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import (
    check_same_size,
    decoding,
    orientation,
    rgb,
    support_mask,
)

LARGEST = 2**31
"""Beyond it no float is taken for a label."""


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
    check_same_size(values, size, name)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    elif np.issubdtype(values.dtype, np.floating):
        values = _whole(values, name)
    elif not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"{name} is {values.dtype}: give booleans or whole numbers")
    return support_mask(values, name)


def _array(given: Any, name: str, *, colour: bool) -> Shaped[np.ndarray, "..."]:
    if not isinstance(given, Image.Image):
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


def _whole(values, name):
    """Returns floats that are whole numbers as integers."""
    with np.errstate(invalid="ignore"):  # infinity less itself
        fractions = values[~((values == np.rint(values)) & (abs(values) < LARGEST))]
    if fractions.size:
        raise InputError(
            f"{name} holds {fractions[0]:g}, which is no label: give booleans, such as "
            "mask > 0.5"
        )
    return values.astype(np.int64)

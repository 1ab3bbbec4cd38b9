"""Bring an image and its mask to the square that evaluation sees, and back.

Only resizing, as in the system that the paper's authors released; uint8 in and out:
normalisation happens later, on the device. Training augments as well: augmentation.py.
"""

from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from qpenet_jax.core.choices import Resize
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import FEATURE_STRIDE, IGNORE, Array, Episode

Image = UInt8[np.ndarray, "h w 3"]
Mask = UInt8[np.ndarray, "h w"]
NewImage = UInt8[np.ndarray, "h2 w2 3"]
NewMask = UInt8[np.ndarray, "h2 w2"]


def binary_mask(label: Mask, class_id: int) -> Mask:
    """Turns a label map into the mask of one class: 1, or 255 ignore, or 0."""
    table = np.zeros(256, np.uint8)
    table[[class_id, IGNORE]] = 1, IGNORE
    return cv2.LUT(label, table)


def content_size(
    height: int, width: int, side: int, resize: Resize = "pad"
) -> tuple[int, int]:
    """Returns height and width of an image's content inside the evaluation square.

    Squashed, it fills the square. Padded, the long side becomes `side`, the short one
    keeps the aspect ratio, then both are floored to a multiple of 8 (and at least 8):
    500 x 375 gives 472 x 352 in 473.
    """
    if resize == "squash":
        return side, side
    longest = max(height, width)
    ratio = side / longest
    # In floats, longest * ratio may fall just short of side.
    sides = (side if n == longest else int(n * ratio) for n in (height, width))
    rows, columns = (max(n // FEATURE_STRIDE, 1) * FEATURE_STRIDE for n in sides)
    return rows, columns


def fit(image: Image, side: int, resize: Resize = "pad") -> UInt8[np.ndarray, "s s 3"]:
    """Resizes an image into the top left of a black square, or to fill it.

    Bilinear with half-pixel centres and without antialiasing.
    """
    height, width = content_size(image.shape[0], image.shape[1], side, resize)
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[:height, :width] = cv2.resize(image, (width, height))
    return canvas


def fit_label(
    label: Mask, side: int, resize: Resize = "pad"
) -> UInt8[np.ndarray, "s s"]:
    """Resizes a label map or mask as `fit` does its image; padding is 255."""
    height, width = content_size(label.shape[0], label.shape[1], side, resize)
    canvas = np.full((side, side), IGNORE, np.uint8)
    canvas[:height, :width] = nearest(label, width, height)
    return canvas


def padding(
    height: int, width: int, side: int, resize: Resize = "pad"
) -> Bool[np.ndarray, "s s"]:
    """Returns where the square of an image of `height` x `width` holds none of it."""
    rows, columns = content_size(height, width, side, resize)
    beside = np.ones((side, side), bool)
    beside[:rows, :columns] = False
    return beside


UNSURE = 254
"""Stands for 255 in masks that are augmented: there 255 is padding, and UNSURE what the
annotators left open."""


def padding_apart(mask: Mask) -> Mask:
    """Returns a mask of 0, 1 and 255 in which UNSURE stands for 255."""
    return np.where(mask == IGNORE, np.uint8(UNSURE), mask)


def episode_of(
    images: UInt8[Array, "slots s s 3"], masks: UInt8[Array, "slots s s"]
) -> Episode:
    """Returns an episode of augmented or fitted images, the query first.

    In the masks UNSURE stands for what is ignored, and 255 for padding.
    """
    padding: Any = masks == IGNORE
    masks = masks + (masks == UNSURE).astype(np.uint8)  # 254 becomes 255.
    parts: list[Any] = [images[0], masks[0], images[1:], masks[1:]]
    return Episode(*parts, query_padding=padding[0], support_padding=padding[1:])


def unpad(
    margin: Float[np.ndarray, "s s"], height: int, width: int, resize: Resize = "pad"
) -> Float[np.ndarray, "h w"]:
    """Undoes `fit`: cuts the content out of the square, resizes it to the image.

    `margin` is any map over the square, `height` and `width` are the image's.
    """
    rows, columns = content_size(height, width, margin.shape[0], resize)
    content = np.ascontiguousarray(margin[:rows, :columns])
    return cv2.resize(content, (width, height), interpolation=cv2.INTER_LINEAR)


def nearest(
    mask: Integer[np.ndarray, "h w"], width: int, height: int
) -> Integer[np.ndarray, "h2 w2"]:
    """Resizes a mask by taking the nearest pixel."""
    # INTER_NEAREST takes the top left of each source window: off by half a pixel of
    # the image's grid. EXACT shares its half-pixel centres.
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def check_side(side: int) -> None:
    """Refuses sides of the network's input that its stride of 8 doesn't fit.

    Raises:
        InputError: not 8 n + 1, or below 17.
    """
    if side % 8 != 1 or side < 17:
        raise InputError(
            f"side={side} must be 8 n + 1 and at least 17, such as 161, 321 or 473"
        )

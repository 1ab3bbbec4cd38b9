"""Bring an image and its mask to the square the network sees, uint8 in and out.

Training augments at random, evaluation only resizes. Both follow the system that the
paper's authors released; normalisation happens later, on the device.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from qpenet_jax.core.types import IGNORE

MEAN_COLOUR = (124, 116, 104)
"""ImageNet mean 255 * (0.485, 0.456, 0.406), rounded as images are uint8: what
training pads with, so that padding is 0 (up to 0.008) after normalisation."""

CHANCE = 0.5
"""Probability of each of rotation, blur and flip."""

MIN_FOREGROUND = 0.85
REDRAWS = 31
"""A crop that keeps less than this share of the foreground is redrawn, so often."""

STRIDE = 8
"""Evaluation floors both sides of the content to a multiple of the feature stride."""

Resize = Literal["pad", "squash"]
"""How evaluation makes an image square: aspect ratio kept and padded, or not kept."""

Image = UInt8[np.ndarray, "h w 3"]
Mask = UInt8[np.ndarray, "h w"]
NewImage = UInt8[np.ndarray, "h2 w2 3"]
NewMask = UInt8[np.ndarray, "h2 w2"]


@dataclass(frozen=True)
class Augmentation:
    """What training varies; the defaults are PASCAL-5i's (COCO-20i: scale 0.8-1.25).

    `scale` is the range of the resize factor, `rotate` the largest angle in degrees.
    """

    scale: tuple[float, float] = (0.9, 1.1)
    rotate: float = 10.0
    blur: bool = True
    flip: bool = True


def binary_mask(label: Mask, class_id: int) -> Mask:
    """Turn a label map into the mask of one class: 1, or 255 ignore, or 0."""
    table = np.zeros(256, np.uint8)
    table[[class_id, IGNORE]] = 1, IGNORE
    return cv2.LUT(label, table)


def augment(
    image: Image,
    mask: Mask,
    side: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"]]:
    """Scale, rotate, blur, flip and crop an image and its mask to `side` x `side`.

    Pixels that enter from outside have the mean colour and label 255. The order is
    that of the released system; a pure function of its arguments and of `rng`'s state.
    """
    image, mask = _scale(image, mask, rng.uniform(*augmentation.scale))
    if augmentation.rotate and rng.random() < CHANCE:
        angle = rng.uniform(-augmentation.rotate, augmentation.rotate)
        image, mask = _rotate(image, mask, angle)
    if augmentation.blur and rng.random() < CHANCE:
        image = _blur(image)
    if augmentation.flip and rng.random() < CHANCE:
        image, mask = _flip(image, mask)
    return _crop(*_pad(image, mask, side), side, rng)


def content_size(
    height: int, width: int, side: int, resize: Resize = "pad"
) -> tuple[int, int]:
    """Return height and width of an image's content inside the evaluation square.

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
    content_height, content_width = (max(n // STRIDE, 1) * STRIDE for n in sides)
    return content_height, content_width


def fit(image: Image, side: int, resize: Resize = "pad") -> UInt8[np.ndarray, "s s 3"]:
    """Resize an image into the top left of a black square, or to fill it.

    Bilinear with half-pixel centres and without antialiasing.
    """
    height, width = content_size(image.shape[0], image.shape[1], side, resize)
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[:height, :width] = cv2.resize(image, (width, height))
    return canvas


def fit_label(
    label: Mask, side: int, resize: Resize = "pad"
) -> UInt8[np.ndarray, "s s"]:
    """Resize a label map or mask as `fit` does its image; padding is 255."""
    height, width = content_size(label.shape[0], label.shape[1], side, resize)
    canvas = np.full((side, side), IGNORE, np.uint8)
    canvas[:height, :width] = nearest(label, width, height)
    return canvas


def nearest(mask: Mask, width: int, height: int) -> NewMask:
    """Resize a mask by taking the nearest pixel."""
    # INTER_NEAREST takes the top left of each source window: off by half a pixel of
    # the image's grid. EXACT shares its half-pixel centres.
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _scale(image: Image, mask: Mask, factor: float) -> tuple[NewImage, NewMask]:
    height, width = (max(round(n * factor), 1) for n in mask.shape)
    return cv2.resize(image, (width, height)), nearest(mask, width, height)


def _rotate(image: Image, mask: Mask, angle: float) -> tuple[Image, Mask]:
    """Turn by `angle` degrees about (w / 2, h / 2) on the same canvas."""
    height, width = mask.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    size = (width, height)
    # OpenCV 5 turns four channels, copies included, in half the time of three; the
    # pixels are the same.
    turned = cv2.warpAffine(
        cv2.cvtColor(image, cv2.COLOR_RGB2RGBA),
        matrix,
        size,
        flags=cv2.INTER_LINEAR,
        borderValue=MEAN_COLOUR,
    )
    return cv2.cvtColor(turned, cv2.COLOR_RGBA2RGB), cv2.warpAffine(
        mask, matrix, size, flags=cv2.INTER_NEAREST, borderValue=IGNORE
    )


def _blur(image: Image) -> Image:
    # Sigma 0 with five taps means (1, 4, 6, 4, 1) / 16 in OpenCV.
    return cv2.GaussianBlur(image, (5, 5), 0, borderType=cv2.BORDER_REFLECT_101)


def _flip(image: Image, mask: Mask) -> tuple[Image, Mask]:
    return cv2.flip(image, 1), cv2.flip(mask, 1)


def _pad(image: Image, mask: Mask, side: int) -> tuple[NewImage, NewMask]:
    """Pad to at least `side` each way, the image in the middle."""
    height, width = (max(side - n, 0) for n in mask.shape)
    top, left = height // 2, width // 2
    border = (top, height - top, left, width - left)
    image = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=MEAN_COLOUR)
    return image, cv2.copyMakeBorder(mask, *border, cv2.BORDER_CONSTANT, value=IGNORE)


def _crop(
    image: Image, mask: Mask, side: int, rng: np.random.Generator
) -> tuple[NewImage, NewMask]:
    """Cut a random square that keeps most of the foreground, or the last one drawn."""
    foreground = mask == 1
    needed = MIN_FOREGROUND * np.count_nonzero(foreground)
    window = np.s_[:, :]
    for _ in range(1 + REDRAWS):
        top, left = (int(rng.integers(n - side + 1)) for n in mask.shape)
        window = np.s_[top : top + side, left : left + side]
        if np.count_nonzero(foreground[window]) >= needed:
            break
    return np.ascontiguousarray(image[window]), np.ascontiguousarray(mask[window])

"""Training augmentation on the host: the draws of an image, applied by OpenCV."""

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from qpenet_jax.core.types import IGNORE
from qpenet_jax.data.augmentation import MEAN_COLOUR, MIN_FOREGROUND, Draws
from qpenet_jax.data.transforms import Image, Mask, NewImage, NewMask, nearest


def augment(
    image: Image, mask: Mask, side: int, draws: Draws
) -> tuple[UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"]]:
    """Scales, rotate, blur, flip and crop an image and its mask to `side` x `side`.

    Pixels that enter from outside have the mean colour and label 255. `draws` were made
    for the image's size and for `side`.
    """
    image, mask = _scale(image, mask, draws.scaled)
    if draws.angle:
        image, mask = _rotate(image, mask, draws.angle)
    if draws.blur:
        image = _blur(image)
    if draws.flip:
        image, mask = _flip(image, mask)
    return _crop(*_pad(image, mask, side), side, draws.corners)


def _scale(image: Image, mask: Mask, size: tuple[int, int]) -> tuple[NewImage, NewMask]:
    height, width = size
    return cv2.resize(image, (width, height)), nearest(mask, width, height)


def _rotate(image: Image, mask: Mask, angle: float) -> tuple[Image, Mask]:
    """Turns by `angle` degrees about (w / 2, h / 2) on the same canvas."""
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
    """Pads to at least `side` each way, the image in the middle."""
    height, width = (max(side - n, 0) for n in mask.shape)
    top, left = height // 2, width // 2
    border = (top, height - top, left, width - left)
    image = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=MEAN_COLOUR)
    return image, cv2.copyMakeBorder(mask, *border, cv2.BORDER_CONSTANT, value=IGNORE)


def _crop(
    image: Image, mask: Mask, side: int, corners: Int[np.ndarray, "tries 2"]
) -> tuple[NewImage, NewMask]:
    """Cuts the first square that keeps most of the foreground, or the last."""
    foreground = mask == 1
    needed = MIN_FOREGROUND * np.count_nonzero(foreground)
    window = np.s_[:, :]
    for top, left in corners.tolist():
        window = np.s_[top : top + side, left : left + side]
        if np.count_nonzero(foreground[window]) >= needed:
            break
    return np.ascontiguousarray(image[window]), np.ascontiguousarray(mask[window])

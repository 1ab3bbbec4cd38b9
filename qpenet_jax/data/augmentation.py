"""Training augmentation: random draws, and what applies them to an image on the host.

`augment` applies the draws by OpenCV, `device_augmentation` by XLA. The operations and
their order are those of the system that the paper's authors released.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Int, Shaped, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE
from qpenet_jax.data.transforms import Mask, NewMask, nearest

Image = Shaped[np.ndarray, "h w 3"]
NewImage = Shaped[np.ndarray, "h2 w2 3"]
"""Of uint8; the benchmark of loading also augments in float32."""

MEAN_COLOUR = (124, 116, 104)
"""ImageNet mean 255 * (0.485, 0.456, 0.406), rounded as images are uint8: what
training pads with, so that padding is 0 (up to 0.008) after normalisation."""

OPERATION_CHANCE = 0.5
"""Probability of each of rotation, blur and flip."""

MIN_FOREGROUND = 0.85
REDRAWS = 31
"""A crop that keeps less than this share of the foreground is redrawn, so often."""


@dataclass(frozen=True)
class Augmentation:
    """What training varies; the defaults are PASCAL-5i's (COCO-20i: scale 0.8-1.25).

    `scale` is the range of the resize factor, `rotate` the largest angle in degrees.
    """

    scale: tuple[float, float] = (0.9, 1.1)
    rotate: float = 10.0
    blur: bool = True
    flip: bool = True

    def __post_init__(self):
        """Refuses ranges that nothing can be drawn from, or something else."""
        check_ranges(self.scale, self.rotate)


def check_ranges(scale: Any, rotate: Any) -> None:
    """Refuses a range of factors or an angle that `Augmentation` can't have.

    Raises:
        InputError: naming the field.
    """
    are_numbers = all(isinstance(factor, int | float) for factor in scale)
    if len(scale) != 2 or not are_numbers or not 0 < scale[0] <= scale[1] < math.inf:
        raise InputError(
            f"augmentation.scale={scale}: give two factors, the smaller one first, "
            "such as 0.9,1.1"
        )
    if not 0 <= rotate <= 180:
        raise InputError(f"augmentation.rotate={rotate}: give an angle of 0 to 180")


class ImageDraws(NamedTuple):
    """The random draws of one image: all that its augmentation depends on.

    Sizes and corners are (vertical, horizontal) in pixels. `scaled` is the size that
    the image is brought to, `angle` in degrees turns it counter-clockwise (0: it isn't
    turned). `corners` are the crops to try in turn, placed in the image after it was
    padded: the first that keeps enough of the foreground is taken, else the last.
    """

    scaled: tuple[int, int]
    angle: float
    blur: bool
    flip: bool
    corners: Int[np.ndarray, "tries 2"]


def draw(
    rng: np.random.Generator,
    augmentation: Augmentation,
    size: tuple[int, int],
    side: int,
) -> ImageDraws:
    """Returns the draws of an image of height and width `size` for a crop of `side`.

    A pure function of its arguments and of `rng`'s state. All crops are drawn at once,
    whichever of them will be taken.
    """
    factor = rng.uniform(*augmentation.scale)
    height, width = (max(round(n * factor), 1) for n in size)
    angle = 0.0
    if augmentation.rotate and rng.random() < OPERATION_CHANCE:
        angle = rng.uniform(-augmentation.rotate, augmentation.rotate)
    blur = augmentation.blur and rng.random() < OPERATION_CHANCE
    flip = augmentation.flip and rng.random() < OPERATION_CHANCE
    places = [max(n - side, 0) + 1 for n in (height, width)]
    corners = rng.integers(0, places, (1 + REDRAWS, 2))
    return ImageDraws((height, width), angle, blur, flip, corners)


def augment(
    image: Image, mask: Mask, side: int, draws: ImageDraws
) -> tuple[Shaped[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"]]:
    """Scales, rotates, blurs, flips and crops an image and mask to `side` x `side`.

    Pixels that enter from outside have the mean colour and label 255. `draws` were made
    for the image's size and for `side`.
    """
    height, width = draws.scaled
    image, mask = cv2.resize(image, (width, height)), nearest(mask, width, height)
    if draws.angle:
        image, mask = _rotate(image, mask, draws.angle)
    if draws.blur:
        # Sigma 0 with five taps means (1, 4, 6, 4, 1) / 16 in OpenCV.
        image = cv2.GaussianBlur(image, (5, 5), 0, borderType=cv2.BORDER_REFLECT_101)
    if draws.flip:
        image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
    return _crop(*_pad(image, mask, side), side, draws.corners)


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

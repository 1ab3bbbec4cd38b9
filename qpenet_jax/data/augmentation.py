"""The random draws of training augmentation, made here for both ways to apply them.

`host_augmentation` applies them by OpenCV, `device_augmentation` by XLA. The operations
and their order are those of the system that the paper's authors released.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from qpenet_jax.core.errors import InputError

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


HALF_TURN = 180


def check_ranges(scale: Any, rotate: Any) -> None:
    """Refuses a range of factors or an angle that `Augmentation` can't have.

    Raises:
        InputError: naming the field.
    """
    if not _is_range(scale):
        raise InputError(
            f"augmentation.scale={scale}: give two factors, the smaller one first, "
            "such as 0.9,1.1"
        )
    if not 0 <= rotate <= HALF_TURN:
        raise InputError(
            f"augmentation.rotate={rotate}: give an angle of 0 to {HALF_TURN}"
        )


def _is_range(factors) -> bool:
    if len(factors) != 2 or not all(isinstance(f, int | float) for f in factors):
        return False
    low, high = factors
    return 0 < low <= high < math.inf


class Draws(NamedTuple):
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
) -> Draws:
    """Returns the draws of an image of height and width `size`, to be cropped to `side`.

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
    return Draws((height, width), angle, blur, flip, corners)


def no_change(side: int) -> Draws:
    """Returns the draws that leave an image of `side` x `side` as it is."""
    corners = np.zeros((1 + REDRAWS, 2), np.int64)
    return Draws((side, side), 0.0, blur=False, flip=False, corners=corners)

"""From margins to masks: probability, classes that compete, tiles of a large photo.

A margin is the logit of a class less that of the background; above 0 the class is there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from qpenet_jax.core.errors import InputError

RGB = UInt8[np.ndarray, "h w 3"]
Margin = Float[np.ndarray, "h w"]

LARGEST = 80.0
"""Margins beyond it have probability 0 or 1 in float32, and exp of them may overflow."""

UNSURE = 1e-6
"""What a probability is away from 0 and 1 at the least, to have a margin."""


class Segmentation(NamedTuple):
    """What was found in a photo: at each pixel 0, the background, or class 1..n.

    `scores` holds for every class the mean probability of its pixels, None without any;
    `probabilities` those of each class at every pixel, if they were asked for.
    """

    index: UInt8[np.ndarray, "h w"]
    scores: tuple[float | None, ...]
    probabilities: tuple[Margin, ...] = ()


def probability(margin: Margin) -> Margin:
    """Returns how probable the foreground is, 0..1: the softmax of the two logits."""
    return 1 / (1 + np.exp(-np.clip(margin, -LARGEST, LARGEST)))


def margin_of(probability: Margin) -> Margin:
    """Returns what `probability` would be the probability of, within `UNSURE`."""
    inside = np.clip(probability, UNSURE, 1 - UNSURE)
    return np.log(inside / (1 - inside))


def compete(margins: Iterable[Margin], *, probabilities: bool = False) -> Segmentation:
    """Gives each pixel to the class with the largest margin above 0; the first, if equal.

    Margins are looked at one after the other, so that one at a time need be in memory.
    """
    index, largest, kept, classes = None, None, [], 0
    for classes, margin in enumerate(margins, 1):
        if index is None or largest is None:
            index, largest = np.zeros(margin.shape, np.uint8), np.zeros_like(margin)
        wins = margin > largest
        index[wins] = classes
        largest[wins] = margin[wins]
        if probabilities:
            kept.append(probability(margin))
    assert index is not None, "no class"
    assert largest is not None, "no class"
    scores = (_score(largest[index == i]) for i in range(1, classes + 1))
    return Segmentation(index, tuple(scores), tuple(kept))


def _score(margins) -> float | None:
    return float(probability(margins).mean()) if margins.size else None


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Squares of `side` pixels of the photo; neighbours share `overlap` of their side.

    Raises InputError for sides below 16 and overlaps outside of 0..0.9.
    """

    side: int
    overlap: float = 0.25

    def __post_init__(self):
        """Checks both."""
        if self.side < 16:
            raise InputError(f"tiles of {self.side} pixels: give 16 or more")
        if not 0 <= self.overlap <= 0.9:
            raise InputError(f"an overlap of {self.overlap:g}: give a share from 0 on")

    def cover(self, height: int, width: int) -> Iterator[tuple[slice, slice]]:
        """Yields the places of the tiles in a photo, in rows."""
        for top in _starts(height, self.side, self.overlap):
            for left in _starts(width, self.side, self.overlap):
                yield (
                    slice(top, min(top + self.side, height)),
                    slice(left, min(left + self.side, width)),
                )


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Returns where tiles begin, as evenly as can be, the last one at the end."""
    if side >= length:
        return [0]
    count = math.ceil((length - overlap * side) / (side - overlap * side))
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def tiled(
    margins: Callable[[RGB], Iterable[Margin]], image: RGB, tiles: Tiles
) -> Sequence[Margin]:
    """Returns the margins of a photo's classes, from those of its tiles.

    Probabilities are blended: each tile weighs most in its middle and next to nothing
    at its border. Where one tile covers the photo, its margins are returned as they are.
    """
    places = list(tiles.cover(*image.shape[:2]))
    if len(places) == 1:
        return list(margins(image))
    total = np.zeros(image.shape[:2], np.float32)
    sums: list[np.ndarray] = []
    for place in places:
        window = _window(*image[place].shape[:2])
        total[place] += window
        for i, margin in enumerate(margins(np.ascontiguousarray(image[place]))):
            if i == len(sums):
                sums.append(np.zeros_like(total))
            sums[i][place] += window * probability(margin)
    return [margin_of(blended / total) for blended in sums]


def _window(height: int, width: int) -> Margin:
    """Returns weights that fall smoothly from the middle of a tile to its border."""
    down, across = (
        np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (height, width)
    )
    return np.outer(down, across).astype(np.float32)

"""From leads to masks: probability, classes that compete, tiles of a large photo.

A lead is the logit of a class less that of the background; above 0 the class is there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from qpenet_jax.core.errors import InputError

RGB = UInt8[np.ndarray, "h w 3"]
Lead = Float[np.ndarray, "h w"]

LARGEST = 80.0
"""Leads beyond it have probability 0 or 1 in float32, and exp of them may overflow."""

UNSURE = 1e-6
"""What a probability is away from 0 and 1 at the least, to have a lead."""


class Found(NamedTuple):
    """What was found in a photo: at each pixel 0, the background, or class 1..n.

    `scores` holds for every class the mean probability of its pixels, None without any;
    `probabilities` those of each class at every pixel, if they were asked for.
    """

    index: UInt8[np.ndarray, "h w"]
    scores: tuple[float | None, ...]
    probabilities: tuple[Lead, ...] = ()


def probability(lead: Lead) -> Lead:
    """Return how probable the foreground is, 0..1: the softmax of the two logits."""
    return 1 / (1 + np.exp(-np.clip(lead, -LARGEST, LARGEST)))


def lead_of(probability: Lead) -> Lead:
    """Return what `probability` would be the probability of, within `UNSURE`."""
    inside = np.clip(probability, UNSURE, 1 - UNSURE)
    return np.log(inside / (1 - inside))


def compete(leads: Iterable[Lead], *, probabilities: bool = False) -> Found:
    """Give each pixel to the class with the largest lead above 0; the first, if equal.

    Leads are looked at one after the other, so that one at a time need be in memory.
    """
    index, largest, kept, classes = None, None, [], 0
    for classes, lead in enumerate(leads, 1):
        if index is None or largest is None:
            index, largest = np.zeros(lead.shape, np.uint8), np.zeros_like(lead)
        wins = lead > largest
        index[wins] = classes
        largest[wins] = lead[wins]
        if probabilities:
            kept.append(probability(lead))
    assert index is not None, "no class"
    assert largest is not None, "no class"
    scores = (_score(largest[index == i]) for i in range(1, classes + 1))
    return Found(index, tuple(scores), tuple(kept))


def _score(leads) -> float | None:
    return float(probability(leads).mean()) if leads.size else None


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Squares of `side` pixels of the photo; neighbours share `overlap` of their side.

    Raises InputError for sides below 16 and overlaps outside of 0..0.9.
    """

    side: int
    overlap: float = 0.25

    def __post_init__(self):
        """Check both."""
        if self.side < 16:
            raise InputError(f"tiles of {self.side} pixels: give 16 or more")
        if not 0 <= self.overlap <= 0.9:
            raise InputError(f"an overlap of {self.overlap:g}: give a share from 0 on")

    def cover(self, height: int, width: int) -> Iterator[tuple[slice, slice]]:
        """Yield the places of the tiles in a photo, in rows."""
        for top in _starts(height, self.side, self.overlap):
            for left in _starts(width, self.side, self.overlap):
                yield (
                    slice(top, min(top + self.side, height)),
                    slice(left, min(left + self.side, width)),
                )


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Return where tiles begin, as evenly as can be, the last one at the end."""
    if side >= length:
        return [0]
    count = math.ceil((length - overlap * side) / (side - overlap * side))
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def tiled(
    leads: Callable[[RGB], Iterable[Lead]], image: RGB, tiles: Tiles
) -> Sequence[Lead]:
    """Return the leads of a photo's classes, from those of its tiles.

    Probabilities are blended: each tile weighs most in its middle and next to nothing
    at its border. Where one tile covers the photo, its leads are returned as they are.
    """
    places = list(tiles.cover(*image.shape[:2]))
    if len(places) == 1:
        return list(leads(image))
    total = np.zeros(image.shape[:2], np.float32)
    sums: list[np.ndarray] = []
    for place in places:
        window = _window(*image[place].shape[:2])
        total[place] += window
        for i, lead in enumerate(leads(np.ascontiguousarray(image[place]))):
            if i == len(sums):
                sums.append(np.zeros_like(total))
            sums[i][place] += window * probability(lead)
    return [lead_of(blended / total) for blended in sums]


def _window(height: int, width: int) -> Lead:
    """Return weights that fall smoothly from the middle of a tile to its border."""
    down, across = (
        np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (height, width)
    )
    return np.outer(down, across).astype(np.float32)

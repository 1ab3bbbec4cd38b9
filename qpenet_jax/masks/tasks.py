"""What was learned from supports: one class, or several that compete.

A margin is the logit of a class less that of the background; above 0 the class is
there. From margins come probabilities, masks of classes, and the tiles of a photo.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, PyTree, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import FEATURE_STRIDE
from qpenet_jax.data.supports import as_image
from qpenet_jax.data.transforms import fit, padding, unpad
from qpenet_jax.evaluation.predictor import Predictor
from qpenet_jax.masks.refine import Edges

Image = UInt8[np.ndarray, "h w 3"] | PIL.Image.Image
Mask = UInt8[np.ndarray, "h w"]
Margin = Float[np.ndarray, "h w"]
RGB = UInt8[np.ndarray, "h w 3"]

LARGEST = 80.0
"""Margins beyond it have probability 0 or 1 in float32; their exp may overflow."""

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
    """Gives each pixel to the class with the largest margin above 0.

    Of equal margins the first counts. They are read one after the other, so that one at
    a time need be in memory.
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
        return itertools.product(self._spans(height), self._spans(width))

    def _spans(self, length: int) -> list[slice]:
        """Returns where tiles lie, as evenly as can be, the last one at the end."""
        side, shared = min(self.side, length), self.overlap * self.side
        count = max(1, math.ceil((length - shared) / (self.side - shared)))
        starts = np.linspace(0, length - side, count).round().astype(int).tolist()
        return [slice(start, start + side) for start in starts]


def tiled(
    margins: Callable[[RGB], Iterable[Margin]], image: RGB, tiles: Tiles
) -> Sequence[Margin]:
    """Returns the margins of a photo's classes, from those of its tiles.

    Probabilities are blended: each tile weighs most in its middle and next to nothing
    at its border. Where one tile covers the photo, its margins are returned unchanged.
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
    sizes = height, width
    down, across = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in sizes)
    return np.outer(down, across).astype(np.float32)


class View(NamedTuple):
    """A query as a network has encoded it, for any class, and its size."""

    encoded: PyTree[Array]
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Task:
    """What was learned from support images: `task(query)` finds it.

    Made by `Segmenter.learn`; the supports are encoded once for all queries.
    """

    predict: Predictor
    side: int
    supports: tuple[PyTree[Array], ...]
    masks: UInt8[np.ndarray, "1 k s s"]

    def __call__(self, query: Image) -> Mask:
        """Returns the query's mask at its own size: 1 foreground, 0 background.

        Raises InputError if the query is no PIL image and no RGB array of type uint8.
        """
        return (self.margin(self.view(query)) > 0).astype(np.uint8)

    def probability(self, query: Image) -> Margin:
        """Returns how probable the foreground is at every pixel, 0..1.

        It is the network's own estimate (softmax of its two logits) and isn't
        calibrated; above 0.5 the mask has its foreground. Raises as the call does.
        """
        return probability(self.margin(self.view(query)))

    def view(self, query: Image) -> View:
        """Returns a query encoded, for all tasks of one segmenter; raises as a call."""
        pixels = as_image(query, "query image")
        height, width = pixels.shape[:2]
        seen, beside = fit(pixels, self.side), padding(height, width, self.side)
        encoded = self.predict.encode(seen[None], ("query",), beside[None])
        return View(encoded, height, width)

    @functools.cached_property
    def cropped_supports(self) -> Sequence[PyTree[Array]]:
        """The supports without what no margin depends on."""
        return self.predict.crop_supports(self.supports, self.masks)

    def margin(self, view: View) -> Margin:
        """Returns the margin of the foreground at every pixel of an encoded query."""
        supports = self.cropped_supports
        margin = np.asarray(self.predict.decode(supports, self.masks, view.encoded))
        return unpad(margin[0], view.height, view.width)

    def intermediates(self, query: Image) -> dict[str, Any]:
        """Returns the named intermediates for a query, as arrays without a batch axis.

        A trained network's are those of `QPENet.__call__`, those of the training-free
        method of `self_supported`. Raises as a call.
        """
        encoded = self.view(query).encoded
        _, out = self.predict.decode(self.supports, self.masks, encoded, named=True)
        return jax.tree.map(lambda x: np.asarray(x[0]), out)


MOST_CLASSES = 254
"""What an index of 8 bits holds beside 0, the background, and 255."""


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks of one segmenter by their class: class i, from 1 on, in the order given.

    The classes compete: a pixel is of the one with the largest margin above 0. A query
    is encoded once for all of them. Raises InputError for no class, more than 254, or
    tasks of several segmenters.
    """

    tasks: Mapping[str, Task]

    def __post_init__(self):
        """Checks them."""
        if not 1 <= len(self.tasks) <= MOST_CLASSES:
            raise InputError(f"{len(self.tasks)} classes: give 1 to {MOST_CLASSES}")
        first, *others = self.tasks.values()
        alike = (first.predict, first.side)
        if any((task.predict, task.side) != alike for task in others):
            raise InputError("tasks of several segmenters: learn all with one")

    def __call__(self, query: Image) -> Mask:
        """Returns the class of every pixel, 0 for the background: `find(query).index`.

        Raises InputError as a task does.
        """
        return self.find(query).index

    def find(
        self,
        query: Image,
        tiles: Tiles | None = None,
        *,
        refine: bool = False,
        probabilities: bool = False,
    ) -> Segmentation:
        """Returns index mask and scores, and if asked for each class's probabilities.

        With `tiles`, the network is given parts of the query. With `refine`, masks
        follow the photo's edges (`masks/refine.py`). Raises as a call.
        """
        pixels = as_image(query, "query image")
        margins = tiled(self.margins, pixels, tiles) if tiles else self.margins(pixels)
        if refine:
            longest = max(pixels.shape[:2])
            seen = min(longest, tiles.side) if tiles else longest
            side = next(iter(self.tasks.values())).side
            edges = Edges(pixels, FEATURE_STRIDE * seen / side)
            margins = (margin_of(edges(probability(margin))) for margin in margins)
        return compete(margins, probabilities=probabilities)

    def margins(self, query: Image) -> Iterator[Margin]:
        """Yields each class's margin at every pixel; raises as a call."""
        view = next(iter(self.tasks.values())).view(query)
        for task in self.tasks.values():
            yield task.margin(view)

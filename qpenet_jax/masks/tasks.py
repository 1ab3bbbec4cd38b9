"""What was learned from supports: one class, or several that compete."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, PyTree, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import FEATURE_STRIDE
from qpenet_jax.data.arrays import as_image
from qpenet_jax.data.transforms import fit, padding, unpad
from qpenet_jax.evaluation.predictor import Predictor
from qpenet_jax.masks.margins import (
    Segmentation,
    Tiles,
    compete,
    margin_of,
    probability,
    tiled,
)
from qpenet_jax.masks.refine import Edges

Image = UInt8[np.ndarray, "h w 3"] | PIL.Image.Image
Mask = UInt8[np.ndarray, "h w"]
Margin = Float[np.ndarray, "h w"]


class View(NamedTuple):
    """A query as a network has encoded it, for any class, and its size."""

    encoded: PyTree[Array]
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Task:
    """What to look for, learned from support images: `task(query)` finds it.

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
        encoded = self.predict.encode(
            fit(pixels, self.side)[None],
            ("query",),
            padding(height, width, self.side)[None],
        )
        return View(encoded, height, width)

    @functools.cached_property
    def cropped_supports(self) -> tuple[PyTree[Array], ...]:
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

    The classes compete: a pixel is of the one with the largest margin above 0. A query is
    encoded once for all of them. Raises InputError for no class, more than 254, or
    tasks of several segmenters.
    """

    tasks: Mapping[str, Task]

    def __post_init__(self):
        """Checks them."""
        if not 1 <= len(self.tasks) <= MOST_CLASSES:
            raise InputError(f"{len(self.tasks)} classes: give 1 to {MOST_CLASSES}")
        first, *others = self.tasks.values()
        if any(
            task.predict is not first.predict or task.side != first.side
            for task in others
        ):
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

        With `tiles`, the network looks at parts of the query. With `refine`, masks
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

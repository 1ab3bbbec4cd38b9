"""A procedural few-shot segmentation set: the embedded default, nothing to download.

Twenty silhouettes in four folds of five, laid out as PASCAL-5i. Colour says nothing
about the class; the outline does, and, most of the time, a surface pattern that each
class shares with one class of another fold.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.sources.scenes import backdrop, paint, scene
from qpenet_jax.data.sources.silhouettes import OUTLINES, bounding_box, coverage

PIXEL_NOISE = 0.02
"""Standard deviation of the pixel noise; images are 0..1 until they are stored."""

SPLITS = ("train", "val")
MIN_SIDE = 32


@dataclass(frozen=True)
class Shapes:
    """`size` square images of 2 to 4 shapes each, with exact masks (no 255).

    Image i depends on (seed, split, i) alone; "train" and "val" are two streams.
    Sides are in pixels. Raises `InputError` for a value that cannot be drawn.
    """

    split: str
    size: int
    side: int = 161
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f'Shapes split {self.split!r}: use "train" or "val"')
        if self.size < 1 or self.seed < 0 or self.side < MIN_SIDE:
            raise InputError(
                f"Shapes size={self.size}, side={self.side}, seed={self.seed}: use "
                f"size >= 1, side >= {MIN_SIDE} and seed >= 0"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the twenty shapes in the order of their ids."""
        return tuple(OUTLINES)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Split and number of every image."""
        return tuple(f"{self.split}_{i:06d}" for i in range(self.size))

    @property
    def counts(self) -> Int[np.ndarray, "images classes"]:
        """Pixels of each class in each label, found without drawing the images."""
        return _counts(self)

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Returns image `index`, RGB."""
        rng = self._generator(index, "texture")
        canvas = backdrop(rng, self.side)
        for thing in scene(self._generator(index, "geometry"), self.side):
            paint(canvas, rng, thing)
        canvas += PIXEL_NOISE * rng.standard_normal((self.side, self.side), np.float32)
        return cv2.merge(list((255 * canvas).clip(0, 255).astype(np.uint8)))

    def label(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Returns label `index`: a pixel belongs to what covers at least half of it."""
        label = np.zeros((self.side, self.side), np.uint8)
        for thing in scene(self._generator(index, "geometry"), self.side):
            box = bounding_box(thing.contours, self.side)
            area = label[box.top : box.bottom, box.left : box.right]
            area[coverage(thing.contours, box) >= 0.5] = thing.class_id
        return label

    def _generator(
        self, index: int, stream: Literal["geometry", "texture"]
    ) -> np.random.Generator:
        if not 0 <= index < self.size:
            raise IndexError(f"image {index} of {self.size}")
        # Two 64-bit words: the seed, and image, split and stream side by side.
        word = index * 4 + SPLITS.index(self.split) * 2 + (stream == "texture")
        key = np.array([self.seed, word], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


@functools.lru_cache(maxsize=8)  # for all that opens the same set in a process
def _counts(shapes: Shapes) -> Int[np.ndarray, "images classes"]:
    bins = len(OUTLINES) + 1
    labels = (shapes.label(i) for i in range(shapes.size))
    rows = [np.bincount(label.ravel(), minlength=bins)[1:] for label in labels]
    counts = np.stack(rows)
    counts.flags.writeable = False
    return counts

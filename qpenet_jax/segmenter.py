"""The library's front door: a trained run as a function from images to a mask."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Array, Float, PyTree, Shaped, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path
from qpenet_jax.data.arrays import as_image, as_mask
from qpenet_jax.data.supports import fit_support
from qpenet_jax.data.transforms import fit, padding, unpad
from qpenet_jax.evaluation.predictor import Predictor
from qpenet_jax.runs.folder import open_run

Image = UInt8[np.ndarray, "h w 3"] | PIL.Image.Image
GivenMask = Shaped[np.ndarray, "h w"] | PIL.Image.Image
Mask = UInt8[np.ndarray, "h w"]


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
        """Return the query's mask at its own size: 1 foreground, 0 background.

        Raises InputError if the query is no PIL image and no RGB array of type uint8.
        """
        return (self._lead(query) > 0).astype(np.uint8)

    def probability(self, query: Image) -> Float[np.ndarray, "h w"]:
        """Return how probable the foreground is at every pixel, 0..1.

        It is the network's own estimate (softmax of its two logits) and isn't
        calibrated; above 0.5 the mask has its foreground. Raises as the call does.
        """
        return 1 / (1 + np.exp(-np.clip(self._lead(query), *LARGEST)))

    def _lead(self, query):
        pixels = as_image(query, "query image")
        height, width = pixels.shape[:2]
        encoded = self.predict.encode(
            fit(pixels, self.side)[None],
            ("query",),
            padding(height, width, self.side)[None],
        )
        lead = np.asarray(self.predict.decode(self.supports, self.masks, encoded))
        return unpad(lead[0], height, width)


LARGEST = (-80.0, 80.0)
"""Leads beyond it have probability 0 or 1 in float32, and exp of them may overflow."""


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """Segments in query images what is marked in support images."""

    predict: Predictor
    side: int

    def learn(
        self, images: Image | Sequence[Image], masks: GivenMask | Sequence[GivenMask]
    ) -> Task:
        """Return a task that segments in any query what the masks mark in the images.

        Images are RGB of any size, one support or K. A mask means what its file means
        to `qpenet predict`: one value is the object, 0 background, and 255 beside
        another value is ignored; booleans do as well. Where the network would see
        nothing of what is marked, the support is cropped around it (`fit_support`).

        Raises:
            InputError: a mask without object, with several values, with fractions or of
                another size; an image that is no RGB of type uint8.
        """
        supports = [
            fit_support(*support, self.side) for support in _supports(images, masks)
        ]
        encoded = [
            self.predict.encode(image[None], ("support",), beside[None])
            for image, _, beside in supports
        ]
        fitted = np.stack([mask for _, mask, _ in supports])[None]
        return Task(self.predict, self.side, tuple(encoded), fitted)

    def __call__(
        self,
        query: Image,
        supports: Image | Sequence[Image],
        masks: GivenMask | Sequence[GivenMask],
    ) -> Mask:
        """Return the mask of one query: `learn(supports, masks)(query)`.

        Raises InputError as `learn` and the task do.
        """
        query = as_image(query, "query image")
        return self.learn(supports, masks)(query)


def load(workdir: str | Path, overrides: Sequence[str] = ()) -> Segmenter:
    """Return the segmenter of a run of train.py, with the checkpoint that it selected.

    The run may also be one of `qpenet publish`, by its folder or its name on the
    Hugging Face hub, "org/name" or "org/name@revision". `overrides` are other paths
    than it was trained with, such as `--config.backbone.weights=FILE`. No data set is
    needed. Raises InputError if the folder holds no run, or the weights aren't those
    that it was trained with.
    """
    run = open_run(local_path(workdir), overrides)
    predict = run.experiment.predictor(run.params, run.weights)
    return Segmenter(predict, run.experiment.config.side)


def _supports(images: Any, masks: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return image and mask of every support, checked."""
    if isinstance(images, PIL.Image.Image) or getattr(images, "ndim", None) == 3:
        images, masks = [images], [masks]
    if len(images) != len(masks) or not len(images):
        raise InputError(
            f"{len(images)} supports with {len(masks)} masks: give one mask for "
            "every support image, and at least one"
        )
    supports = []
    for number, (image, mask) in enumerate(zip(images, masks, strict=True), 1):
        pixels = as_image(image, f"support image {number}")
        marked = as_mask(mask, pixels.shape[:2], f"mask {number}")
        supports.append((pixels, marked))
    return supports

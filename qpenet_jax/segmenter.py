"""The library's front door: a trained run as a function from images to a mask."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.data.transforms import fit, fit_label
from qpenet_jax.evaluation.scoring import unpad
from qpenet_jax.runs.experiment import open_run

Image = UInt8[np.ndarray, "h w 3"]
Mask = UInt8[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """Segments in a query image what is marked in the support images."""

    predict: Callable[[Episode], Float[Array, "1 s s"]]
    side: int

    def __call__(
        self,
        query: Image,
        supports: Image | Sequence[Image],
        masks: Mask | Sequence[Mask],
    ) -> Mask:
        """Return the query's mask at its own size: 1 foreground, 0 background.

        Images are RGB of any size, one support or K; in a support mask 1 is the object,
        255 is left out. Raises InputError for a support without foreground, or one
        whose mask has another size.
        """
        if isinstance(supports, np.ndarray) and supports.ndim == 3:
            supports, masks = [supports], [np.asarray(masks)]
        masks = [np.asarray(mask).astype(np.uint8) for mask in masks]
        self._check(query, supports, masks)
        episode = Episode(
            query_image=fit(query, self.side)[None],
            query_mask=np.zeros((1, self.side, self.side), np.uint8),
            support_images=np.stack([fit(s, self.side) for s in supports])[None],
            support_masks=np.stack([fit_label(m, self.side) for m in masks])[None],
        )
        margin = np.asarray(self.predict(episode))[0]
        return (unpad(margin, *query.shape[:2]) > 0).astype(np.uint8)

    def _check(self, query, supports, masks):
        if len(supports) != len(masks) or not len(supports):
            raise InputError(
                f"{len(supports)} supports with {len(masks)} masks: give one mask for "
                "every support image, and at least one"
            )
        for name, image in [("query", query), *(("support", s) for s in supports)]:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise InputError(
                    f"{name} image is {image.dtype}{list(image.shape)}: "
                    "give uint8 RGB of shape [height, width, 3]"
                )
        for number, (image, mask) in enumerate(zip(supports, masks, strict=True), 1):
            if mask.shape != image.shape[:2]:
                raise InputError(
                    f"mask {number} is {list(mask.shape)} for a support image of "
                    f"{list(image.shape[:2])}: make them equal"
                )
            if not (mask == 1).any():
                raise InputError(
                    f"mask {number} has no foreground: mark the object with 1"
                )


def load(workdir: str | Path) -> Segmenter:
    """Return the segmenter of a run of train.py, with the checkpoint that it selected.

    Raises InputError if the folder holds no run.
    """
    experiment, params, _ = open_run(workdir)
    predict = experiment.predictor(params, experiment.backbone_weights())
    return Segmenter(predict, experiment.config.side)

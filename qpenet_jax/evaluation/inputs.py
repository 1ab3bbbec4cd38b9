"""What evaluation reads of the images of its episodes, ahead of the computation."""

import functools
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.loader import ahead
from qpenet_jax.data.transforms import Resize, binary_mask, fit, fit_label, padding
from qpenet_jax.evaluation.plan import Turn
from qpenet_jax.evaluation.protocols import Protocol


class Inputs(NamedTuple):
    """What an episode needs from files: the images that aren't encoded yet, masks.

    `padding` says where the images' squares hold no photo.
    `fitted_mask` is the query's as the network's input has it, `mask` at its own size.
    """

    images: list[UInt8[np.ndarray, "s s 3"]]
    padding: list[Bool[np.ndarray, "s s"]]
    support_masks: UInt8[np.ndarray, "k s s"]
    fitted_mask: UInt8[np.ndarray, "s s"]
    mask: UInt8[np.ndarray, "h w"]


def loaded(
    dataset: SegmentationDataset,
    turns: Sequence[Turn],
    protocol: Protocol,
    workers: int,
) -> Generator[Inputs, None, None]:
    """Yields the inputs of every turn, loaded ahead by workers, or a thread if 0."""
    side, resize = protocol.side, protocol.resize
    load = functools.partial(_load, dataset, turns, side, resize)
    return ahead(load, range(len(turns)), workers)


# At module level, as what goes to a worker process is pickled.
def _load(
    dataset: SegmentationDataset,
    turns: Sequence[Turn],
    side: int,
    resize: Resize,
    position: int,
) -> Inputs:
    ids, images, _ = turns[position]

    def mask_of(image: int) -> UInt8[np.ndarray, "h w"]:
        return binary_mask(dataset.label(image), ids.class_id)

    mask = mask_of(ids.query)
    masks = [fit_label(mask_of(image), side, resize) for image in ids.supports]
    photos = [dataset.image(image) for image in images]
    return Inputs(
        images=[fit(photo, side, resize) for photo in photos],
        padding=[
            padding(photo.shape[0], photo.shape[1], side, resize) for photo in photos
        ],
        support_masks=np.stack(masks),
        fitted_mask=fit_label(mask, side, resize),
        mask=mask,
    )

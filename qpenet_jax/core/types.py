"""The contract between data, model, loss and metrics."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import struct
from jaxtyping import Bool, Int, PyTree, UInt8

Array = jax.Array | np.ndarray
"""Arrays that functions take; those that they return are arrays of JAX."""

BATCH_STATISTICS = "batch_stats"
"""Flax's name for what batch norm moves. A backbone's norm is in training mode where a
caller lets this collection change, as `training/released_step.py` alone does."""

FEATURE_STRIDE = 8
"""Pixels between neighbouring feature cells of every backbone here."""

IGNORE = 255
"""Label of pixels that count nowhere: VOC's object borders and all padding."""


class Episode(NamedTuple):
    """One few-shot task, or a batch of them with a leading axis on every field.

    Images are RGB in 0..255 (normalised on the device); masks hold 0 background,
    1 foreground and 255 ignore, padding included. Padding is where the square holds no
    photo; None means that nothing is said of it.
    """

    query_image: UInt8[np.ndarray, "*b h w 3"]
    query_mask: UInt8[np.ndarray, "*b h w"]
    support_images: UInt8[np.ndarray, "*b k h w 3"]
    support_masks: UInt8[np.ndarray, "*b k h w"]
    query_padding: Bool[np.ndarray, "*b h w"] | None = None
    support_padding: Bool[np.ndarray, "*b k h w"] | None = None


@struct.dataclass
class TrainState:
    """What training changes and checkpoints hold; the frozen backbone is no part."""

    step: Any  # Int[Array, ""], or what stands for it in a tree of shapes
    params: PyTree
    opt_state: PyTree


@runtime_checkable
class SegmentationDataset(Protocol):
    """Images with label maps; nothing random: item i is always the same.

    Class ids are 1..len(classes), `classes[id - 1]` is the name; in a label map 0 is
    background and 255 ignore. `counts[i, id - 1]` is the number of pixels of a class
    in label i at its original size, so that episodes are drawn without decoding.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their ids."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """A name for every image (VOC id), for results and error messages."""
        ...

    @property
    def counts(self) -> Int[np.ndarray, "images classes"]:
        """Pixels of each class in each label."""
        ...

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Returns image `index`, RGB."""
        ...

    def label(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Returns the label map of image `index`."""
        ...


def values_hash(tree: PyTree[Array]) -> str:
    """Returns the SHA-256 of the values of a tree, in its order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()

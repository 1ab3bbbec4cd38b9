"""Which data a number was measured on: hashes of a split, and of its files."""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from qpenet_jax.core.types import SegmentationDataset

DIGITS = 16
"""Hexadecimal digits that stand for an image where many are compared."""


def dataset_version(dataset: SegmentationDataset) -> str:
    """Returns 12 hex digits of a hash over a split's names and pixel counts."""
    digest = hashlib.sha256("\n".join(dataset.names).encode())
    digest.update(dataset.counts.astype("<i8").tobytes())
    return digest.hexdigest()[:12]


def dataset_content(dataset: SegmentationDataset) -> str:
    """Returns a hash over all that a split holds: names, images, labels.

    A data set without `content` of its own has its version instead.
    """
    return getattr(dataset, "content", None) or dataset_version(dataset)


class ContentHash:
    """The SHA-256 of a split's names, images and labels, added one after the other.

    `photos` are hashes of the images alone: equal ones are one photo under two names.
    """

    def __init__(self):
        self._total = hashlib.sha256()
        self.photos: list[str] = []

    def add(self, name: str, image: bytes, label: UInt8[np.ndarray, "h w"]) -> None:
        """Adds an image, its file's bytes, and its label map."""
        photo = hashlib.sha256(image).hexdigest()
        drawn = hashlib.sha256(label.tobytes()).hexdigest()
        self._total.update(f"{name}\n{photo}\n{drawn} {label.shape}\n".encode())
        self.photos.append(photo[:DIGITS])

    def hexdigest(self) -> str:
        """Returns the hash of all that was added until now."""
        return self._total.hexdigest()


def shared_photos(
    train: SegmentationDataset,
    val: SegmentationDataset,
    trained: Sequence[int] | Int[np.ndarray, " trained"] | None = None,
    scored: Sequence[int] | Int[np.ndarray, " scored"] | None = None,
) -> list[tuple[str, str]]:
    """Returns the names in both splits of images that are equal, byte for byte.

    `trained` and `scored` say which images count, by default all. A data set without
    `photos`, such as the procedural one, shares none.
    """
    ours, theirs = (getattr(data, "photos", ()) for data in (train, val))
    trained = range(len(ours)) if trained is None else trained
    scored = range(len(theirs)) if scored is None else scored
    if not ours or not theirs:
        return []
    known = {ours[i]: train.names[i] for i in trained}
    return [(known[theirs[i]], val.names[i]) for i in scored if theirs[i] in known]

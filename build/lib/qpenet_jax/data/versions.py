"""Which data a number was measured on: a short hash of a split."""

import hashlib

from qpenet_jax.core.types import SegmentationDataset


def dataset_version(dataset: SegmentationDataset) -> str:
    """Return 12 hex digits of a hash over a split's names and pixel counts."""
    digest = hashlib.sha256("\n".join(dataset.names).encode())
    digest.update(dataset.counts.astype("<i8").tobytes())
    return digest.hexdigest()[:12]

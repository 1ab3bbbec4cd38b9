"""A data set that `qpenet prepare` wrote, read by random access."""

import functools
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from qpenet_jax.datasets.images import read_image
from qpenet_jax.errors import InputError

JPEG = b"\xff\xd8"


class Prepared:
    """A `SegmentationDataset` of one split of a prepared data set.

    Opening reads the index only: names and pixel counts, no record.
    """

    def __init__(self, root: str | Path, split: str):
        """Open the folder that `qpenet prepare` printed.

        Raises:
            InputError: no prepared data set, or no such split.
        """
        # TFDS is imported where a data set is opened: it takes most of a second.
        import tensorflow_datasets as tfds

        if not (Path(root) / "metadata.json").is_file():
            raise InputError(
                f"{root} is no prepared data set; make it with `qpenet prepare` "
                "(data/README.md)"
            )
        builder = tfds.builder_from_directory(str(root))
        info = builder.info
        index = info.metadata["index"]
        if split not in index:
            raise InputError(f"{root} has no split {split!r}, only {', '.join(index)}")
        encoded = tfds.decode.SkipDecoding()
        self.classes = tuple(info.metadata["classes"])
        self.names = tuple(index[split]["names"])
        self.version = info.full_name
        self._counts = index[split]["counts"]
        self._records = builder.as_data_source(
            split, decoders={"image": encoded, "mask": encoded}
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    @functools.cached_property
    def counts(self) -> Int[np.ndarray, "images classes"]:
        """Pixels of each class in each label."""
        counts = np.zeros((len(self), len(self.classes)), np.int64)
        for row, shown in zip(counts, self._counts, strict=True):
            for class_id, pixels in shown:
                row[class_id - 1] = pixels
        return counts

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return image `index`, RGB; `prepare` has seen that it can be decoded."""
        data = self._records[index]["image"]
        if data.startswith(JPEG):  # OpenCV gives the same pixels in half the time.
            return _decode(data, cv2.IMREAD_COLOR_RGB)
        return read_image(BytesIO(data), self.names[index])

    def label(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Return the label map of image `index`."""
        return _decode(self._records[index]["mask"], cv2.IMREAD_GRAYSCALE)


def _decode(data: bytes, flags: int) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)

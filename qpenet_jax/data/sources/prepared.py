"""A data set that `qpenet prepare` wrote, read by random access."""

import functools
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import reread_image


class Prepared:
    """A `SegmentationDataset` of one split of a prepared data set.

    Opening reads the index only: names and pixel counts, no record.
    """

    def __init__(self, root: str | Path, split: str):
        """Opens the folder that `qpenet prepare` printed.

        Raises:
            InputError: no prepared data set, or no such split.
        """
        # TFDS is imported where a data set is opened: it takes most of a second.
        import tensorflow_datasets as tfds

        metadata = read_metadata(root)
        index = metadata["index"]
        if split not in index:
            raise InputError(f"{root} has no split {split!r}, only {', '.join(index)}")
        builder = tfds.builder_from_directory(str(root))
        encoded = tfds.decode.SkipDecoding()
        self.root = root
        self.classes = tuple(metadata["classes"])
        self.names = tuple(index[split]["names"])
        self.version = builder.info.full_name
        self.photos = tuple(index[split]["photos"])  # a hash of every image's file
        self.content: str = index[split]["sha256"]  # of all that the split holds
        self._counts = index[split]["counts"]
        self._records = builder.as_data_source(  # its decorator hides the arguments
            split,  # pyright: ignore[reportCallIssue]
            decoders={"image": encoded, "mask": encoded},
        )

    def __len__(self) -> int:
        """Returns the number of images."""
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
        """Returns image `index`, RGB.

        Raises:
            InputError: the data set's files are damaged; `prepare` has decoded all.
        """
        return reread_image(self._bytes(index, "image"), self.names[index])

    def label(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Returns the label map of image `index`.

        Raises:
            InputError: the data set's files are damaged.
        """
        data = np.frombuffer(self._bytes(index, "mask"), np.uint8)
        label = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        assert label is not None  # Checksums guard what `prepare` has checked.
        return label

    def _bytes(self, index: int, feature: str) -> bytes:
        reason = "cut off"
        try:
            data = self._records[index][feature]
        except RuntimeError as error:  # of ArrayRecord, whose checksums found it
            data, reason = None, str(error).splitlines()[0]
        if data is None:
            raise InputError(
                f"{self.root}: image {self.names[index]} can't be read ({reason}); "
                "remove the folder and prepare it again"
            )
        return data


def read_metadata(root: str | Path) -> dict[str, Any]:
    """Returns classes, facts and index of a prepared data set.

    Raises:
        InputError: no prepared data set.
    """
    try:
        metadata = json.loads((Path(root) / "metadata.json").read_text())
        if not {"classes", "facts", "index"} <= metadata.keys():
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise InputError(
            f"{root} is no prepared data set; make it with `qpenet prepare` "
            "(data/README.md)"
        ) from None
    return metadata

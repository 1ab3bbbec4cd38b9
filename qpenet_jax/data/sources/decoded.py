"""A data set's images and labels, decoded once into a file that is mapped to memory."""

import functools
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import check_room, locked
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.images import check_same_size
from qpenet_jax.data.versions import dataset_content, dataset_version

PIXELS_FILE, SIZES_FILE = "pixels.bin", "sizes.npy"
"""Image and label of every item in turn, and their heights and widths."""

CHANNELS = 4
"""Bytes of a pixel in the file: RGB and the label."""

MAX_BYTES = 2**35
"""Largest file that is made unasked: 32 GiB. PASCAL-5i's training images take 4 GB,
COCO-20i's 100 GB."""

REMEDY = "make room, or set config.augment_on=host"

SAMPLED_IMAGES = 16
"""Images that are decoded to estimate the size."""


class Decoded:
    """A `SegmentationDataset` with the images of another, decoded.

    Processes that open the same file share its pages. What `image` and `label` return
    can't be written to.
    """

    def __init__(
        self, dataset: SegmentationDataset, folder: str | Path, limit: int = MAX_BYTES
    ):
        """Opens the data set's folder below `folder`, or makes it where it is missing.

        Its name holds a hash of what it was made of (`dataset_content`), so that images
        that were replaced are decoded; a data set without `content` is known by its
        names and counts alone. The folder gets its name when it is complete; while
        another process makes it, this one waits. `limit` is in bytes.

        Raises:
            InputError: it would be larger than `limit`, the disk is too full, the
                folder can't be written to, or an image can't be used.
        """
        self.classes = tuple(dataset.classes)
        self.names = dataset.names
        self.counts = np.asarray(dataset.counts)
        self.version = getattr(dataset, "version", "")
        self.content = dataset_content(dataset)
        self.folder = Path(folder) / f"{dataset_version(dataset)}-{self.content[:16]}"
        if not self.folder.exists():
            self._make(dataset, limit)
        self.sizes: Int[np.ndarray, "images 2"] = np.load(self.folder / SIZES_FILE)
        """Height and width of every image."""
        areas = self.sizes.prod(axis=1)
        self._starts = CHANNELS * (np.cumsum(areas) - areas)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.names)

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Returns image `index`, RGB."""
        height, width = self.sizes[index]
        start = self._starts[index]
        end = start + (CHANNELS - 1) * height * width
        return self._pixels[start:end].reshape(height, width, CHANNELS - 1)

    def label(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Returns the label map of image `index`."""
        height, width = self.sizes[index]
        start = self._starts[index] + (CHANNELS - 1) * height * width
        return self._pixels[start : start + height * width].reshape(height, width)

    @functools.cached_property
    def _pixels(self) -> UInt8[np.ndarray, " bytes"]:
        return np.asarray(np.memmap(self.folder / PIXELS_FILE, np.uint8, "r"))

    def __getstate__(self) -> dict:
        """Leaves the mapped file out of pickles: a worker maps it by itself."""
        return {k: v for k, v in vars(self).items() if k != "_pixels"}

    def _make(self, dataset: SegmentationDataset, limit: int) -> None:
        """Writes the folder, or waits for another process that does."""
        needed = _bytes_needed(dataset)
        if needed > limit:
            raise InputError(
                f"{self.folder}: the decoded images would take {needed / 1e9:.1f} GB, "
                f"more than the limit of {limit / 1e9:.1f} GB; set "
                "config.augment_on=host"
            )
        busy = f"{self.folder}: waiting for another process that decodes these images"
        part = self.folder.with_name(f".{self.folder.name}.part")
        try:
            with locked(part.with_suffix(".lock"), busy, wait=True):
                if not self.folder.exists():
                    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
                    check_room(part.parent, needed, REMEDY)
                    _write(dataset, part)
                    part.rename(self.folder)
        except OSError as error:
            raise InputError(
                f"{self.folder}: can't be written ({error.strerror}); {REMEDY}"
            ) from None


def _bytes_needed(dataset: SegmentationDataset) -> int:
    """Returns about how many bytes the images of a data set take, decoded."""
    images = len(dataset)
    sample = range(0, images, images // SAMPLED_IMAGES or 1)
    pixels = sum(dataset.label(i).size for i in sample)
    return CHANNELS * pixels * images // max(len(sample), 1)


def _write(dataset: SegmentationDataset, folder: Path) -> None:
    """Writes the files, or leaves no folder if that fails."""
    sizes = []
    # A bar where there is a terminal.
    bar = tqdm(range(len(dataset)), "decoding images", unit="image", disable=None)
    folder.mkdir()
    try:
        with (folder / PIXELS_FILE).open("wb") as file:
            for index in bar:
                image, label = dataset.image(index), dataset.label(index)
                check_same_size(label.shape, image.shape[:2], dataset.names[index])
                file.write(np.ascontiguousarray(image).data)
                file.write(np.ascontiguousarray(label).data)
                sizes.append(label.shape)
        np.save(folder / SIZES_FILE, np.array(sizes, np.int64))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

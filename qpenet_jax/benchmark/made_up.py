"""Made-up photos, for a benchmark on machines without a data set."""

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from qpenet_jax.core.types import IGNORE
from qpenet_jax.data.sources.prepared import Prepared

PHOTOS, CLASSES = 64, 4

GRAIN, QUALITY = 16.0, (cv2.IMWRITE_JPEG_QUALITY, 90)
"""Noise, in grey levels, and JPEG quality: files of about 90 kB, VOC's have 115."""


def made_up_photos(folder: Path) -> Prepared:
    """Writes 64 JPEGs of 500x375 and 375x500 with labels, as `qpenet prepare` does."""
    # TFDS is imported where it is needed: it takes most of a second.
    from qpenet_jax.data.prepare.builder import (
        LabelledImage,
        SegmentationBuilder,
        Source,
        prepare,
    )

    class Photos(SegmentationBuilder, skip_registration=True):
        """Smooth noise with an ellipse, the size of photos."""

        name = "made_up_photos"

    def example(split: str, name: str) -> LabelledImage:
        image, label = made_up_photo(int(name))
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        return LabelledImage(
            name, cv2.imencode(".jpg", bgr, QUALITY)[1].tobytes(), label
        )

    names = [str(i) for i in range(PHOTOS)]
    classes = tuple(f"class {c}" for c in range(1, CLASSES + 1))
    source = Source(classes, {"train": names}, example, PHOTOS * 100_000)
    return Prepared(prepare(Photos, source, folder, "main"), "train")


def made_up_photo(
    index: int,
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Returns image `index` and its label: an object of class index % 4 + 1."""
    rng = np.random.default_rng(index)
    width, height = [(500, 375), (375, 500)][index % 2]
    image = np.full((height, width, 3), 128, np.float32)
    for cells, contrast in ((4, 50), (16, 25), (64, 15)):
        noise = rng.standard_normal((cells, cells, 3), np.float32)
        image += contrast * cv2.resize(noise, (width, height))
    label = np.zeros((height, width), np.uint8)
    centre = (int(width * rng.uniform(0.3, 0.7)), int(height * rng.uniform(0.3, 0.7)))
    ellipse = (centre, rng.integers(50, 150, 2).tolist(), rng.uniform(0, 180), 0, 360)
    colour = rng.uniform(-60, 60, 3).astype(np.float32)
    cv2.ellipse(label, *ellipse, index % CLASSES + 1, cv2.FILLED)
    image[label > 0] += colour
    cv2.ellipse(label, *ellipse, IGNORE, 5)  # VOC leaves such a rim out.
    image += GRAIN * rng.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8), label

"""Made-up photos and episodes, for a benchmark on machines without a data set."""

import math
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from qpenet_jax.benchmark.settings import Case
from qpenet_jax.core.types import IGNORE, Episode
from qpenet_jax.data.sources.prepared import Prepared
from qpenet_jax.data.transforms import binary_mask, fit, fit_label

PHOTOS, CLASSES = 64, 4
NOISE, QUALITY = 16.0, (cv2.IMWRITE_JPEG_QUALITY, 90)
"""Noise, in grey levels, and JPEG quality: files of about 90 kB, VOC's have 115."""

SHARES = (0.02, 0.4)
"""The share of a photo that its object covers: in VOC, padded, the middle 80 % of
objects of 2,048 pixels or more cover 2 to 41 %. The cost of attention depends on it."""


Files = tuple[Path, Path]
"""The files of a photo and of its label."""


def made_up_photo(
    index: int, megapixels: float = 0.1875
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Returns image `index` and its label: an ellipse of class index % 4 + 1.

    By default it has 500 x 375 or 375 x 500 pixels.
    """
    rng = np.random.default_rng(index)
    sides = [(4, 3), (3, 4)][index % 2]
    width, height = (round(n * math.sqrt(megapixels * 1e6 / 12)) for n in sides)
    image = np.full((height, width, 3), 128, np.float32)
    for cells, contrast in ((4, 50), (16, 25), (64, 15)):
        noise = rng.standard_normal((cells, cells, 3), np.float32)
        image += contrast * cv2.resize(noise, (width, height))
    scale = math.sqrt(rng.uniform(*SHARES) / math.pi)  # of the half axes
    axes = round(scale * width), round(scale * height)
    centre = (
        int(rng.integers(axes[0], width - axes[0])),
        int(rng.integers(axes[1], height - axes[1])),
    )
    label = np.zeros((height, width), np.uint8)
    cv2.ellipse(label, centre, axes, 0, 0, 360, index % CLASSES + 1, cv2.FILLED)
    image[label > 0] += rng.uniform(-60, 60, 3).astype(np.float32)
    cv2.ellipse(label, centre, axes, 0, 0, 360, IGNORE, 5)  # VOC leaves such a rim out.
    image += NOISE * rng.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8), label


def made_up_episodes(case: Case) -> Episode:
    """Returns the case's batch of episodes; every photo has an object of its own."""
    fitted = []
    for index in range(case.batch * (case.shots + 1)):
        image, label = made_up_photo(index)
        mask = binary_mask(label, index % CLASSES + 1)
        fitted.append((fit(image, case.size), fit_label(mask, case.size)))
    images, masks = map(np.stack, zip(*fitted, strict=True))
    shape = case.batch, case.shots + 1
    images, masks = (x.reshape(*shape, *x.shape[1:]) for x in (images, masks))
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:])


def write_photo(folder: Path, index: int, megapixels: float = 0.1875) -> Files:
    """Writes a photo as JPEG into images/, its label as PNG into masks/."""
    image, label = made_up_photo(index, megapixels)
    photo = folder / "images" / f"{index:05d}.jpg"
    mask = folder / "masks" / f"{index:05d}.png"
    for file in (photo, mask):
        file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(photo), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), QUALITY)
    cv2.imwrite(str(mask), label)
    return photo, mask


def made_up_photos(folder: Path, count: int = PHOTOS) -> Prepared:
    """Writes photos as JPEGs with labels, and prepares them as users prepare theirs."""
    # TFDS is imported where it is needed: it takes most of a second.
    from qpenet_jax.data.prepare.image_folder import prepare_folder

    names = [write_photo(folder, i)[0].stem for i in range(count)]
    classes = [f"class {c}" for c in range(1, CLASSES + 1)]
    (folder / "classes.txt").write_text("\n".join(classes))
    (folder / "train.txt").write_text("\n".join(names))
    return Prepared(prepare_folder(folder, folder / "prepared"), "train")

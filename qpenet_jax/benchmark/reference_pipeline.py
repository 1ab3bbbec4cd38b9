"""The opponent of `benchmark_data`: a plain float32 pipeline with OpenCV.

It does what most few-shot codes do: float32 from the file on, a padding mask of its own
beside the label, normalisation on the host. It applies the same draws as
`augmentation.augment`, so both make the same episodes.
"""

import functools
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from qpenet_jax.core.types import IGNORE, SegmentationDataset
from qpenet_jax.data.augmentation import MIN_FOREGROUND, Augmentation, ImageDraws, draw
from qpenet_jax.data.episodes import AUGMENT_STREAM, EpisodeIds, generator
from qpenet_jax.data.sources.prepared import Prepared
from qpenet_jax.data.sources.voc import VOCLayout

MEAN = 255 * np.array([0.485, 0.456, 0.406], np.float32)
STD = 255 * np.array([0.229, 0.224, 0.225], np.float32)


class Sample(NamedTuple):
    """One image of the opponent; `padding` is 255 where the image doesn't reach."""

    image: Float32[np.ndarray, "h w 3"]
    mask: UInt8[np.ndarray, "h w"]
    padding: UInt8[np.ndarray, "h w"]


def plain_episode(
    dataset: SegmentationDataset,
    ids: EpisodeIds,
    side: int,
    augmentation: Augmentation,
    seed: int,
) -> tuple[Sample, Sample]:
    """Makes the episode of `load_episode` in float32, normalised: query and supports."""

    def load(slot: int, item: int) -> Sample:
        image, label = _image(dataset, item), _label(dataset, item)
        mask = _mask(label, ids.class_id)
        rng = generator(seed, AUGMENT_STREAM, ids.index, slot)
        return plain_augment(image, mask, side, augmentation, rng)

    query = load(0, ids.query)
    supports = [load(slot, item) for slot, item in enumerate(ids.supports, start=1)]
    return query, Sample(*map(np.stack, zip(*supports, strict=True)))


def plain_augment(
    image: Float32[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "h w"],
    side: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> Sample:
    """Scales, rotate, blur, flip, crop and normalises, as `draw` says."""
    draws = draw(rng, augmentation, mask.shape, side)
    sample = _scale(Sample(image, mask, np.zeros_like(mask)), draws.scaled)
    if draws.angle:
        sample = _rotate(sample, draws.angle)
    if draws.blur:
        sample = sample._replace(image=_blur(sample.image))
    if draws.flip:
        sample = _flip(sample)
    sample = _crop(_pad(sample, side), side, draws)
    return sample._replace(image=_normalise(sample.image))


def _encoded(dataset: Prepared | VOCLayout, index: int, field: str) -> bytes:
    if isinstance(dataset, Prepared):
        return dataset._records[index][field]
    paths = dataset._images if field == "image" else dataset._masks
    return Path(paths[index]).read_bytes()


def _image(dataset: SegmentationDataset, index: int) -> np.ndarray:
    if not isinstance(dataset, Prepared | VOCLayout):
        return dataset.image(index).astype(np.float32)
    data = np.frombuffer(_encoded(dataset, index, "image"), np.uint8)
    image = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32)


def _label(dataset: SegmentationDataset, index: int) -> np.ndarray:
    if not isinstance(dataset, Prepared | VOCLayout):
        return dataset.label(index)
    # OpenCV would turn the indices of a palette file into the grey of its colours.
    return np.array(Image.open(BytesIO(_encoded(dataset, index, "mask"))))


def _mask(label: np.ndarray, class_id: int) -> np.ndarray:
    mask = np.zeros_like(label)
    mask[label == class_id] = 1
    mask[label == IGNORE] = IGNORE
    return mask


def _scale(sample: Sample, size: tuple[int, int]) -> Sample:
    height, width = size
    nearest = functools.partial(
        cv2.resize, dsize=(width, height), interpolation=cv2.INTER_NEAREST_EXACT
    )
    image = cv2.resize(sample.image, (width, height))
    return Sample(image, nearest(sample.mask), nearest(sample.padding))


def _rotate(sample: Sample, angle: float) -> Sample:
    height, width = sample.mask.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    turn = functools.partial(cv2.warpAffine, M=matrix, dsize=(width, height))
    mask, padding = (
        turn(array, flags=cv2.INTER_NEAREST, borderValue=IGNORE) for array in sample[1:]
    )
    return Sample(turn(sample.image, borderValue=MEAN.tolist()), mask, padding)


def _blur(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(image, (5, 5), 0)


def _flip(sample: Sample) -> Sample:
    return Sample(*(cv2.flip(array, 1) for array in sample))


def _pad(sample: Sample, side: int) -> Sample:
    height, width = (max(side - n, 0) for n in sample.mask.shape)
    if not height and not width:
        return sample
    top, left = height // 2, width // 2
    border = (top, height - top, left, width - left, cv2.BORDER_CONSTANT)
    image = cv2.copyMakeBorder(sample.image, *border, value=MEAN.tolist())
    mask, padding = (
        cv2.copyMakeBorder(array, *border, value=IGNORE) for array in sample[1:]
    )
    return Sample(image, mask, padding)


def _crop(sample: Sample, side: int, draws: ImageDraws) -> Sample:
    needed = MIN_FOREGROUND * np.count_nonzero(sample.mask == 1)
    crop = sample
    for top, left in draws.corners.tolist():
        crop = Sample(*(a[top : top + side, left : left + side] for a in sample))
        if np.count_nonzero(crop.mask == 1) >= needed:
            break
    return crop


def _normalise(image: np.ndarray) -> np.ndarray:
    return (image - MEAN) / STD

"""Training episodes before augmentation, which the device then does.

The host makes the draws and copies decoded images to one canvas; `device_augmentation`
does the rest. Images that are larger than the canvas the host augments by itself.
"""

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8

from qpenet_jax.core.types import Array, SegmentationDataset
from qpenet_jax.data.augmentation import Augmentation, Draws, draw, no_change
from qpenet_jax.data.episodes import AUGMENT_STREAM, EpisodeIds, generator
from qpenet_jax.data.host_augmentation import augment
from qpenet_jax.data.transforms import binary_mask, nearest, padding_apart

LARGEST_CANVAS = 1024
"""Side beyond which images don't enlarge the canvas: a batch of eight takes 34 MB."""

CANVAS_MULTIPLE = 32
"""Canvases are rounded up to it, so that similar data sets share a compilation."""


class DeviceDraws(NamedTuple):
    """The draws of an image, or of a batch, as the device needs them: arrays.

    Sizes and corners are (vertical, horizontal) in pixels: `size` is the image's own,
    `scaled` and `corners` are those of `Draws`. `nearest` are the rows and columns of
    the mask that its scaled rows and columns are; `source` maps (x, y, 1) of the turned
    image to x and y before.
    """

    size: Int32[Array, "*b 2"]
    scaled: Int32[Array, "*b 2"]
    nearest: Int32[Array, "*b 2 room"]
    source: Float32[Array, "*b 2 3"]
    blur: Bool[Array, "*b"]
    flip: Bool[Array, "*b"]
    corners: Int32[Array, "*b tries 2"]


class RawEpisode(NamedTuple):
    """An episode, or a batch, before augmentation: query first, then the supports.

    Images and masks lie top left on a canvas; what lies beside them is never read.
    """

    images: UInt8[Array, "*b slots canvas canvas 3"]
    masks: UInt8[Array, "*b slots canvas canvas"]
    draws: DeviceDraws


def canvas_side(sizes: Int[np.ndarray, "images 2"], side: int) -> int:
    """Returns the side of the canvas that holds every image, a multiple of 32.

    At most LARGEST_CANVAS, or what holds a crop of `side`.
    """
    longest = min(int(sizes.max()), max(LARGEST_CANVAS, side))
    return -(-longest // CANVAS_MULTIPLE) * CANVAS_MULTIPLE


def scaled_side(canvas: int, augmentation: Augmentation) -> int:
    """Returns the side that an image of a whole canvas can be scaled up to."""
    return max(round(canvas * max(augmentation.scale)), 1)


def load_raw_episode(
    dataset: SegmentationDataset,
    ids: EpisodeIds,
    canvas: int,
    side: int,
    augmentation: Augmentation,
    seed: int,
) -> RawEpisode:
    """Reads the images of an episode and makes the draws that `load_episode` makes.

    `canvas` is the side of the canvas (`canvas_side`), `side` that of the crop. What is
    larger than the canvas is augmented here, and the draws then change nothing.

    Raises:
        InputError: an image can't be used.
    """
    items = (ids.query, *ids.supports)
    images = np.zeros((len(items), canvas, canvas, 3), np.uint8)
    masks = np.zeros((len(items), canvas, canvas), np.uint8)
    room = max(scaled_side(canvas, augmentation), side)
    draws = []
    for slot, item in enumerate(items):
        image = dataset.image(item)
        mask = padding_apart(binary_mask(dataset.label(item), ids.class_id))
        rng = generator(seed, AUGMENT_STREAM, ids.index, slot)
        drawn = draw(rng, augmentation, mask.shape, side)
        if max(mask.shape) > canvas:
            image, mask = augment(image, mask, side, drawn)
            drawn = no_change(side)
        height, width = mask.shape
        images[slot, :height, :width] = image
        masks[slot, :height, :width] = mask
        draws.append(device_draws(drawn, (height, width), room))
    stacked = DeviceDraws(*map(np.stack, zip(*draws, strict=True)))
    return RawEpisode(images, masks, stacked)


def device_draws(draws: Draws, size: tuple[int, int], room: int) -> DeviceDraws:
    """Returns the draws of an image of height and width `size` as arrays.

    `room` is the side of the largest scaled image (`scaled_side`), in pixels.
    """
    indices = np.zeros((2, room), np.int32)
    for row, length, scaled in zip(indices, size, draws.scaled, strict=True):
        # Which of two pixels is the nearest to their edge depends on OpenCV's version:
        # it shall tell.
        row[:scaled] = nearest(np.arange(length, dtype=np.uint16)[None], scaled, 1)
    # Turning back about the same centre is the inverse.
    centre = (draws.scaled[1] / 2, draws.scaled[0] / 2)
    source = cv2.getRotationMatrix2D(centre, -draws.angle, 1.0)
    return DeviceDraws(
        np.array(size, np.int32),
        np.array(draws.scaled, np.int32),
        indices,
        source.astype(np.float32),
        np.array(draws.blur),
        np.array(draws.flip),
        draws.corners.astype(np.int32),
    )

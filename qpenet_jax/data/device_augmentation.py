"""Training augmentation on the device: what `augmentation.augment` does, by XLA.

The host makes the draws and copies decoded images to one canvas, the device does the
rest. Images that are larger than the canvas are augmented by the host.

OpenCV 5's sampling is followed: of 100 pixels about 99 are the host's, the others are
off by a grey level.
"""

import functools
from fractions import Fraction
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8

from qpenet_jax.core.types import IGNORE, Array, Episode
from qpenet_jax.data.augmentation import (
    MEAN_COLOUR,
    MIN_FOREGROUND,
    Augmentation,
    ImageDraws,
)
from qpenet_jax.data.transforms import episode_of, nearest


class DeviceDraws(NamedTuple):
    """The draws of an image, or of a batch, as the device needs them: arrays.

    Sizes and corners are (vertical, horizontal) in pixels: `size` is the image's own,
    `scaled` and `corners` are those of `ImageDraws`. `nearest` are the rows and columns
    of the mask that its scaled rows and columns are; `source` maps (x, y, 1) of the
    turned image to x and y before.
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


def scaled_side(canvas: int, augmentation: Augmentation) -> int:
    """Returns the side that an image of a whole canvas can be scaled up to."""
    return max(round(canvas * max(augmentation.scale)), 1)


def device_draws(draws: ImageDraws, size: tuple[int, int], room: int) -> DeviceDraws:
    """Returns the draws of an image of height and width `size` as arrays.

    `room` is the side of the largest scaled image (`scaled_side`), in pixels.
    """
    indices = np.zeros((2, room), np.int32)
    for row, length, scaled in zip(indices, size, draws.scaled, strict=True):
        # OpenCV's version decides which of two pixels is the nearest to their edge.
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


BLUR_REACH = 2
"""Neighbours each way of the five-tap blur, whose weights are (1, 4, 6, 4, 1) / 16."""

WEIGHT_BITS = 11
"""OpenCV resizes uint8 images with weights of so many bits."""

KEPT_SHARE = Fraction(MIN_FOREGROUND).limit_denominator(100)
"""The crop rule's share of the foreground, exact: 17 / 20."""


@functools.partial(jax.jit, static_argnames="side")
def augment_episodes(raw: RawEpisode, *, side: int) -> Episode:
    """Augments a batch on the device: `load_episode` of every episode, stacked.

    `side` is that of the result in pixels, as it was for the draws. Pure; every image
    is treated by itself, so that a batch may be split over devices.
    """
    augment_slots: Any = jax.vmap(functools.partial(augment_image, side=side))
    return jax.vmap(lambda *slots: episode_of(*augment_slots(*slots)))(*raw)


def augment_image(
    image: UInt8[Array, "canvas canvas 3"],
    mask: UInt8[Array, "canvas canvas"],
    draws: DeviceDraws,
    *,
    side: int,
) -> tuple[UInt8[Array, "s s 3"], UInt8[Array, "s s"]]:
    """Scales, turns, blurs, flips and crops an image and mask to `side` x `side`."""
    room = draws.nearest.shape[-1]  # the side of the largest scaled image
    label = _warped_mask(mask, draws, room)
    top, left = _crop(label == 1, draws, side)
    y, x = top + jnp.arange(side), left + jnp.arange(side)
    inside = _inside(y, draws.scaled[0])[:, None] & _inside(x, draws.scaled[1])
    label = label[y.clip(0, room - 1)[:, None], x.clip(0, room - 1)]
    colours = _blurred_window(_scale(image, draws, room), draws, top, left, side)
    mean = jnp.array(MEAN_COLOUR, jnp.uint8)
    return jnp.where(inside[..., None], colours, mean), jnp.where(inside, label, IGNORE)


def _inside(
    index: Int[Array, "..."], length: Int[Array, ""] | int
) -> Bool[Array, "..."]:
    return (index >= 0) & (index < length)


def _scale(
    image: UInt8[Array, "canvas canvas 3"], draws: DeviceDraws, room: int
) -> Int[Array, "room room 3"]:
    """Resizes the image bilinearly, half-pixel centres, in OpenCV's integers.

    First along the rows, then along the columns, with weights of 11 bits; OpenCV drops
    4, 16 and 2 bits on the way, rounding at the last.
    """
    vertical, horizontal = (
        _taps(draws.size[i], draws.scaled[i], room) for i in range(2)
    )
    near, far, weight = horizontal
    pixels = image.astype(jnp.int32)
    one, weight = 1 << WEIGHT_BITS, weight[:, None]
    pixels = pixels[:, near] * (one - weight) + pixels[:, far] * weight >> 4
    near, far, weight = vertical
    weight = weight[:, None, None]
    upper, lower = pixels[near] * (one - weight) >> 16, pixels[far] * weight >> 16
    return upper + lower + 2 >> 2


def _taps(length: Int[Array, ""], scaled: Int[Array, ""], room: int):
    """Returns the two source pixels of every pixel, and the second's weight."""
    # Pixel i lies at (i + 1/2) length / scaled - 1/2.
    position = ((2 * jnp.arange(room) + 1) * length - scaled) / (2 * scaled)
    near = jnp.floor(position).astype(jnp.int32)
    beyond = (near < 0) | (near >= length - 1)
    weight = jnp.round((position - near) * (1 << WEIGHT_BITS)).astype(jnp.int32)
    weight = jnp.where(beyond, 0, weight)
    near = near.clip(0, length - 1)
    return near, jnp.minimum(near + 1, length - 1), weight


def _source(
    y: Int[Array, " h"], x: Int[Array, " w"], draws: DeviceDraws
) -> tuple[Float32[Array, "h w"], Float32[Array, "h w"]]:
    """Returns where pixels of the turned and flipped image come from, y and x."""
    x = jnp.where(draws.flip, draws.scaled[1] - 1 - x, x)
    m, y = draws.source, y[:, None]
    return m[1, 0] * x + m[1, 1] * y + m[1, 2], m[0, 0] * x + m[0, 1] * y + m[0, 2]


def _warped_mask(
    mask: UInt8[Array, "canvas canvas"], draws: DeviceDraws, room: int
) -> UInt8[Array, "room room"]:
    """Scales, turns and flips the mask; both times the nearest pixel is taken."""
    grid = jnp.arange(room)
    y, x = (jnp.floor(c + 0.5).astype(jnp.int32) for c in _source(grid, grid, draws))
    inside = _inside(y, draws.scaled[0]) & _inside(x, draws.scaled[1])
    inside &= (grid < draws.scaled[0])[:, None] & (grid < draws.scaled[1])
    row = draws.nearest[0][y.clip(0, room - 1)]
    column = draws.nearest[1][x.clip(0, room - 1)]
    return jnp.where(inside, mask[row, column], IGNORE)


def _crop(
    foreground: Bool[Array, "room room"], draws: DeviceDraws, side: int
) -> Int[Array, "2"]:
    """Returns the corner of the first crop that keeps enough foreground, or the last.

    Relative to the image, so negative where padding comes first.
    """
    padding = jnp.maximum(side - draws.scaled, 0) // 2
    corners = draws.corners - padding
    offset = jnp.arange(foreground.shape[0]) - corners[..., None]
    rows, columns = jnp.moveaxis(_inside(offset, side), 1, 0)
    # 0 and 1 are exact in any precision, and float32 counts up to 2^24.
    counts = rows.astype(jnp.float32) @ foreground.astype(jnp.float32)
    kept = jnp.where(columns, counts, 0).sum(axis=-1).astype(jnp.int32)
    enough = kept * KEPT_SHARE.denominator >= foreground.sum() * KEPT_SHARE.numerator
    return corners[jnp.argmax(enough.at[-1].set(True))]


def _blurred_window(
    image: Int[Array, "room room 3"],
    draws: DeviceDraws,
    top: Int[Array, ""],
    left: Int[Array, ""],
    side: int,
) -> UInt8[Array, "s s 3"]:
    """Turns, flips and maybe blurs the part of the scaled image that the crop keeps.

    Flipping first changes nothing: the blur is symmetric.
    """
    window = jnp.arange(-BLUR_REACH, side + BLUR_REACH)
    y = _reflect(top + window, draws.scaled[0])
    x = _reflect(left + window, draws.scaled[1])
    turned = _bilinear(image, *_source(y, x, draws), draws.scaled)
    rows = _five_taps(turned, axis=0)
    blurred = _five_taps(rows, axis=1) + 128 >> 8
    sharp = turned[BLUR_REACH:-BLUR_REACH, BLUR_REACH:-BLUR_REACH]
    return jnp.where(draws.blur, blurred, sharp).astype(jnp.uint8)


def _reflect(index: Int[Array, " n"], length: Int[Array, ""]) -> Int[Array, " n"]:
    """Mirrors indices at the first and last pixel: OpenCV's BORDER_REFLECT_101."""
    period = jnp.maximum(2 * (length - 1), 1)
    index = index % period
    return jnp.minimum(index, period - index).clip(0, length - 1)


def _five_taps(image: Int[Array, "h w 3"], axis: int) -> Int[Array, "h2 w2 3"]:
    length = image.shape[axis] - 2 * BLUR_REACH
    taps = (
        weight * jax.lax.slice_in_dim(image, start, start + length, axis=axis)
        for start, weight in enumerate((1, 4, 6, 4, 1))
    )
    return functools.reduce(jnp.add, taps)


def _bilinear(
    image: Int[Array, "room room 3"],
    y: Float32[Array, "h w"],
    x: Float32[Array, "h w"],
    scaled: Int[Array, "2"],
) -> Int[Array, "h w 3"]:
    """Samples at real coordinates; outside lies the mean colour."""
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    mean = jnp.array(MEAN_COLOUR, jnp.int32)

    def tap(below: int, beside: int):
        row, column = top.astype(jnp.int32) + below, left.astype(jnp.int32) + beside
        inside = _inside(row, scaled[0]) & _inside(column, scaled[1])
        last = image.shape[0] - 1
        colours = image[row.clip(0, last), column.clip(0, last)]
        return jnp.where(inside[..., None], colours, mean).astype(jnp.float32)

    upper = tap(0, 0) * (1 - right) + tap(0, 1) * right
    lower = tap(1, 0) * (1 - right) + tap(1, 1) * right
    return jnp.round(upper * (1 - down) + lower * down).astype(jnp.int32)

"""Index masks in VOC's colours, and classes drawn over a photo in the same."""

import io
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qpenet_jax.evaluation.pictures import PREDICTION, Colour, overlay

RGB = UInt8[np.ndarray, "h w 3"]
Index = UInt8[np.ndarray, "h w"]


def voc_colour(index: int) -> Colour:
    """Returns the colour of a class: neighbours differ in the highest bits.

    Source: the VOC development kit, VOCcode/VOClabelcolormap.m.
    """
    red, green, blue = (
        sum((index >> 3 * step + channel & 1) << 7 - step for step in range(3))
        for channel in range(3)
    )
    return red, green, blue


PALETTE = [channel for index in range(256) for channel in voc_colour(index)]


def index_png(index: Index) -> bytes:
    """Returns a palette PNG that holds the classes, and shows VOC's colours."""
    image = Image.frombytes("P", index.shape[::-1], index.tobytes())
    image.putpalette(PALETTE)
    return _png(image)


def grey_png(pixels: Index) -> bytes:
    """Returns a mask as a grey PNG of 8 bits."""
    return _png(Image.fromarray(pixels))


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    # Masks are long runs of one value: a quarter of the time, and no larger.
    image.save(content, "PNG", compress_type=zlib.Z_RLE)
    return content.getvalue()


def class_overlay(image: RGB, index: Index, classes: int) -> RGB:
    """Tints and outline each class; several have the colours of their index mask."""
    if classes == 1:
        return overlay(image, index, PREDICTION)
    for number in range(1, classes + 1):
        mask = (index == number).astype(np.uint8)
        if mask.any():
            image = overlay(image, mask, voc_colour(number))
    return image

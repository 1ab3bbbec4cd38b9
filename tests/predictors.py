"""Stand-ins for a network, and what tests segment with them."""

import argparse

import numpy as np

from qpenet_jax import Segmenter
from qpenet_jax.cli import predict
from qpenet_jax.evaluation.predictor import Predictor

SIDE = 65

COLOURS = {"red": (250, 0, 0), "blue": (0, 0, 250)}


class Red(Predictor):
    """Red query pixels are foreground.

    It notes what it is asked to encode and to decode.
    """

    def __init__(self):
        self.encoded, self.decoded = [], []

    def encode(self, images, roles=("support", "query"), padding=None):
        self.encoded.append((roles, images))
        return images.astype(np.float32)

    def decode(self, supports, masks, query, *, named=False):
        self.decoded.append((supports, masks))
        return query[..., 0] - query[..., 1] - 60


class Colours(Predictor):
    """What has the marked pixels' mean colour is found."""

    def __init__(self):
        self.encoded = []
        self.segmenter = Segmenter(self, SIDE)

    def encode(self, images, roles=("support", "query"), padding=None):
        self.encoded.append(roles)
        return images.astype(np.float32)

    def decode(self, supports, masks, query, *, named=False):
        marked = np.concatenate(
            [x[0][m == 1] for x, m in zip(supports, masks[0], strict=True)]
        )
        return 3 - np.abs(query - marked.mean(0)).sum(-1) / 40


def picture(height, width):
    """A red left half on grey, and its mask."""
    image = np.full((height, width, 3), 128, np.uint8)
    image[:, : width // 2] = (255, 0, 0)
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 1
    return image, mask


def scene(height=90, width=120):
    """A red ring with a blue disc beside it on grey, and the classes of its pixels."""
    y, x = np.mgrid[:height, :width]
    away = np.hypot(y - height / 2, x - height / 2)
    index = np.zeros((height, width), np.uint8)
    index[(away < height * 0.45) & (away > height * 0.2)] = 1
    index[np.hypot(y - height / 2, x - width + height * 0.2) < height * 0.15] = 2
    colours = np.array([(128, 128, 128), *COLOURS.values()], np.uint8)
    return colours[index], index


def run_predict(segmenter, *words):
    """Run `qpenet predict` with a segmenter in place of the one that words choose."""
    parser = argparse.ArgumentParser()
    predict.add_options(parser)
    args = parser.parse_args([*map(str, words)])
    predict.segment(args, segmenter)

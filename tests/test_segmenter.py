"""The front door on arrays: sizes, shots, bad input (test_train.py uses a real run)."""

import numpy as np
import pytest

from qpenet_jax import InputError, Segmenter
from qpenet_jax.evaluation.predictor import Predictor

SIDE = 65


class Red:
    """A stand-in for the network: red query pixels are foreground.

    It notes what it is asked to encode and to decode.
    """

    def __init__(self):
        self.encoded, self.decoded = [], []
        self.predictor = Predictor(self.encode, self.decode)

    def encode(self, images, roles=("support", "query"), padding=None):
        self.encoded.append((roles, images))
        return images.astype(np.float32)

    def decode(self, supports, masks, query):
        self.decoded.append((supports, masks))
        return query[..., 0] - query[..., 1] - 60


SEGMENT = Segmenter(Red().predictor, SIDE)


def picture(height, width):
    """A red left half on grey."""
    image = np.full((height, width, 3), 128, np.uint8)
    image[:, : width // 2] = (255, 0, 0)
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 1
    return image, mask


@pytest.mark.parametrize("size", [(64, 64), (97, 40), (40, 97), (300, 500)])
def test_the_mask_has_the_querys_size_and_place(size):
    query, truth = picture(*size)
    support, support_mask = picture(50, 60)
    mask = SEGMENT(query, support, support_mask)
    assert mask.dtype == np.uint8
    assert mask.shape == size
    assert (mask == truth).mean() > 0.97


@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000)])
def test_extreme_sizes_work(size):
    support, support_mask = picture(50, 60)
    query = np.zeros((*size, 3), np.uint8)
    query[..., 0] = 255
    assert SEGMENT(query, support, support_mask).shape == size
    assert SEGMENT(query, support, support_mask).any()


def test_all_supports_reach_the_network():
    network = Red()
    supports = [picture(50, 60), picture(80, 30), picture(31, 31)]
    images, masks = zip(*supports, strict=True)
    Segmenter(network.predictor, SIDE)(picture(40, 40)[0], images, masks)
    ((encoded, seen),) = network.decoded
    assert [x.shape for x in encoded] == [(1, SIDE, SIDE, 3)] * 3
    assert seen.shape == (1, 3, SIDE, SIDE)
    assert (seen == 1).any((2, 3)).all()
    assert (seen == 255).any()  # padding counts nowhere


def test_supports_are_encoded_once_for_all_queries():
    """Ten queries at five shots are fifteen encodings."""
    network = Red()
    images, masks = zip(*[picture(40 + k, 50) for k in range(5)], strict=True)
    task = Segmenter(network.predictor, SIDE).learn(images, masks)
    assert [roles for roles, _ in network.encoded] == [("support",)] * 5
    for i in range(10):
        query, truth = picture(60, 40 + i)
        assert (task(query) == truth).mean() > 0.97
    assert [roles for roles, _ in network.encoded[5:]] == [("query",)] * 10


def test_a_probability_says_more_than_the_mask():
    image, mask = picture(40, 50)
    task = SEGMENT.learn(image, mask)
    query, truth = picture(90, 70)
    probability = task.probability(query)
    assert probability.shape == (90, 70)
    assert np.isfinite(probability).all()
    assert (probability >= 0).all()
    assert (probability <= 1).all()
    np.testing.assert_array_equal(probability > 0.5, task(query) == 1)
    assert (probability > 0.99)[truth == 1].mean() > 0.9


def test_masks_may_be_boolean_or_of_any_integer_type():
    network = Red()
    image, mask = picture(40, 50)
    for kind in (np.uint8, bool, np.int64):
        Segmenter(network.predictor, SIDE)(image, image, mask.astype(kind))
    (_, first), *others = network.decoded
    for _, masks in others:
        np.testing.assert_array_equal(masks, first)


def test_bad_input_is_told_in_one_line():
    image, mask = picture(40, 40)
    with pytest.raises(InputError, match="no foreground"):
        SEGMENT(image, image, np.zeros_like(mask))
    with pytest.raises(InputError, match="make them equal"):
        SEGMENT(image, image, mask[:-1])
    with pytest.raises(InputError, match="one mask for every support"):
        SEGMENT(image, [image, image], [mask])
    with pytest.raises(InputError, match="one mask for every support"):
        SEGMENT(image, [], [])
    with pytest.raises(InputError, match="uint8 RGB"):
        SEGMENT(image[..., 0], image, mask)
    with pytest.raises(InputError, match="uint8 RGB"):
        SEGMENT(image.astype(np.float32), image, mask)

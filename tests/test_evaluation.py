"""Scoring at three sizes."""

import cv2
import numpy as np
import pytest
from conftest import toy_protocol

from qpenet_jax.data.transforms import unpad
from qpenet_jax.evaluation.scoring import score


def counts_by_loop(prediction, mask):
    """Return background's and foreground's intersection and union, pixel by pixel."""
    counts = np.zeros(4, int)
    for found, truth in zip(prediction.ravel(), mask.ravel(), strict=True):
        if truth != 255:
            both = (found == 0 and truth == 0, found == 1 and truth == 1)
            either = (found == 0 or truth == 0, found == 1 or truth == 1)
            counts += np.array([both[0], either[0], both[1], either[1]])
    return tuple(counts)


def smooth_margin(side, seed=0):
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(side, 3)) @ rng.normal(size=(3, side))
    return waves.astype(np.float32)


def random_mask(*shape, seed=1):
    choice = np.random.default_rng(seed).choice([0, 1, 255], shape, p=[0.5, 0.4, 0.1])
    return choice.astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(50, 40), (20, 47), (9, 9)])
def test_original_stretches_to_a_square_of_the_longer_side(height, width):
    margin, mask = smooth_margin(33), random_mask(height, width)
    longest = max(height, width)
    at = np.linspace(0, 32, longest)
    rows = np.stack([np.interp(at, np.arange(33), column) for column in margin.T], 1)
    square = np.stack([np.interp(at, np.arange(33), row) for row in rows])
    canvas = np.full((longest, longest), 255)
    canvas[:height, :width] = mask
    counts = score(
        margin, np.zeros((33, 33), np.uint8), mask, toy_protocol(scoring="original")
    )
    assert counts == counts_by_loop(square > 0, canvas)


def test_input_counts_on_the_padded_square():
    margin, fitted = smooth_margin(33), random_mask(33, 33)
    counts = score(margin, fitted, random_mask(9, 50), toy_protocol(scoring="input"))
    assert counts == counts_by_loop(margin > 0, fitted)


def test_exact_undoes_the_padding():
    """128 x 64 pixels sit in 32 x 16 of the 33 x 33 cells: each is 4 x 4 pixels."""
    margin = np.full((33, 33), -1, np.float32)
    margin[8:16, 4:8] = 1
    margin[32:] = margin[:, 16:] = 100  # padding
    mask = np.zeros((128, 64), np.uint8)
    mask[32:64, 16:32] = 1
    counts = score(margin, random_mask(33, 33), mask, toy_protocol(scoring="exact"))
    # Linear interpolation rounds the corners of the rectangle off: one pixel each.
    area = 32 * 16
    assert counts == (128 * 64 - area, 128 * 64 - area + 4, area - 4, area)
    other = score(margin, random_mask(33, 33), mask, toy_protocol(scoring="original"))
    assert other[2] < area - 4, "the released protocol shifts the prediction"


@pytest.mark.parametrize("scoring", ["original", "exact"])
def test_squashed_predictions_are_stretched_back(scoring):
    margin, mask = smooth_margin(33), random_mask(50, 20)
    counts = score(
        margin,
        np.zeros((33, 33), np.uint8),
        mask,
        toy_protocol(scoring=scoring, resize="squash"),
    )
    assert counts == counts_by_loop(cv2.resize(margin, (20, 50)) > 0, mask)


@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 700), (375, 500), (473, 473)])
def test_unpad_returns_every_size_and_keeps_the_ends(size):
    side = 473
    down = np.repeat(np.arange(side, dtype=np.float32)[:, None], side, axis=1)
    content = unpad(down, *size)
    assert content.shape == size
    assert (np.diff(content, axis=0) >= 0).all()
    np.testing.assert_allclose(content, content[:, :1].repeat(size[1], axis=1))
    rows = {(1, 1): 472, (5000, 3): 472, (3, 700): 8, (375, 500): 352}.get(size, 472)
    middle = content[[(size[0] - 1) // 2, size[0] // 2], 0].mean()
    np.testing.assert_allclose(middle, (rows - 1) / 2, atol=0.6)
    assert content[0, 0] >= 0
    assert content[-1, 0] <= rows - 1

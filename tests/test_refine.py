"""Masks that follow the photo's edges."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from predictors import Colours, scene
from test_writers import iou

from qpenet_jax.masks.refine import SMOOTHNESS, Edges
from qpenet_jax.masks.tasks import Tiles


def by_regression(photo, given, radius):
    """The definition: in every window a ridge regression, then the mean of them all."""
    height, width, _ = photo.shape
    edge = ((radius, radius), (radius, radius))
    guide = np.pad(photo / 255, (*edge, (0, 0)), mode="symmetric")
    target = np.pad(given, edge, mode="symmetric").astype(float)
    slopes, starts = np.zeros((height, width, 3)), np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        window = np.s_[y : y + 2 * radius + 1, x : x + 2 * radius + 1]
        colours, values = guide[window].reshape(-1, 3), target[window].ravel()
        apart = colours - colours.mean(0)
        spread = apart.T @ apart / len(values) + SMOOTHNESS * np.eye(3)
        slopes[y, x] = np.linalg.solve(spread, apart.T @ values / len(values))
        starts[y, x] = values.mean() - slopes[y, x] @ colours.mean(0)
    means = []
    for found in (*np.moveaxis(slopes, -1, 0), starts):
        padded = np.pad(found, edge, mode="symmetric")
        windows = sliding_window_view(padded, (2 * radius + 1,) * 2)
        means.append(windows.mean((-1, -2)))
    *slopes, start = means
    return sum(s * photo[..., i] / 255 for i, s in enumerate(slopes)) + start


def test_it_is_the_guided_filter():
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (17, 14, 3), np.uint8)
    given = rng.random((17, 14), np.float32)
    expected = np.clip(by_regression(photo, given, 3), 0, 1)
    np.testing.assert_allclose(Edges(photo, 3)(given), expected, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 2), (7, 5)])
@pytest.mark.parametrize("cell", [0.1, 2.0, 60.0])
def test_odd_sizes_and_flat_photos_keep_what_is_there(size, cell):
    photo = np.full((*size, 3), 77, np.uint8)
    given = np.full(size, 0.7, np.float32)
    np.testing.assert_allclose(Edges(photo, cell)(given), given, atol=1e-3)


def test_tasks_refine_what_they_find():
    """The network sees 65 pixels, of a photo of 800: a step of 12 pixels."""
    photo, index = scene(600, 800)
    colours = {name: photo[index == i][:1] for i, name in enumerate(("red", "blue"), 1)}
    supports = {
        name: (np.tile(colour, (64, 64, 1)), np.ones((64, 64), bool))
        for name, colour in colours.items()
    }
    tasks = Colours().segmenter.learn_classes(supports)
    for tiles in (None, Tiles(400)):
        plain = tasks.find(photo, tiles)
        refined = tasks.find(photo, tiles, refine=True, probabilities=True)
        for i in (1, 2):
            before = iou(plain.index == i, index == i)
            assert iou(refined.index == i, index == i) > max(before, 0.98)
            assert refined.probabilities[i - 1].min() > 0

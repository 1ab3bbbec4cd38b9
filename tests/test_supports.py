"""No marked object falls between the cells of the network's grid."""

import numpy as np
import pytest

from qpenet_jax.data.supports import fit_objects, fit_support
from qpenet_jax.data.transforms import fit, fit_label, padding

SIDE = 161


def scene(size, *objects, value=1):
    """A grey picture with red marked rectangles (top, left, height, width)."""
    image = np.full((*size, 3), 90, np.uint8)
    mask = np.zeros(size, np.uint8)
    for top, left, height, width in objects:
        image[top : top + height, left : left + width] = (250, 10, 10)
        mask[top : top + height, left : left + width] = value
    return image, mask


def on_grid(square):
    return square[::8, ::8]


PLACES = [(37 * i % 2980, 131 * i % 3980, 10, 10) for i in range(60)]


def test_a_hundred_pixels_of_a_photograph_reach_the_network_wherever_they_are():
    """As evaluation fits it, most of these masks are empty on the grid of side 161."""
    vanished = 0
    for place in PLACES:
        image, mask = scene((3000, 4000), place)
        square, marked, _ = fit_support(image, mask, SIDE)
        cells = on_grid(marked) == 1
        assert cells.any()
        if not (on_grid(fit_label(mask, SIDE)) == 1).any():
            vanished += 1
            assert cells.sum() >= 4
            # What is marked is what the network sees there: the object, not the grey.
            assert (on_grid(square)[cells][:, 0] > 200).mean() > 0.7
    assert vanished > 40


@pytest.mark.parametrize("size", [(40, 50), (375, 500), (3000, 20), (1, 900)])
def test_a_support_that_the_grid_shows_is_fitted_as_in_evaluation(size):
    image, mask = scene(size, (0, 0, max(size[0] // 2, 1), max(size[1] // 2, 1)))
    mask[-1, -1] = 255
    square, marked, beside = fit_support(image, mask, SIDE)
    np.testing.assert_array_equal(square, fit(image, SIDE))
    np.testing.assert_array_equal(marked, fit_label(mask, SIDE))
    np.testing.assert_array_equal(beside, padding(*size, SIDE))


def test_a_small_object_beside_a_large_one_marks_the_cells_that_it_touches():
    image, mask = scene((800, 800), (0, 0, 300, 300), (666, 707, 6, 6))
    square, marked, _ = fit_support(image, mask, SIDE)
    np.testing.assert_array_equal(square, fit(image, SIDE))  # not cropped
    plain = on_grid(fit_label(mask, SIDE)) == 1
    gained = (on_grid(marked) == 1) & ~plain
    # Pixel 669 of 800 is pixel 134 of 161, nearest to cell 17 (pixel 136); 710 is 142.
    assert np.argwhere(gained).tolist() == [[17, 18]]
    assert not (plain & (on_grid(marked) != 1)).any()


def test_objects_far_apart_all_mark_a_cell():
    places = [(11, 13, 5, 5), (11, 1980, 5, 5), (1480, 13, 5, 5), (1480, 1980, 5, 5)]
    image, mask = scene((1500, 2000), *places)
    assert not (on_grid(fit_label(mask, SIDE)) == 1).any()
    _, marked, _ = fit_support(image, mask, SIDE)
    cells = np.argwhere(on_grid(marked) == 1)
    corners = {(row < 10, column < 10) for row, column in cells.tolist()}
    assert len(corners) == 4


@pytest.mark.parametrize("size", [(7, 3000), (3000, 7), (2999, 3001), (17, 17)])
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
@pytest.mark.parametrize("side", [17, 65, 473])
def test_one_pixel_in_a_corner_is_enough(size, corner, side):
    image, mask = scene(size)
    image[corner], mask[corner] = (250, 10, 10), 1
    square, marked, beside = fit_support(image, mask, side)
    assert square.shape == (side, side, 3)
    assert (on_grid(marked) == 1).any()
    assert not (marked[beside] == 1).any(), "padding is no object"


def test_ignored_pixels_stay_ignored():
    _, mask = scene((300, 300), (100, 100, 60, 60), value=255)
    mask[5:80, 5:80] = 1
    assert (fit_objects(mask, SIDE) == 255).sum() == (
        fit_label(mask, SIDE) == 255
    ).sum()

"""Silhouettes and rasteriser against analytic areas and OpenCV."""

import cv2
import numpy as np
import pytest

from qpenet_jax.data.sources import silhouettes as outlines


def _drawn(class_id: int, size: float, centre: tuple[float, float], side: int):
    contours = [c * size + np.array(centre) for c in outlines.outline(class_id)]
    return outlines.coverage(contours, (0, 0, side, side))


@pytest.mark.parametrize("size", [17.3, 40.0, 77.7])
def test_disc_and_square_have_their_analytic_place_and_area(size):
    y, x = np.mgrid[:120, :120] + 0.5
    dx, dy = np.abs(x - 60.2), np.abs(y - 58.7)
    disc = np.hypot(dx, dy) <= size / np.sqrt(np.pi)
    square = np.maximum(dx, dy) <= size / 2
    for name, truth in (("disc", disc), ("square", square)):
        class_id = list(outlines.OUTLINES).index(name) + 1
        cover = _drawn(class_id, size, (60.2, 58.7), 120)
        assert cover.sum() == pytest.approx(size**2, rel=0.005)
        mask = cover >= 0.5
        assert (mask & truth).sum() / (mask | truth).sum() > 0.98


@pytest.mark.parametrize("class_id", range(1, 21))
def test_rasteriser_agrees_with_opencv_at_sixteenfold_resolution(class_id):
    solids, holes = list(outlines.OUTLINES.values())[class_id - 1]
    points = np.concatenate(solids + holes)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    large = np.zeros((1600, 1600), np.uint8)
    for contours, value in ((solids, 1), (holes, 0)):
        for contour in contours:
            # `outline` scales to unit area; the extent gives the scale back.
            unit = np.concatenate(outlines.outline(class_id))
            zoom = np.ptp(unit, axis=0) / np.ptp(points, axis=0)
            pixels = ((contour - middle) * zoom * 40 + 50) * 16 - 0.5
            cv2.fillPoly(large, [np.round(pixels).astype(np.int32)], value)
    truth = cv2.resize(large.astype(np.float32), (100, 100), None, 0, 0, cv2.INTER_AREA)
    cover = _drawn(class_id, 40.0, (50, 50), 100)
    assert cover.sum() == pytest.approx(40.0**2, rel=0.01)
    assert cover.sum() == pytest.approx(truth.sum(), rel=0.03)
    np.testing.assert_allclose(cover, truth, atol=0.25)


def test_coverage_of_a_part_of_the_frame_is_that_part_of_the_whole():
    contours = [c * 60 + np.array([20.0, 70.0]) for c in outlines.outline(12)]
    whole = outlines.coverage(contours, (-60, -60, 160, 160))
    part = outlines.coverage(contours, (0, 0, 80, 90))
    np.testing.assert_allclose(part, whole[60:140, 60:150][:80], atol=1e-6)

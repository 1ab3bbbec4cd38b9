"""The procedural data set: pure, exactly labelled, balanced; how it is rasterised."""

import pickle

import cv2
import numpy as np
import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.sources import scenes as painting
from qpenet_jax.data.sources import shapes, silhouettes
from qpenet_jax.data.sources.scenes import scene
from qpenet_jax.data.sources.shapes import Shapes

CLASS_IDS = range(1, 21)


@pytest.fixture(scope="module")
def train() -> Shapes:
    return Shapes("train", size=300)


def test_twenty_named_classes_fit_the_contract(train):
    assert isinstance(train, SegmentationDataset)
    dataset: SegmentationDataset = train
    assert len(set(dataset.classes)) == 20
    assert len(dataset) == len(set(dataset.names)) == 300
    assert dataset.image(0).shape == (161, 161, 3)
    assert dataset.image(0).dtype == dataset.label(0).dtype == np.uint8
    assert Shapes("val", size=1, side=97).label(0).shape == (97, 97)


def test_an_image_depends_on_seed_split_and_index_alone(train):
    other = Shapes("train", size=10)
    backwards = {i: (other.image(i), other.label(i)) for i in (9, 4, 0)}
    for i, (image, label) in backwards.items():
        np.testing.assert_array_equal(train.image(i), image)
        np.testing.assert_array_equal(train.label(i), label)
    copy = pickle.loads(pickle.dumps(train))
    assert copy == train
    np.testing.assert_array_equal(copy.image(7), train.image(7))


@pytest.mark.parametrize(
    "other", [Shapes("val", size=3), Shapes("train", size=3, seed=1)]
)
def test_splits_and_seeds_are_different_streams(train, other):
    seen = {train.label(i).tobytes() for i in range(300)}
    for i in range(3):
        assert other.label(i).tobytes() not in seen
        assert (other.image(i) != train.image(i)).mean() > 0.9


def test_counts_are_those_of_the_labels(train):
    assert train.counts.shape == (300, 20)
    for i in (0, 123, 299):
        label = train.label(i)
        np.testing.assert_array_equal(
            train.counts[i], [(label == c).sum() for c in CLASS_IDS]
        )
        # Nothing but background, the twenty classes and no 255.
        assert train.counts[i].sum() == (label > 0).sum() > 0
        assert label.max() <= 20


def test_every_class_is_frequent_and_large_enough(train):
    share = train.counts / 161**2
    assert (share > 0).sum(axis=0).min() >= 20
    assert (share >= 2048 / 161**2).sum(axis=0).min() >= 10
    assert (share[share > 0] >= 0.02).mean() > 0.98
    # Enough images are without the novel classes of each fold.
    shown = train.counts.reshape(300, 4, 5).any(axis=2)
    assert ((~shown).mean(axis=0) > 0.35).all()


def test_images_hold_several_objects_and_sometimes_two_of_a_class():
    rngs = map(np.random.default_rng, range(300))
    ids = [[t.class_id for t in scene(r, 161) if t.class_id] for r in rngs]
    assert {len(i) for i in ids} == {2, 3, 4}
    repeats = np.mean([len(set(i)) < len(i) for i in ids])
    assert 0.05 < repeats < 0.4


def test_each_fold_uses_five_patterns_and_each_pattern_two_folds():
    folds = np.array([painting.pattern_of(c) for c in CLASS_IDS]).reshape(4, 5)
    assert all(len(set(fold)) == 5 for fold in folds)
    assert set(np.bincount(folds.ravel(), minlength=len(painting.PATTERNS))) == {2}


def test_the_label_covers_what_the_image_shows(monkeypatch):
    def white_objects(rng, saturation, contrast):
        white = (saturation, contrast) == painting.VIVID
        return np.full((2, 3, 1, 1), white, np.float32)

    monkeypatch.setattr(painting, "_two_colours", white_objects)
    monkeypatch.setattr(shapes, "PIXEL_NOISE", 0.0)
    dataset = Shapes("val", size=20)
    for i in range(20):
        shown = dataset.image(i)[..., 0] > 0.4 * 255
        objects = (dataset.label(i) > 0).astype(np.uint8)
        # Half-covered pixels on an edge are between black and white.
        edge = cv2.morphologyEx(objects, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        wrong = (shown != objects) & (edge == 0)
        assert wrong.sum() <= 3


@pytest.mark.parametrize(
    "bad",
    [{"split": "test"}, {"size": 0}, {"side": 8}, {"seed": -1}],
)
def test_a_value_or_an_index_that_cannot_be_drawn_is_named(train, bad):
    with pytest.raises(InputError, match=str(next(iter(bad.values())))):
        Shapes(**{"split": "train", "size": 3, **bad})
    for index in (-1, 300):
        with pytest.raises(IndexError, match=f"{index} of 300"):
            train.label(index)


# --- Silhouettes and rasteriser against analytic areas and OpenCV ---


def drawn(class_id: int, size: float, centre: tuple[float, float], side: int):
    contours = [c * size + np.array(centre) for c in silhouettes.outline(class_id)]
    return silhouettes.coverage(contours, (0, 0, side, side))


@pytest.mark.parametrize("size", [17.3, 40.0, 77.7])
def test_disc_and_square_have_their_analytic_place_and_area(size):
    y, x = np.mgrid[:120, :120] + 0.5
    dx, dy = np.abs(x - 60.2), np.abs(y - 58.7)
    disc = np.hypot(dx, dy) <= size / np.sqrt(np.pi)
    square = np.maximum(dx, dy) <= size / 2
    for name, truth in (("disc", disc), ("square", square)):
        class_id = list(silhouettes.OUTLINES).index(name) + 1
        cover = drawn(class_id, size, (60.2, 58.7), 120)
        assert cover.sum() == pytest.approx(size**2, rel=0.005)
        mask = cover >= 0.5
        assert (mask & truth).sum() / (mask | truth).sum() > 0.98


@pytest.mark.parametrize("class_id", range(1, 21))
def test_rasteriser_agrees_with_opencv_at_sixteenfold_resolution(class_id):
    solids, holes = list(silhouettes.OUTLINES.values())[class_id - 1]
    points = np.concatenate(solids + holes)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    large = np.zeros((1600, 1600), np.uint8)
    for contours, value in ((solids, 1), (holes, 0)):
        for contour in contours:
            # `outline` scales to unit area; the extent gives the scale back.
            unit = np.concatenate(silhouettes.outline(class_id))
            zoom = np.ptp(unit, axis=0) / np.ptp(points, axis=0)
            pixels = ((contour - middle) * zoom * 40 + 50) * 16 - 0.5
            cv2.fillPoly(large, [np.round(pixels).astype(np.int32)], value)
    truth = cv2.resize(large.astype(np.float32), (100, 100), None, 0, 0, cv2.INTER_AREA)
    cover = drawn(class_id, 40.0, (50, 50), 100)
    assert cover.sum() == pytest.approx(40.0**2, rel=0.01)
    assert cover.sum() == pytest.approx(truth.sum(), rel=0.03)
    np.testing.assert_allclose(cover, truth, atol=0.25)


def test_coverage_of_a_part_of_the_frame_is_that_part_of_the_whole():
    contours = [c * 60 + np.array([20.0, 70.0]) for c in silhouettes.outline(12)]
    whole = silhouettes.coverage(contours, (-60, -60, 160, 160))
    part = silhouettes.coverage(contours, (0, 0, 80, 90))
    np.testing.assert_allclose(part, whole[60:140, 60:150][:80], atol=1e-6)

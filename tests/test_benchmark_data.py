"""The benchmark of loading: the float32 pipeline, made-up photos, rates and parts."""

import cv2
import numpy as np
import pytest

from qpenet_jax.benchmark.loading_speed import (
    BATCH,
    MEAN,
    STD,
    load_float32,
    loading_speed,
    normalised,
    throughput,
)
from qpenet_jax.benchmark.made_up import made_up_photo, made_up_photos
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.data.episodes import EpisodeIds
from qpenet_jax.data.loader import load_episode
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.sources.voc import VOCLayout


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return made_up_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def voc(write_voc, tmp_path_factory):
    root = write_voc(tmp_path_factory.mktemp("data") / "voc", images=9, classes=3)
    return VOCLayout(root, root / "ids.txt", ("a", "b", "c"))


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation((0.2, 2))])
@pytest.mark.parametrize("side", [97, 473])
def test_both_pipelines_make_the_same_episodes(photos, side, augmentation):
    """In uint8 and in float32: same random values, order, windows, paddings."""
    ids = EpisodeIds(index=5, query=0, class_id=1, supports=(4, 8))
    options = ids, side, augmentation, 3
    images, masks = load_float32(photos, *options)
    episode = load_episode(photos, *options)
    assert images.dtype == np.float32
    assert images.shape == (3, side, side, 3)
    assert (masks == [episode.query_mask, *episode.support_masks]).all()
    grey_levels = images * STD + MEAN
    expected = np.stack([episode.query_image, *episode.support_images])
    # Roundings to uint8 after scale, rotation and blur.
    assert np.abs(grey_levels - expected).max() < 2.5


def test_normalisation():
    image = np.full((9, 9, 3), (0, 255, 124), np.float32)
    expected = [-0.485 / 0.229, (1 - 0.456) / 0.224, (124 / 255 - 0.406) / 0.225]
    np.testing.assert_allclose(normalised(image)[5, 5], expected, rtol=1e-5)


def test_made_up_photos(photos):
    assert len(photos) == 64
    sizes = {photos.image(i).shape for i in range(4)}
    assert sizes == {(375, 500, 3), (500, 375, 3)}
    for i in (0, 1, 63):
        image, label = made_up_photo(i)
        assert (photos.label(i) == label).all()
        assert np.abs(photos.image(i).mean((0, 1)) - image.mean((0, 1))).max() < 2
    # Each is listed for its class, whose id follows its number.
    large = photos.counts >= 2048
    assert (large == (np.arange(64)[:, None] % 4 == np.arange(4))).all()


@pytest.mark.parametrize(
    ("dataset", "shots"), [(Shapes("train", 60, side=97), (1,)), (None, (1, 2))]
)
def test_loading_speed(dataset, shots):
    threads = cv2.getNumThreads()
    settings = Settings(size=97, shots=shots, seconds=0.01, workers=(0,))
    one_core, parts, grain = loading_speed(settings, dataset)
    assert cv2.getNumThreads() == threads
    assert f"{60 if dataset else 64} images" in one_core.caption
    ways = ("float32", "host", "device")
    found = [(row["shots"], row["variant"]) for row in one_core.rows]
    assert found == [(number, way) for number in shots for way in ways]
    for row in one_core.rows:
        low, middle, high = row["ratio"]
        assert 0 < low <= middle <= high
        assert row["episodes/s"] == pytest.approx(1e3 / row["ms"][1])
        assert row["images/s"] == row["episodes/s"] * (row["shots"] + 1)
    assert [row["part"] for row in parts.rows][-2:] == [
        "convert to float32",
        "normalise",
    ]
    assert min(row["ms"][0] for row in parts.rows) > 0
    found = [(row["augments"], row["shots"], row["workers"]) for row in grain.rows]
    both = ("host", "device")
    assert found == [(where, number, 0) for where in both for number in shots]
    for row in grain.rows:
        assert row["images/s"] == row["episodes/s"] * (row["shots"] + 1)
        assert row["images/s per worker"] == row["images/s"] > 1


class Counter:
    """A sampler of episodes that are their own number."""

    shots = 1

    def __call__(self, index):
        return index


def test_rate_of_a_stream():
    clock = iter(np.arange(10.0, 20.0, 0.5)).__next__
    found = throughput(np.int64, Counter(), 0, 2.0, clock)  # pyright: ignore
    # At 10.5, 11.0, 11.5 it goes on, at 12.0 it ends; 12.5 is the end.
    assert found["episodes/s"] == 4 * BATCH / 2.5


def test_no_episodes(voc):  # Its objects have 45 x 45 pixels: too few.
    with pytest.raises(InputError, match="list of episodes is empty"):
        list(loading_speed(Settings(size=97, seconds=0.05), voc))

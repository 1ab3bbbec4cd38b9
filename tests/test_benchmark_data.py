"""The benchmarks of data: loading beside float32, evaluations, what `predict` takes."""

import itertools

import cv2
import numpy as np
import pytest
import tiny

from qpenet_jax import load
from qpenet_jax.benchmark.episode_speed import (
    BATCH,
    evaluation_speed,
    load_float32,
    loading_speed,
    made_up_configs,
    throughput,
)
from qpenet_jax.benchmark.made_up import made_up_photo, made_up_photos, write_photo
from qpenet_jax.benchmark.prediction_speed import (
    PARTS,
    each_photo,
    prediction_speed,
    tasks_of,
)
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.data.episodes import EpisodeIds
from qpenet_jax.data.images import read_image
from qpenet_jax.data.loader import load_episode
from qpenet_jax.masks.queries import find_queries
from qpenet_jax.masks.writers import MaskWriter, segment_files
from qpenet_jax.runs.build import complete

# --- loading ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return made_up_photos(tmp_path_factory.mktemp("photos"))


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
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    grey_levels = 255 * (images * std + mean)
    expected = np.stack([episode.query_image, *episode.support_images])
    # Roundings to uint8 after scale, rotation and blur.
    assert np.abs(grey_levels - expected).max() < 2.5


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


def small_config(**changes):
    config = tiny.get_config()
    config.dataset.update(changes)
    return complete(config)


@pytest.mark.parametrize(("images", "shots"), [(60, (1,)), (64, (1, 2))])
def test_loading_speed(images, shots):
    config = small_config(side=97) if images == 60 else None
    threads = cv2.getNumThreads()
    sizes = {"size": 97, "shots": shots, "seconds": 0.01, "workers": (0,)}
    one_core, grain = loading_speed(Settings(**sizes, config=config))
    assert cv2.getNumThreads() == threads
    assert f"{images} images" in one_core.caption
    found = [(row["shots"], row["variant"]) for row in one_core.rows]
    assert found == [*itertools.product(shots, ("float32", "host", "device"))]
    for row in one_core.rows:
        low, middle, high = row["ratio"]
        assert 0 < low <= middle <= high
        assert row["episodes/s"] == pytest.approx(1e3 / row["ms"][1])
        assert row["images/s"] == row["episodes/s"] * (row["shots"] + 1)
    found = [(row["augments"], row["shots"], row["workers"]) for row in grain.rows]
    assert found == [*itertools.product(("host", "device"), shots, (0,))]
    for row in grain.rows:
        assert row["images/s"] == row["episodes/s"] * (row["shots"] + 1)
        assert row["images/s"] > 1


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


def test_no_episodes():  # Its images are too small for objects of 2,048 pixels.
    settings = Settings(size=97, seconds=0.05, config=small_config())
    with pytest.raises(InputError, match="list of episodes is empty"):
        list(loading_speed(settings))


# --- evaluations ------------------------------------------------------------------


def test_an_evaluation_of_a_config():
    dtype = ("bfloat16",)  # of the settings; the config's is taken
    settings = Settings(shots=(1, 2), episodes=3, dtype=dtype, config=small_config())
    ((_, rows),) = evaluation_speed(settings)
    assert [row["shots"] for row in rows] == [1, 2]
    for row in rows:
        expected = {"dtype": "float32", "episodes": 3, "seeds": 1, "backbone": "tiny"}
        assert row | expected == row
        assert "Shapes" in row["protocol"]
        times = row["evaluation, ms per episode"], row["one prediction, ms"]
        assert min(times) > 0
        assert row["ratio"] == pytest.approx(times[0] / times[1])


@pytest.mark.standard_promotion
def test_an_evaluation_of_made_up_images_in_every_dtype():
    dtypes, sizes = ("float32", "bfloat16"), {"size": 65, "episodes": 2}
    settings = Settings(dtype=dtypes, backbone="tiny", network={"channels": 8}, **sizes)
    for config in made_up_configs(settings):
        assert (config.side, config.dataset.side) == (65, 65)
        assert config.model.channels == 8
    ((_, rows),) = evaluation_speed(settings)
    assert [(row["dtype"], row["episodes"]) for row in rows] == [(d, 2) for d in dtypes]


# --- predictions ------------------------------------------------------------------


def test_photos_are_segmented_as_predict_does(tmp_path):
    support = write_photo(tmp_path / "supports", 0, 0.1)
    query, _ = write_photo(tmp_path, 1, 0.2)
    height, width = read_image(query).shape[:2]
    assert height * width == pytest.approx(2e5, rel=0.01)
    segmenter = load(method="prototype", overrides=["--config.side=65"])
    tasks = tasks_of(segmenter, [support])
    (row,) = each_photo({1: tasks}, [query], tmp_path / "out")
    assert min(row[f"{part}, ms"] for part in PARTS) > 0
    writer = MaskWriter(tmp_path / "b", ("object",), ("png",))
    segment_files(tasks.find, find_queries([query], recursive=False), writer)
    one, two = (tmp_path / n / f"{query.stem}.png" for n in ("out/1", "b"))
    assert one.read_bytes() == two.read_bytes()
    assert np.unique(read_image(one)).size == 2


@pytest.mark.slow
def test_waiting_times_of_predict(tmp_path):
    settings = Settings(shots=(1, 2), photos=3, size=65)
    first, photos = prediction_speed(settings, (0.05, 0.1), starts=1)
    assert "Starter, 65 pixels: from the start of a process" in first.caption
    (row,) = first.rows
    assert min(row["cold, s"], *row["cached, s"]) > 0
    assert "3 photos of 0.05 to 0.1 megapixels" in photos.caption
    assert [row["shots"] for row in photos.rows] == [1, 2]
    for row in photos.rows:
        assert min(row[f"{part}, ms"] for part in PARTS) > 0
        assert row["masks/s"] > 0
    assert photos.rows[0]["time of 1 shot"] == 1
    nowhere = Settings(photos=1, workdir=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"qpenet_jax\.cli failed: error: .*nowhere"):
        list(prediction_speed(nowhere, (0.05,), starts=1))

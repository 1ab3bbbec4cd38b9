import json
import re
import threading

import cv2
import numpy as np
import pytest

from qpenet_jax.benchmark import loading_speed as data
from qpenet_jax.benchmark import stages
from qpenet_jax.benchmark.loading_speed import benchmark_data
from qpenet_jax.benchmark.made_up import made_up_photo, made_up_photos
from qpenet_jax.benchmark.reference_pipeline import (
    MEAN,
    STD,
    plain_augment,
    plain_episode,
)
from qpenet_jax.benchmark.speed_tables import loading_report
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.augmentation import Augmentation, augment, draw
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler
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


@pytest.fixture(scope="module")
def voc_photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc_photos")
    for folder in ("JPEGImages", "SegmentationClassAug"):
        (root / folder).mkdir()
    names = [str(i) for i in range(12)]
    for name in names:
        image, label = made_up_photo(int(name))
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), image[..., ::-1])
        cv2.imwrite(str(root / "SegmentationClassAug" / f"{name}.png"), label)
    (root / "ids.txt").write_text("\n".join(names))
    return VOCLayout(root, root / "ids.txt", ("a", "b", "c", "d"))


def grey_levels(image: np.ndarray) -> np.ndarray:
    return image * STD + MEAN


def test_the_opponent_makes_what_augment_makes():
    """Fields of uint8 against float32: same draws, order, windows, paddings."""
    image, label = made_up_photo(0)
    image = cv2.GaussianBlur(image, (0, 0), 2)
    mask = np.where(label == 1, 1, 0).astype(np.uint8)
    largest = []
    for seed in range(12):
        for side, augmentation in ((473, Augmentation()), (97, Augmentation((0.2, 2)))):
            rngs = [np.random.default_rng(seed) for _ in range(2)]
            draws = draw(rngs[0], augmentation, mask.shape, side)
            ours, our_mask = augment(image, mask, side, draws)
            plain = plain_augment(
                image.astype(np.float32), mask, side, augmentation, rngs[1]
            )
            assert plain.image.dtype == np.float32
            assert (plain.mask == our_mask).all()
            # The image has no ignored pixels of its own.
            assert (plain.padding == np.where(our_mask == 255, 255, 0)).all()
            assert rngs[0].random() == rngs[1].random()
            largest.append(np.abs(grey_levels(plain.image) - ours).max())
    assert max(largest) < 2.5  # Roundings to uint8 after scale, rotation and blur.


@pytest.mark.parametrize("kind", ["photos", "voc"])
def test_the_opponent_makes_the_same_episodes(kind, request):
    dataset = request.getfixturevalue(kind)
    ids = EpisodeIds(index=5, query=0, class_id=1, supports=(4, 8))
    still = Augmentation((1.0, 1.0), rotate=0.0, blur=False)
    query, supports = plain_episode(dataset, ids, 97, still, 3)
    episode = load_episode(dataset, ids, 97, still, 3)
    assert supports.image.shape == (2, 97, 97, 3)
    for plain, image, mask in (
        (query, episode.query_image, episode.query_mask),
        (supports, episode.support_images, episode.support_masks),
    ):
        assert (plain.mask == mask).all()
        # 255 * mean isn't whole, where we pad.
        assert np.abs(grey_levels(plain.image) - image).max() < 0.5


def test_normalisation_of_the_opponent():
    image = np.full((9, 9, 3), (0, 255, 124), np.float32)
    mask = np.zeros((9, 9), np.uint8)
    still = Augmentation((1.0, 1.0), rotate=0.0, blur=False, flip=False)
    sample = plain_augment(image, mask, 11, still, np.random.default_rng(0))
    expected = [-0.485 / 0.229, (1 - 0.456) / 0.224, (124 / 255 - 0.406) / 0.225]
    np.testing.assert_allclose(sample.image[5, 5], expected, rtol=1e-5)
    assert not sample.image[0].any()
    assert sample.padding.sum() == 255 * (121 - 81)


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


OPENCV = (
    "cvtColor",
    "GaussianBlur",
    "LUT",
    "copyMakeBorder",
    "flip",
    "imdecode",
    "merge",
    "resize",
    "warpAffine",
)


@pytest.fixture
def clock(monkeypatch):
    """Let a second pass at each of OpenCV's operations, a millisecond at a reading.

    As this thread sees it: how far Grain's threads are is a matter of luck.
    """
    now, thread = [0.0], threading.get_ident()

    def read():
        now[0] += 1e-3
        return now[0]

    def lasting(operation):
        def one_second(*args, **options):
            now[0] += threading.get_ident() == thread
            return operation(*args, **options)

        return one_second

    monkeypatch.setattr(data, "perf_counter", read)
    monkeypatch.setattr(stages, "perf_counter", read)
    for name in OPENCV:
        monkeypatch.setattr(cv2, name, lasting(getattr(cv2, name)))
    return read


def check(result):
    json.dumps(result)
    for row in result["one_core"]:
        rate = row["episodes_per_s"] / row["plain_episodes_per_s"]
        assert row["ratio"] == pytest.approx(rate)
        low, high = row["ratio_quartiles"]
        assert 0 < low <= high
    times = dict(result["stages"])
    totals = times.pop("all")
    for total, parts in zip(totals, zip(*times.values(), strict=True), strict=True):
        # All that OpenCV does is part of a stage: what lies between them are readings.
        assert sum(parts) < total < sum(parts) + 50
    assert [name for name, (ours, _) in times.items() if not ours] == ["normalise"]
    assert all(plain > 0 for _, plain in times.values())


@pytest.mark.parametrize("dataset", ["voc", "shapes", None])
def test_benchmark(dataset, voc_photos, clock):
    threads = cv2.getNumThreads()
    images = {"voc": voc_photos, "shapes": Shapes("train", 60, side=97)}.get(dataset)
    result = benchmark_data(images, side=97, shots=(1, 2), seconds=0.01, workers=(0,))
    check(result)
    assert cv2.getNumThreads() == threads
    assert [row["shots"] for row in result["one_core"]] == [1, 2]
    grain = [(r["augmenting"], r["shots"], r["workers"]) for r in result["grain"]]
    both = ("host", "device")
    assert grain == [(where, shots, 0) for where in both for shots in (1, 2)]
    assert result["images"] == {"voc": 12, "shapes": 60, None: 64}[dataset]
    assert all(r["episodes_per_s"] > 1 for r in result["grain"])
    loading_report(result)


class Counter:
    """A sampler of episodes that are their own number."""

    shots = 1

    def __call__(self, index):
        return index


def test_rate_of_a_stream(monkeypatch):
    readings = iter(np.arange(10.0, 20.0, 0.5))
    monkeypatch.setattr(data, "perf_counter", lambda: next(readings))
    found = data._throughput(np.int64, Counter(), 0, seconds=2.0)  # pyright: ignore
    # At 10.5, 11.0, 11.5 it goes on, at 12.0 it ends; 12.5 is the end.
    assert found["episodes_per_s"] == 4 * data.BATCH / 2.5


def test_stages_count_the_functions_of_this_thread_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stages, "perf_counter", lambda: now[0])

    class Source:
        def image(self, seconds):
            now[0] += seconds
            return seconds

    source, found = Source(), []

    def load(ids):
        found.append(source.image(3.0))
        other = threading.Thread(target=source.image, args=(0.5,))
        other.start()
        other.join()
        found.append(source.image(4.0))
        now[0] += ids

    original = Source.image
    places = {"read": [(Source, "image")], "nothing": []}
    seconds = stages.stage_seconds(load, 2.0, places)  # pyright: ignore
    assert seconds == {"read": 7.0, "nothing": 0.0, "all": 9.5}
    assert found == [3.0, 4.0]
    assert Source.image is original


def test_stages_are_per_image(monkeypatch, photos):
    monkeypatch.setattr(stages, "EPISODES", 3)
    monkeypatch.setattr(
        stages,
        "stage_seconds",
        lambda load, ids, table: dict.fromkeys(table, load(ids)) | {"all": 2.0},
    )
    sampler = EpisodeSampler(photos.counts, (1, 2, 3, 4), 1, 0)
    found = stages.stages(photos, sampler, lambda ids: 0.5, lambda ids: 0.25)
    assert found.pop("all") == [1000.0, 1000.0]  # of 3 x 2 images
    assert list(found.values()) == [[250.0, 125.0]] * 8


def test_no_episodes(voc):  # Its objects have 45 x 45 pixels: too few.
    with pytest.raises(InputError, match="list of episodes is empty"):
        benchmark_data(voc, side=97, seconds=0.05)


def test_markdown():
    result = {
        "machine": "a machine",
        "data": "photos",
        "images": 7,
        "side": 473,
        "one_core": [
            {
                "shots": 5,
                "rounds": 9,
                "episodes_per_s": 50.04,
                "raw_episodes_per_s": 100.0,
                "plain_episodes_per_s": 20.0,
                "ratio": 2.502,
                "ratio_quartiles": [2.4, 2.6],
            }
        ],
        "grain": [
            {"shots": 1, "workers": 0, "episodes_per_s": 100.0, "augmenting": "host"},
            {"shots": 5, "workers": 2, "episodes_per_s": 60.0, "augmenting": "device"},
        ],
        "stages": {"blur": [0.25, 1.0], "all": [1.0, 2.0]},
    }
    lines = re.sub(" +", " ", loading_report(result)).splitlines()
    assert "Training episodes at 473 pixels from photos, 7 images." in lines
    assert "a machine." in lines
    assert "| 5 | 50.0 | 300 | 20.0 | 120 | 2.50 (2.40-2.60) | 100.0 | 600 |" in lines
    assert "| host | 1 | 0 (a thread) | 100.0 | 200 | 200 |" in lines
    assert "| device | 5 | 2 | 60.0 | 360 | 180 |" in lines
    assert "| blur | 0.250 | 25% | 1.000 | 50% |" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert sum("--" in line for line in tables) == 3

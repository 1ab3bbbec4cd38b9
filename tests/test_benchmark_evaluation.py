"""The time of a whole evaluation, and the waiting times of `qpenet predict`."""

import numpy as np
import pytest
import tiny

from qpenet_jax import load
from qpenet_jax.benchmark import prediction_speed
from qpenet_jax.benchmark.evaluation_speed import evaluation_speed, made_up_config
from qpenet_jax.benchmark.made_up import write_photo
from qpenet_jax.benchmark.prediction_speed import PARTS, each_photo, tasks_of
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import read_image
from qpenet_jax.masks.queries import find_queries
from qpenet_jax.masks.writers import MaskWriter, segment_files
from qpenet_jax.runs.build import complete

NETWORK = {"channels": 8}


def test_an_evaluation_of_a_config():
    config = complete(tiny.get_config())
    settings = Settings(shots=(1, 2), episodes=3, dtype=("bfloat16",))
    rows = evaluation_speed(settings, config).rows
    assert [row["shots"] for row in rows] == [1, 2]
    for row in rows:
        assert row["dtype"] == "float32", "the config's, not the settings'"
        assert row["episodes"] == 3
        assert row["seeds"] == 1
        assert row["backbone"] == "tiny"
        assert "Shapes" in row["protocol"]
        times = row["evaluation, ms per episode"], row["one prediction, ms"]
        assert min(times) > 0
        assert row["ratio"] == pytest.approx(times[0] / times[1])


@pytest.mark.standard_promotion
def test_an_evaluation_of_made_up_images_in_every_dtype():
    dtypes, sizes = ("float32", "bfloat16"), {"size": 65, "episodes": 2}
    settings = Settings(dtype=dtypes, backbone="tiny", network=NETWORK, **sizes)
    config = made_up_config(settings, "bfloat16")
    assert (config.side, config.dataset.side) == (65, 65)
    assert config.model.channels == 8
    rows = evaluation_speed(settings).rows
    assert [row["dtype"] for row in rows] == [*dtypes]
    assert {row["episodes"] for row in rows} == {2}


def test_photos_are_segmented_as_predict_does(tmp_path):
    support = write_photo(tmp_path / "supports", 0, 0.1)
    query, _ = write_photo(tmp_path, 1, 0.2)
    height, width = read_image(query).shape[:2]
    assert height * width == pytest.approx(2e5, rel=0.01)
    segmenter = load(method="prototype", overrides=["--config.side=65"])
    tasks = tasks_of(segmenter, [support])
    times = each_photo({1: tasks}, [query], tmp_path / "out")
    assert times[1].shape == (1, len(PARTS))
    assert times[1].min() > 0
    queries = find_queries([query], recursive=False)
    segment_files(
        tasks.find, queries, MaskWriter(tmp_path / "b", ("object",), ("png",))
    )
    one, two = (tmp_path / n / f"{query.stem}.png" for n in ("out/1", "b"))
    assert one.read_bytes() == two.read_bytes()
    assert np.unique(read_image(one)).size == 2


@pytest.mark.slow
def test_waiting_times_of_predict(tmp_path):
    settings = Settings(shots=(1, 2), photos=3, size=65)
    first, photos = prediction_speed.prediction_speed(settings, (0.05, 0.1), starts=1)
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
        list(prediction_speed.prediction_speed(nowhere, (0.05,), starts=1))

import subprocess

import numpy as np
import pytest

from qpenet_jax import load
from qpenet_jax.benchmark import prediction_speed as predict
from qpenet_jax.benchmark import processes
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.benchmark.speed_tables import benchmark_report
from qpenet_jax.cli.main import main
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import read_image
from qpenet_jax.masks.queries import find_queries
from qpenet_jax.masks.writers import MaskWriter, segment_files

SETTINGS = Settings(("predict",), shots=(1, 2), photos=3, size=65)


@pytest.fixture
def in_this_process(monkeypatch):
    """Run what would be started; return the words of every command."""
    commands = []

    def run(command, *, env, **_):
        assert "JAX_COMPILATION_CACHE_DIR" in env
        assert command[1:4] == ["-P", "-m", "qpenet_jax.cli"]
        commands.append(command[4:])
        main(command[4:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(processes.subprocess, "run", run)
    monkeypatch.setattr(predict, "STARTS", 2)
    monkeypatch.setattr(predict, "MEGAPIXELS", (0.05, 0.1))
    return commands


def test_it_times_what_predict_does(in_this_process, capsys):
    found = predict.prediction(SETTINGS)
    capsys.readouterr()
    assert len(in_this_process) == 3
    assert found["first_mask"]["cold"] > 0
    assert all(seconds > 0 for seconds in found["first_mask"]["cached"])
    assert list(found["photos"]) == [1, 2]
    for parts in found["photos"].values():
        assert set(parts) == set(predict.PARTS)
        assert all(len(times) == 3 and min(times) > 0 for times in parts.values())
    facts = {"device": "d", "platform": "cpu", "cpu": "c", "cores": 2, "python": "3"}
    facts |= {"versions": {}, "date": "today"}
    report = benchmark_report({"facts": facts, "cases": [], "predict": found})
    assert "Starter, 65 pixels: from the start of a process" in report
    assert "3 photos of 0.05 to 0.1 megapixels" in report
    assert report.count("\n| 1 ") == report.count("\n| 2 ") == 1


def test_masks_are_those_of_predict(tmp_path):
    support = predict._photo(tmp_path / "supports", 0, 0.1)
    query, _ = predict._photo(tmp_path / "queries", 1, 0.2)
    height, width = read_image(query).shape[:2]
    assert height * width == pytest.approx(2e5, rel=0.01)
    segmenter = load(method="prototype", overrides=predict._side(SETTINGS))
    tasks = predict.tasks_of(segmenter, [support])
    queries = find_queries([query], recursive=False)
    for name in "ab":
        results = MaskWriter(tmp_path / name, ("object",), ("png",))
        if name == "a":
            assert len(predict._timed(tasks, queries[0], results)) == 3
        else:
            segment_files(tasks.find, queries, results)
    one, two = ((tmp_path / name / f"{query.stem}.png").read_bytes() for name in "ab")
    assert one == two
    assert np.unique(read_image(tmp_path / "a" / f"{query.stem}.png")).size == 2


def test_a_process_that_fails_is_told(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 2, stderr="error: no such run\n")
    monkeypatch.setattr(processes.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(predict, "MEGAPIXELS", (0.05,))
    with pytest.raises(InputError, match="qpenet predict failed: error: no such run"):
        predict.prediction(SETTINGS)


def test_no_photos_are_refused():
    with pytest.raises(InputError, match="--photos 0: give 1 or more"):
        Settings(("predict",), photos=0)

"""The verdict over the first steps of training, each line of it."""

import re

import pytest
from commands import qpenet, tiny
from test_health import ALIVE

from qpenet_jax.training.preflight import GIB, Step, findings, memory

GOOD = ALIVE | {"loss": 1.5, "grad_norm": 4.0}


def steps(count=100, waited=0.01, took=0.5, **changes):
    return [Step(None, 36_000, GOOD | changes, waited, took)] * count


def verdict(taken, used=(("GPU 0", 10 * GIB, 80 * GIB),)):
    return {f.name: (f.good, f.text) for f in findings(taken, 36_000, used)}


def test_a_healthy_run_passes_everywhere():
    found = verdict(steps())
    assert list(found) == ["finite", "heads", "loading", "memory", "to go"]
    assert all(good for good, _ in found.values())
    assert "at most 4.0" in found["finite"][1]
    assert "y_pre 0.30 (25% empty)" in found["heads"][1]
    assert "2% of the time" in found["loading"][1]
    assert "peak 10.0 of 80.0 GiB" in found["memory"][1]
    assert "36,000 steps of 0.50 s = 5.0 hours" in found["to go"][1]


NAN, INF = float("nan"), float("inf")
FULL = [("GPU 0", 79 * GIB, 80 * GIB)]


@pytest.mark.parametrize(
    ("name", "taken", "words"),
    [
        ("finite", steps(3) + steps(1, loss=NAN), "loss is nan from step 4 on"),
        ("finite", steps(3) + steps(1, grad_norm=INF), "grad_norm is inf from step 4 "),
        ("finite", steps(9) + steps(1, grad_norm=918.0) + steps(9), "918.0.*unstable"),
        ("memory", steps(), "config.batch_size"),
    ],
)
def test_what_is_not_finite_unstable_or_full_is_bad(name, taken, words):
    good, text = verdict(taken, FULL)[name]
    assert not good
    assert re.search(words, text)


def test_what_counts_are_the_last_steps_for_heads_and_all_but_the_first_for_times():
    dead = {"empty_rev": 1.0}
    assert verdict(steps(100, **dead) + steps(60))["heads"][0]
    good, text = verdict(steps(60) + steps(60, **dead))["heads"]
    assert not good
    assert "y_rev has found nothing" in text
    first = steps(20, waited=9.0, took=30.0)
    passed = verdict(first + steps(80))
    assert passed["loading"][0]
    assert "of 0.50 s" in passed["to go"][1]
    good, text = verdict(first + steps(80, waited=0.2))["loading"]
    assert not good
    assert "40% of the time" in text
    assert "config.workers" in text


def run(tmp_path, **changes):
    result = qpenet(*tiny(tmp_path / "run", **changes), "--check")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists(), "a check writes nothing"
    return result


@pytest.mark.standard_promotion
def test_the_check_ends_with_a_verdict(tmp_path):
    """Small images of noise-like training: alive or not, it is said and returned."""
    result = run(tmp_path, steps=30)
    assert "the first 30 of 30 steps, recipe stable" in result.stdout
    for line in ("finite", "heads", "loading", "memory", "to go"):
        assert f"  {line}" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("verdict: ")
    assert result.returncode == (0 if last == "verdict: go ahead" else 1)
    assert all(0 < peak < limit for _, peak, limit in memory())


@pytest.mark.standard_promotion
def test_the_check_fails_where_training_diverges(tmp_path):
    changes = {"optimizer__name": "sgd", "optimizer__lr": 1e30, "steps": 30}
    result = run(tmp_path, **changes)
    assert result.returncode == 1
    assert "BAD  finite" in result.stdout
    assert "verdict: do not start: finite" in result.stdout

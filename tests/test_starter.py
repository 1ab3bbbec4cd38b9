"""The starter: the package's own network in the mean with self-support."""

import json
import math

import jax
import numpy as np
import pytest
from PIL import Image
from predictors import picture
from test_cli import refused

from qpenet_jax import InputError, load
from qpenet_jax.cli.main import main
from qpenet_jax.evaluation.training_free import SHARPNESS, mean_margin
from qpenet_jax.runs.build import build_predictor, build_self_support_predictor
from qpenet_jax.runs.folder import open_run
from qpenet_jax.segmenter import STARTER

SIDE = 65
OVERRIDES = [f"--config.side={SIDE}"]


@pytest.fixture(scope="module")
def starter():
    return load(overrides=OVERRIDES)


def probability(margin):
    return 1 / (1 + np.exp(-np.asarray(margin, np.float64)))


def test_its_probability_is_the_mean_of_two(starter):
    supports = [picture(SIDE - 1, SIDE - 1), picture(64, 40)]
    images, masks = zip(*supports, strict=True)
    query, _ = picture(48, SIDE - 1)
    task = starter.learn(images, masks)
    view = task.view(query)
    run = open_run(STARTER)
    network = build_predictor(run.config, run.params, run.weights)
    free = build_self_support_predictor(run.config, run.weights)
    of_network, of_free = (
        predict.decode(tuple(part), task.masks, seen)[0, :48, :64]
        for predict, part, seen in zip(
            (network, free), zip(*task.supports, strict=True), view.encoded, strict=True
        )
    )
    mean = (probability(of_network) + probability(SHARPNESS * of_free)) / 2
    np.testing.assert_allclose(probability(task.margin(view)), mean, atol=1e-5)
    np.testing.assert_allclose(task.probability(query), mean, atol=1e-5)
    np.testing.assert_array_equal(task(query), mean > 0.5)
    assert {"y_pre", "A_main", "y_bg_q", "y_rev", "cosines"} <= task.intermediates(
        query
    ).keys()


def test_far_margins_stay_finite():
    """A logit of 200 is a probability of 1 in float32, and its logit infinite."""
    margins = np.float32([[200.0, -200.0, 200.0], [200.0, -200.0, 0.0]])
    margin = mean_margin(*margins)
    np.testing.assert_allclose(margin, [200, -200, math.log(3)], rtol=1e-6)


def test_predict_takes_it_where_nothing_is_said(tmp_path, capsys):
    image, mask = picture(64, 64)
    Image.fromarray(image).save(tmp_path / "a.png")
    words = ["predict", "--support", f"{tmp_path / 'a.png'}:box=0,0,32,64", "--query"]
    words += [tmp_path / "a.png", "--out", tmp_path / "out"]
    main([str(w) for w in (*words, *OVERRIDES)])
    found = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert found.any()
    starter = load(overrides=OVERRIDES)
    np.testing.assert_array_equal(found == 255, starter(image, image, mask) == 1)
    summary = json.loads((tmp_path / "out/predictions.json").read_text())
    assert (summary["method"], summary["run"]) == ("starter", None)
    capsys.readouterr()
    for options, part in (
        (["--backbone=efficientnet_lite0"], "has a backbone of its own"),
        (["--workdir", STARTER], "has a network of its own"),
        (["--config.model.channels=16"], "only side and dtype can be changed"),
        (["--config.sid=65"], "only side and dtype can be changed"),
    ):
        assert part in refused(capsys, *words, "--method=starter", *options)


def test_its_size_is_473_unless_one_is_given(starter):
    assert load().side == 473
    assert starter.side == SIDE
    with pytest.raises(InputError, match="side"):
        load(overrides=["--config.side=0"])


def test_what_is_shipped_is_whole_and_small():
    run = open_run(STARTER)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.params))
    assert sum(file.stat().st_size for file in STARTER.iterdir()) < 12e6
    card = (STARTER / "README.md").read_text()
    for part in ("license: apache-2.0", "## Data", "## Results", "## Known failures"):
        assert part in card

"""`--method prototype`: segments without training, over any backbone."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from predictors import picture
from test_cli import refused

from qpenet_jax import InputError, load
from qpenet_jax.backbones.convert import load_weights, save_weights
from qpenet_jax.backbones.registry import backbone, features
from qpenet_jax.cli.main import main
from qpenet_jax.data.transforms import fit, fit_label
from qpenet_jax.evaluation.training_free import self_supported
from qpenet_jax.segmenter import COSINE_SCALE, DEFAULT_BACKBONE, STARTER

SIDE = 65
OVERRIDES = [f"--config.side={SIDE}"]


@pytest.fixture(scope="module")
def segmenter():
    return load(method="prototype", overrides=OVERRIDES)


def test_it_mixes_prototypes_of_supports_and_query(segmenter):
    supports = [picture(SIDE - 1, SIDE - 1), picture(64, 40)]
    images, masks = zip(*supports, strict=True)
    query, truth = picture(48, SIDE - 1)
    task = segmenter.learn(images, masks)
    net, weights = backbone(DEFAULT_BACKBONE), load_weights(DEFAULT_BACKBONE)
    fitted = np.stack([fit(image, SIDE) for image in (*images, query)])
    maps = features(net, weights, fitted)
    squares = np.stack([fit_label(mask, SIDE) for mask in masks])[None]
    photo = np.zeros((1, 9, 9), bool)
    photo[:, :6, :8] = True  # beside and below there is no photo
    logits, _ = self_supported(maps[None, :2], squares, maps[2:], photo)
    margin = np.asarray(task.margin(task.view(query)))
    np.testing.assert_allclose(
        margin / COSINE_SCALE,
        (logits[0, :48, :64, 1] - logits[0, :48, :64, 0]),
        atol=1e-4,
    )
    assert 0.5 < task.probability(query)[truth == 1].mean() < 1
    seen = task.intermediates(query)
    assert {name: x.shape[:2] for name, x in seen.items()} == dict.fromkeys(
        ("cosines", "sure_background", "sure_foreground"), (9, 9)
    )


def test_predict_needs_no_run(tmp_path, capsys):
    image, mask = picture(64, 64)
    Image.fromarray(image).save(tmp_path / "a.png")
    words = ["predict", "--support", f"{tmp_path / 'a.png'}:box=0,0,32,64", "--query"]
    words += [tmp_path / "a.png", "--out", tmp_path / "out"]
    main([str(w) for w in (*words, "--method=prototype", "--config.side=321")])
    found = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert ((found == 255) == mask).mean() > 0.9
    summary = json.loads((tmp_path / "out/predictions.json").read_text())
    assert (summary["method"], summary["run"]) == ("prototype", None)
    capsys.readouterr()
    assert "needs the folder" in refused(capsys, *words, "--method=qpenet")
    given = ("--workdir", tmp_path, "--backbone=resnet50", "--method=prototype")
    assert "has a backbone of its own" in refused(capsys, *words, *given)
    given = ("--backbone=resnet50",)
    assert "resnet50 needs a weight file" in refused(capsys, *words, *given)


def test_the_weights_of_a_backbone_may_be_given(segmenter, tmp_path):
    file = tmp_path / "w.safetensors"
    arrays = jax.tree.map(np.asarray, load_weights(DEFAULT_BACKBONE))
    save_weights(file, DEFAULT_BACKBONE, arrays, source=Path(__file__))
    image, mask = picture(50, 64)
    own = load(backbone=DEFAULT_BACKBONE, weights=file, overrides=OVERRIDES)
    np.testing.assert_array_equal(
        own(image, image, mask), segmenter(image, image, mask)
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prototype", {"backbone": "resnet50"}, "needs a weight file"),
        ("prototype", {"backbone": "resnet"}, "unknown backbone"),
        ("prototype", {"overrides": ["--config.sidee=65"]}, "no such .* field: sidee"),
        ("qpenet", {}, "method qpenet needs the folder"),
        ("sam", {}, "method 'sam': choose starter, qpenet, prototype"),
    ],
)
def test_what_cannot_be_loaded_is_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        load(method=method, **options)


def test_it_takes_the_backbone_of_a_run(segmenter):
    run = load(STARTER, method="prototype")
    assert run.side == 241
    image, mask = picture(50, 64)
    expected = dataclasses.replace(segmenter, side=241)(image, image, mask)
    np.testing.assert_array_equal(run(image, image, mask), expected)

"""Every config file builds its model, optimiser and step."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpenet_jax.backbones.registry import DEEP
from qpenet_jax.core.types import Episode
from qpenet_jax.runs.experiment import Experiment

CONFIGS = sorted(
    path.stem for path in (Path(__file__).resolve().parents[1] / "configs").glob("*.py")
)
PASCAL_STEPS = [210400, 186200, 137600, 225400]  # 200 epochs of the filtered images


def experiment(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.lock()
    return Experiment(config)


def test_there_is_a_config_for_every_fold():
    folds = {f"{data}_fold{i}" for data in ("pascal", "coco") for i in range(4)}
    assert folds | {"quickstart", "voc_subset_fold2"} <= set(CONFIGS)


def check_step(ours):
    """Trace a step of this experiment's network."""
    tx = ours.optimizer.build(10)
    state = jax.eval_shape(lambda: ours.init(tx))
    b, k, side = ours.config.batch_size, ours.config.shots, ours.config.side
    pixels = jax.ShapeDtypeStruct((b, k, side, side, 3), jnp.uint8)
    masks = jax.ShapeDtypeStruct((b, k, side, side), jnp.uint8)
    batch = Episode(
        jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8),
        jax.ShapeDtypeStruct((b, side, side), jnp.uint8),
        pixels,
        masks,
    )
    images = jnp.zeros((1, 33, 33, 3))
    net, key = ours.backbone, jax.random.key(0)
    weights = dict(jax.eval_shape(net.module.init, key, images)["params"])
    if ours.is_released_network:
        layer3 = jnp.zeros((1, 5, 5, 1024))
        weights[DEEP] = jax.eval_shape(net.deep.init, key, layer3)["params"]
    step = ours.train_step(tx)
    after, metrics = jax.eval_shape(step, state, weights, batch, key)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics["loss"].shape == ()


@pytest.fixture(scope="module")
def traced():
    """The networks that were traced: nothing of a step depends on the data set."""
    return set()


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_its_model_and_step(name, traced):
    ours = experiment(name)
    fields = json.loads(ours.config.to_json())
    del fields["dataset"]
    network = json.dumps(fields, sort_keys=True)
    if network not in traced:
        check_step(ours)
        traced.add(network)


@pytest.mark.parametrize("fold", range(4))
def test_the_papers_settings(fold):
    for data in ("pascal", "coco"):
        ours = experiment(f"{data}_fold{fold}")
        assert ours.config.dataset.fold == fold
        assert ours.config.backbone.name == "resnet50"
        assert (ours.config.side, ours.config.batch_size) == (473, 4)
        assert ours.optimizer.name == "sgd"
        schedule = ours.optimizer.schedule(1000)
        np.testing.assert_allclose(schedule(0), 0.025)
        np.testing.assert_allclose(schedule(500), 0.025 * 0.5**0.9, rtol=1e-6)
    assert ours.fold.novel[:2] == (fold + 1, fold + 5)
    pascal = experiment(f"pascal_fold{fold}")
    filtered = [4208, 3726, 2752, 4510][fold]
    assert pascal.steps(filtered) == PASCAL_STEPS[fold]
    assert pascal.protocol().episodes == 1000
    assert ours.protocol().episodes == 4000


def test_the_released_settings():
    for data, epochs in (("pascal", 100), ("coco", 50)):
        ours = experiment(f"released_{data}")
        assert ours.config.backbone.name == "resnet50_deepstem"
        assert (ours.config.epochs, ours.config.behaviour) == (epochs, "auto")
        schedule = ours.optimizer.schedule(1000)
        # t = 1 .. T: the last of the steps 0 .. T - 1 has rate 0.
        np.testing.assert_allclose(schedule(0), 0.025 * 0.999**0.9, rtol=1e-6)
        assert schedule(999) == 0
        assert ours.model.channels == 256
        assert ours.model.background_scale == 0

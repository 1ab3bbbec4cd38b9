"""Every config file builds its model, optimiser and step."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpenet_jax.backbones.registry import DEEP
from qpenet_jax.config import LISTS, default_config, flat
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.config_files import override

CONFIGS = sorted(
    path.stem for path in (Path(__file__).resolve().parents[1] / "configs").glob("*.py")
)
PASCAL_STEPS = [210400, 186200, 137600, 225400]  # 200 epochs of the filtered images


def config(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.lock()
    return complete(config)


def test_there_is_a_config_for_every_fold():
    folds = {f"{data}_fold{i}" for data in ("pascal", "coco") for i in range(4)}
    assert folds | {"quickstart", "voc_subset_fold2"} <= set(CONFIGS)


def check_step(ours):
    """Trace a step of this config's network."""
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
    ours = config(name)
    fields = json.loads(ours.config.to_json())
    del fields["dataset"]
    network = json.dumps(fields, sort_keys=True)
    if network not in traced:
        check_step(ours)
        traced.add(network)


@pytest.mark.parametrize("fold", range(4))
def test_the_papers_settings(fold):
    for data in ("pascal", "coco"):
        ours = config(f"{data}_fold{fold}")
        assert ours.config.dataset.fold == fold
        assert ours.config.backbone.name == "resnet50"
        assert (ours.config.side, ours.config.batch_size) == (473, 4)
        assert ours.optimizer.name == "sgd"
        schedule = ours.optimizer.schedule(1000)
        np.testing.assert_allclose(schedule(0), 0.025)
        np.testing.assert_allclose(schedule(500), 0.025 * 0.5**0.9, rtol=1e-6)
    assert ours.fold.novel[:2] == (fold + 1, fold + 5)
    pascal = config(f"pascal_fold{fold}")
    filtered = [4208, 3726, 2752, 4510][fold]
    assert pascal.steps(filtered) == PASCAL_STEPS[fold]
    assert pascal.protocol().episodes == 1000
    assert ours.protocol().episodes == 4000


def test_the_released_settings():
    for data, epochs in (("pascal", 100), ("coco", 50)):
        ours = config(f"released_{data}")
        assert ours.config.backbone.name == "resnet50_deepstem"
        assert (ours.config.epochs, ours.config.behaviour) == (epochs, "auto")
        schedule = ours.optimizer.schedule(1000)
        # t = 1 .. T: the last of the steps 0 .. T - 1 has rate 0.
        np.testing.assert_allclose(schedule(0), 0.025 * 0.999**0.9, rtol=1e-6)
        assert schedule(999) == 0
        assert ours.model.channels == 256
        assert ours.model.background_scale == 0


@pytest.mark.parametrize(
    "word",
    [
        "augmentation.scale=0.5",
        "augmentation.scale=0.5,1,2",
        "augmentation.scale=1.1,0.9",
        "augmentation.scale=0,1",
        "augmentation.scale=-1,1",
        "augmentation.scale=a,b",
        "augmentation.scale=1,1e999",
        "augmentation.scale=()",
        "augmentation.rotate=-5",
        "augmentation.rotate=nan",
        "eval.seeds=0,0",
        "eval.seeds=0,1.5",
        "eval.seeds=a",
        "eval.seeds=-1",
        "eval.focus=('dog','dog')",
        "eval.focus=5",
        "dataset.novel=('cat','dog','cat')",
        "dataset.novel=5",
        "backbone.stages=('layer2','layer2')",
        "backbone.stages=5",
        "model.prototypes=('pre','pre')",
        "model.prototypes=1,2",
    ],
)
def test_a_range_or_list_that_says_nothing_is_refused(word):
    with pytest.raises(InputError, match=word.partition("=")[0]) as told:
        complete(override(default_config(), [f"--config.{word}"])).protocol()
    assert "\n" not in str(told.value)


def test_every_tuple_of_the_config_is_checked():
    """A new field of several values has to be a list, or to check itself."""
    fields = flat(default_config().to_dict()).items()
    tuples = {name for name, value in fields if isinstance(value, tuple)}
    assert tuples == {*LISTS, "augmentation.scale"}


def test_ranges_that_say_something_are_taken():
    for scale in ((1.0, 1.0), (0.5, 2), (1, 1)):
        assert Augmentation(scale=scale).scale == scale
    ours = complete(override(default_config(), ["--config.eval.seeds=3,0"]))
    assert ours.protocol().seeds == (3, 0)

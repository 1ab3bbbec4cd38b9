"""Every config file builds its model, optimiser and step."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from untrained import traced_step

from qpenet_jax.config import LISTS, default_config, flat
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.runs.build import build_model, complete
from qpenet_jax.runs.config_files import override
from qpenet_jax.runs.datasets import build_fold, build_protocol, training_steps

CONFIGS = sorted(
    path.stem for path in (Path(__file__).resolve().parents[1] / "configs").glob("*.py")
)
PASCAL_STEPS = [210400, 186200, 137600, 225400]  # 200 epochs of the filtered images


def read(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.lock()
    return complete(config)


@pytest.mark.standard_promotion
def test_every_config_builds_its_model_and_step():
    """Folds differ in the data set alone: each other network is traced once."""
    traced = set()
    for name in CONFIGS:
        config = read(name)
        fields = json.loads(config.to_json())
        del fields["dataset"]
        network = json.dumps(fields, sort_keys=True)
        if network not in traced:
            assert traced_step(config)["loss"].shape == ()
            traced.add(network)


@pytest.mark.parametrize("fold", range(4))
def test_the_papers_settings(fold):
    pascal, coco = (read(f"{data}_fold{fold}") for data in ("pascal", "coco"))
    for config in (pascal, coco):
        assert config.dataset.fold == fold
        assert config.backbone.name == "resnet50"
        assert (config.side, config.batch_size) == (473, 4)
        assert config.optimizer.name == "sgd"
        schedule = Optimizer(**config.optimizer).schedule(1000)
        np.testing.assert_allclose(schedule(0), 0.025)
        np.testing.assert_allclose(schedule(500), 0.025 * 0.5**0.9, rtol=1e-6)
    assert build_fold(coco).novel[:2] == (fold + 1, fold + 5)
    filtered = [4208, 3726, 2752, 4510][fold]
    assert training_steps(pascal, filtered) == PASCAL_STEPS[fold]
    assert build_protocol(pascal).episodes == 1000
    assert build_protocol(coco).episodes == 4000


def test_the_released_settings():
    for data, epochs in (("pascal", 100), ("coco", 50)):
        config = read(f"released_{data}")
        assert config.backbone.name == "resnet50_deepstem"
        assert (config.epochs, config.behaviour) == (epochs, "auto")
        assert config.backbone.drift is False
        schedule = Optimizer(**config.optimizer).schedule(1000)
        # t = 1 .. T: the last of the steps 0 .. T - 1 has rate 0.
        np.testing.assert_allclose(schedule(0), 0.025 * 0.999**0.9, rtol=1e-6)
        assert schedule(999) == 0
        model = build_model(config)
        assert (model.channels, model.background_scale) == (256, 0)


REFUSED = {
    "augmentation.scale": "0.5 0.5,1,2 1.1,0.9 0,1 -1,1 a,b 1,1e999 ()",
    "augmentation.rotate": "-5 nan",
    "eval.seeds": "0,0 0,1.5 a -1",
    "eval.subset": "('dog','dog') 5",
    "dataset.novel": "('cat','dog','cat') 5",
    "backbone.stages": "('layer2','layer2') 5",
    "model.prototypes": "('pre','pre') 1,2",
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_range_or_list_that_says_nothing_is_refused(field):
    for value in REFUSED[field].split():
        word = f"--config.{field}={value}"
        with pytest.raises(InputError, match=field) as refused:
            build_protocol(complete(override(default_config(), [word])))
        assert "\n" not in str(refused.value)


def test_every_tuple_of_the_config_is_checked():
    """A new field of several values has to be a list, or to check itself."""
    fields = flat(default_config().to_dict()).items()
    tuples = {name for name, value in fields if isinstance(value, tuple)}
    assert tuples == {*LISTS, "augmentation.scale"}


def test_ranges_that_say_something_are_taken():
    for scale in ((1.0, 1.0), (0.5, 2), (1, 1)):
        assert Augmentation(scale=scale).scale == scale
    config = complete(override(default_config(), ["--config.eval.seeds=3,0"]))
    assert build_protocol(config).seeds == (3, 0)

"""Recipes: who sets which value, and that each of them trains."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
from qpenet_jax.runs.saved_config import merged

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.fields import flat
from qpenet_jax.models.losses import LossWeights
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.recipes import RECIPES
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.config_files import load_config

# ml_collections loads config files by a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pascal_fold0.py"
ROOMS = {"model": QPENet, "loss": LossWeights, "optimizer": Optimizer}


def load(*words):
    return complete(load_config(CONFIG, [f"--config.{word}" for word in words]))


def test_all_recipes_settle_the_same_fields_and_these_exist():
    fields = [set(recipe) for recipe in RECIPES.values()]
    assert all(names == fields[0] for names in fields)
    for name in fields[0]:
        room, field = name.split(".")
        assert field in {f.name for f in dataclasses.fields(ROOMS[room])}


def test_a_config_leaves_to_the_recipe_what_it_gives_no_value():
    common = importlib.import_module("configs.common").get_config()
    left = {
        f"{room}.{field}"
        for room in ROOMS
        for field, value in common[room].items()
        if value is None
    }
    assert left == set(RECIPES["paper"])
    assert "null" not in load().config.to_json()


def test_the_papers_values():
    """IV.B and eqs 17-19; nothing that isn't printed there but the auxiliary head."""
    paper = load("recipe=paper")
    assert paper.optimizer == Optimizer("sgd", 0.0025, 1.0, 0.9, 0.9, 1e-4)
    assert LossWeights(**paper.config.loss) == LossWeights()
    assert paper.model == QPENet()


def test_the_releases_values():
    """0.5 for L_cyc, which is the mean of two, as L_bg is (1 shot)."""
    released = load("recipe=released")
    np.testing.assert_allclose(released.optimizer.schedule(10)(0), 0.025 * 0.9**0.9)
    weights = LossWeights(**released.config.loss)
    assert weights == LossWeights(beta=0.5, pre=0.25, rev=0.25, final=1, aux=0.6)
    assert released.model.background_scale == 0
    assert not released.model.normalize


def test_the_default_is_the_stable_recipe():
    assert load().config.recipe == "stable"
    assert load().config == load("recipe=stable").config


def test_a_given_value_wins_over_the_recipe():
    ours = load("recipe=released", "loss.pre=0.75", "optimizer.lr=0.001")
    assert ours.config.loss.pre == 0.75
    assert ours.config.loss.rev == 0.25
    np.testing.assert_allclose(ours.optimizer.schedule(10)(0), 0.01 * 0.9**0.9)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InputError, match=r"recipe='nope': choose .*paper.*released"):
        load("recipe=nope")


def test_a_config_of_before_recipes_means_what_it_meant():
    """Such a run's fields are all given, and what it lacks has the old value."""
    old = load("recipe=paper").config.to_dict()
    del old["recipe"], old["model"]["normalize"], old["model"]["background_scale"]
    for field in ("clip", "warm_up", "momentum", "power"):
        del old["optimizer"][field]
    old["loss"] = {"alpha": 1.0, "beta": 1.0}
    old["optimizer"]["lr_factor"] = 10.0
    del old["version"]
    opened = complete(merged(old, "config.json"))
    now = flat(opened.config.to_dict())
    assert {name: now[name] for name in flat(old)} == flat(old)
    assert opened.model == QPENet()
    assert opened.optimizer == Optimizer()


def test_a_released_run_of_before_counts_its_steps_from_0():
    old = load("recipe=released").config.to_dict()
    del old["optimizer"]["first"]
    old["version"] = 2
    assert merged(old, "config.json").optimizer.first == 0

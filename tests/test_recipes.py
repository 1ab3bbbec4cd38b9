"""Recipes: who sets which value, and that each of them trains."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.models.losses import LossWeights
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.recipes import RECIPES
from qpenet_jax.runs.build import build_model, complete
from qpenet_jax.runs.config_files import load_config

# ml_collections loads config files by a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pascal_fold0.py"
ROOMS = {"model": QPENet, "loss": LossWeights, "optimizer": Optimizer}


def load(*words):
    return complete(load_config(CONFIG, [f"--config.{word}" for word in words]))


def test_all_recipes_fill_in_the_same_fields_and_these_exist():
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
    assert "null" not in load().to_json()


def test_the_papers_values():
    """IV.B and eqs 17-19; nothing that isn't printed there but the auxiliary head."""
    paper = load("recipe=paper")
    assert Optimizer(**paper.optimizer) == Optimizer("sgd", 0.0025, 1.0, 0.9, 0.9, 1e-4)
    assert LossWeights(**paper.loss) == LossWeights()
    assert build_model(paper) == QPENet()


def test_the_releases_values():
    """0.5 for L_cyc, which is the mean of two, as L_bg is (1 shot)."""
    released = load("recipe=released")
    rate = Optimizer(**released.optimizer).schedule(10)
    np.testing.assert_allclose(rate(0), 0.025 * 0.9**0.9)
    weights = LossWeights(**released.loss)
    assert weights == LossWeights(beta=0.5, pre=0.25, rev=0.25, final=1, aux=0.6)
    assert released.model.background_scale == 0
    assert not released.model.normalize


def test_the_default_given_values_and_an_unknown_recipe():
    assert load().recipe == "stable"
    assert load() == load("recipe=stable")
    # A given value wins over the recipe.
    ours = load("recipe=released", "loss.pre=0.75", "optimizer.lr=0.001")
    assert (ours.loss.pre, ours.loss.rev) == (0.75, 0.25)
    rate = Optimizer(**ours.optimizer).schedule(10)
    np.testing.assert_allclose(rate(0), 0.01 * 0.9**0.9)
    with pytest.raises(InputError, match=r"recipe='nope': choose .*paper.*released"):
        load("recipe=nope")

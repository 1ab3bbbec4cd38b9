"""Recipes: what the paper, its authors' release and we train with, as a table's rows.

A recipe gives values to those fields of a config that say None. A value that a config
file or the command line gives wins over it.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from qpenet_jax.core.errors import check_choice
from qpenet_jax.models.released import network as released

PAPER: Mapping[str, Any] = {
    "model.normalize": False,
    "model.background_scale": 1.0,
    "loss.alpha": 1.0,
    "loss.beta": 1.0,
    "loss.pre": 1.0,
    "loss.rev": 1.0,
    "loss.final": 1.0,
    "loss.aux": 0.6,
    "optimizer.lr": 0.0025,
    "optimizer.lr_factor": 1.0,
    "optimizer.clip": 0.0,
    "optimizer.warm_up": 0,
    "optimizer.first": 0,
}
"""IV.B and eqs 17 to 19 as printed: weights of 1, P_global drawn from N(0, 1). The
auxiliary head with its 0.6 is the release's."""

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "paper": PAPER,
    # The authors' code: ten times the rate, counted from step 1, 0.25 for each of y_pre
    # and y_rev, 0.5 for each background loss, P_global from zeros.
    "released": {
        **PAPER,
        "optimizer.lr_factor": 10.0,
        "optimizer.first": 1,
        "loss.pre": 0.25,
        "loss.rev": 0.25,
        "loss.beta": 0.5,
        "model.background_scale": 0.0,
    },
    # Ours: the paper's loss at the release's rate. On features that aren't normalised
    # this pair lets heads die or diverges (docs/training.md).
    "stable": {**PAPER, "optimizer.lr_factor": 10.0, "model.normalize": True},
}


def resolved(config: Any) -> Any:
    """Returns a locked copy of a config in which the recipe's fields have values.

    Raises:
        InputError: there is no such recipe.
    """
    config = ConfigDict(config.to_dict())
    check_choice("config.recipe=", config.recipe, RECIPES)
    for name, value in RECIPES[config.recipe].items():
        room, field = name.split(".")
        if config[room][field] is None:
            config[room][field] = value
    return config.lock()


def for_coco(config: Any) -> Any:
    """Changes what the paper does differently on COCO-20i."""
    config.dataset.name = "COCO-20i"
    config.dataset.root = "data/coco20i/2014/1.0.0"
    config.dataset.split = "coco_fwb"
    config.augmentation.scale = (0.8, 1.25)
    config.augment_on = "host"  # decoded, its images would take 100 GB
    config.epochs = 50
    return config


RELEASED_EPOCHS = {
    "pascal": {"resnet50": (100, 100, 100, 50), "resnet101": (150,) * 4},
    "coco_fwb": {"resnet50": (50,) * 4, "resnet101": (50,) * 4},
}
"""Of the released configs, by split, backbone and fold; the paper says 200 and 50."""


def for_released(config: Any) -> Any:
    """Makes a config of the authors' released system, of their training and test.

    The data set, the fold and the backbone are set before.
    """
    config.variant = released.NAME
    config.behaviour = "auto"
    config.recipe = "released"
    if not config.backbone.name.endswith("_deepstem"):
        config.backbone.name += "_deepstem"
    config.backbone.weights = f"data/weights/{config.backbone.name}.safetensors"
    epochs = released_epochs(config.dataset, config.backbone.name, config.dataset.fold)
    config.epochs = epochs or config.epochs
    config.seed = 321
    config.dataset.order = "list"
    config.dataset.targets = "any"
    config.select_on = "novel"
    config.eval.protocol = "released"
    return config


def released_epochs(data: Any, backbone: str, fold: int) -> int | None:
    """Returns what the authors trained for; None for what they didn't train."""
    resnet = backbone.removesuffix("_deepstem")
    epochs = RELEASED_EPOCHS.get(data.split, {}).get(resnet)
    return epochs[fold] if epochs else None

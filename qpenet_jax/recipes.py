"""Recipes: what the paper, its authors' release and we train with, as a table's rows.

A recipe gives values to those fields of a config that say None. A value that a config
file or the command line gives wins over it.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from qpenet_jax.core.errors import check_choice

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

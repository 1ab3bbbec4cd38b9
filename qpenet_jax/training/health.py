"""Whether the heads of QPENet are alive: some can die while the IoU looks fine.

A head whose mask is always empty gives zero prototypes: PPG and DPE, or GBC, then do
nothing, and the decoder learns to segment the base classes without them.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jaxtyping import PyTree

from qpenet_jax.core.types import Array

HEADS = {
    "pre": "y_pre",
    "rev": "y_rev",
    "bg": "y_bg_q",
    "aux": "y_aux",
    "final": "y_final",
}
"""Heads by the names of their metrics (`empty_<name>`), and their logits' in `out`."""

LOSSES = {head: f"loss_{head}" for head in HEADS} | {"bg": "loss_bg_q"}

CHANCE = dict.fromkeys(HEADS, math.log(2)) | {
    "bg": -math.log(2 / 3) - math.log(1 / 3) / 2
}
"""Loss of a head that distinguishes nothing: cross entropy of a coin, and the least
that background mining (eq 18) can have with the same answer everywhere."""

PATIENCE = 200
"""Number of steps without a result after which a head counts as dead."""

Values = Mapping[str, float]


def dead_heads(steps: Iterable[Values]) -> dict[str, str]:
    """Returns which heads do nothing in all these steps of training, and why.

    A head is dead if it found nothing in any image of any step, or if its mean loss is
    not below chance. `steps` hold the train step's metrics.
    """
    steps = list(steps)
    dead = {}
    for head, y in HEADS.items():
        empty = [
            values[f"empty_{head}"] for values in steps if f"empty_{head}" in values
        ]
        if not empty:
            continue  # a head that this variant of the network doesn't have
        loss = math.fsum(values[LOSSES[head]] for values in steps) / len(steps)
        if min(empty) >= 1:
            dead[y] = "has found nothing"
        elif not loss < CHANCE[head]:
            dead[y] = f"is no better than chance (loss {loss:.2f})"
    return dead


def is_finite(tree: PyTree[Array]) -> bool:
    """Returns whether all values of a tree are finite numbers."""
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


class DeadHeads:
    """Warns once of each head that is dead, by the metrics of every step."""

    def __init__(self):
        """Starts with no step seen: also after a resume."""
        self.recent: deque[Values] = deque(maxlen=PATIENCE)
        self.warned: set[str] = set()

    def __call__(self, steps: Iterable[Values]) -> list[str]:
        """Takes the metrics of the next steps; returns a warning for each new death."""
        warnings = []
        for values in steps:
            self.recent.append(values)
            dead = dead_heads(self.recent) if len(self.recent) == PATIENCE else {}
            for y in [y for y in dead if y not in self.warned]:
                warnings.append(
                    f"warning: {y} {dead[y]} for {PATIENCE} steps; what depends on it "
                    "learns nothing. Start again in a new --workdir with "
                    "--config.recipe=stable, or with a lower config.optimizer.lr"
                )
            self.warned.update(dead)
        return warnings

"""Batch norm behind a convolution: folded into it, or moving as in the authors' code.

A converted file holds the norm's vectors beside the convolution that it was folded
into. With them the norm can run in training mode (`normalise_by_batch`) and be folded
again with the statistics that it has then (`fold_statistics`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree

from qpenet_jax.core.types import BATCH_STATISTICS, Array

Vector = Float[Array, " c"]


class Norm(NamedTuple):
    """A batch norm in eval mode, by vectors over the channels."""

    gamma: Vector
    beta: Vector
    mean: Vector
    var: Vector


class Statistics(NamedTuple):
    """What training mode moves."""

    mean: Vector
    var: Vector


EPSILON = 1e-5
"""Of ResNets, the only networks here whose batch norm can move."""

MOMENTUM = 0.1
"""Share of a batch in the new statistics, PyTorch's default."""


def fold(norm: Norm, epsilon: float = EPSILON) -> tuple[Vector, Vector]:
    """Returns a norm as a scale and a shift."""
    scale = norm.gamma / (norm.var + epsilon) ** 0.5
    return scale, norm.beta - norm.mean * scale


def normalise_by_batch(
    y: Float[Array, "b h w c"], norm: Norm, statistics: Statistics
) -> tuple[Float[Array, "b h w c"], Statistics]:
    """Normalises by the batch, as PyTorch in training mode; return the new statistics.

    `y` is the output of the convolution that `norm` was folded into, without its bias.
    The batch's variance is biased where it divides, unbiased where it is stored.
    """
    folded, _ = fold(norm)
    # A channel with gamma 0 gives beta, whatever came in; what that was is lost.
    raw = y / _row(jnp.where(folded == 0, 1, folded))
    mean, var = raw.mean((0, 1, 2)), raw.var((0, 1, 2))
    scale, _ = fold(norm._replace(var=var))
    count = y.size // y.shape[-1]
    batch = Statistics(mean, var * (count / (count - 1)))
    after = jax.tree.map(
        lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * new, statistics, batch
    )
    return (raw - _row(mean)) * _row(scale) + _row(norm.beta), after


def _row(vector):
    return vector.reshape(1, 1, 1, -1)


def statistics_of(weights: PyTree[Array]) -> PyTree[Array]:
    """Returns the statistics that backbone weights were folded with."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(weights)
    found = {path: x for path, x in flat.items() if path[-1] in Statistics._fields}
    return unflatten_dict(found)


@jax.jit
def refold(weights: PyTree[Array], statistics: PyTree[Array]) -> PyTree[Array]:
    """Returns backbone weights, folded with other statistics than they were."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(weights)
    now: dict[tuple[str, ...], Any] = flatten_dict(statistics)
    folded = {}
    for layer in [path[:-1] for path in flat if path[-1] == "kernel"]:
        before = Norm(*(flat[*layer, field] for field in Norm._fields))
        after = before._replace(**{f: now[*layer, f] for f in Statistics._fields})
        change = ((before.var + EPSILON) / (after.var + EPSILON)) ** 0.5
        kernel = flat[*layer, "kernel"]
        row = (1,) * (kernel.ndim - 1) + (-1,)
        folded[*layer, "kernel"] = kernel * change.reshape(row)
        folded[*layer, "bias"] = fold(after)[1]
    return unflatten_dict(folded)


def fold_statistics(
    learned: PyTree[Array], weights: PyTree[Array]
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Returns a network's parameters, and its backbone's weights as they go with them.

    `learned` are the parameters, with the statistics beside them if they have moved.
    """
    if BATCH_STATISTICS not in learned:
        return learned, weights
    params = dict(learned)
    return params, refold(weights, params.pop(BATCH_STATISTICS))

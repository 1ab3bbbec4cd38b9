"""The convolutions that backbones are made of, and the batch norm behind them.

Batch norm in eval mode is a fixed scale and shift per channel, which `torch_layout.py`
folds into the convolution before it: every layer here is a plain one with bias.
A converted file holds the norm's vectors beside the convolution. With them the norm can
run in training mode, as in the authors' code (`normalise_by_batch`), and be folded
again with the statistics that it has then (`fold_statistics`).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree

from qpenet_jax.core.types import BATCH_STATISTICS, Array
from qpenet_jax.models import ops
from qpenet_jax.models.layers import parameter, traced_once

kernel_init = traced_once(nn.initializers.lecun_normal())


class Conv(nn.Module):
    """A k x k convolution with bias, padded symmetrically: stride 1 keeps the size.

    With `depthwise` it convolves every one of the `features` channels on its own.
    """

    features: int
    size: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Convolves `x`; the output side is ceil(side / stride)."""
        window = () if self.size == 1 else (self.size, self.size)
        inputs = () if self.depthwise else (x.shape[-1],)
        shape = (*window, *inputs, self.features)
        kernel = parameter(self, "kernel", kernel_init, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        y = self._convolve(x, kernel)
        if self.is_mutable_collection(BATCH_STATISTICS) and not self.is_initializing():
            return self._normalise(y)
        return y + bias.reshape(1, 1, 1, -1)

    def _normalise(self, y):
        """Normalises by the batch and moves the statistics."""

        def read(collection, kind):
            return kind(*(self.get_variable(collection, f) for f in kind._fields))

        before = read(BATCH_STATISTICS, Statistics)
        y, after = normalise_by_batch(y, read("params", Norm), before)
        for field, value in after._asdict().items():
            self.put_variable(BATCH_STATISTICS, field, value)
        return y

    def _convolve(self, x, kernel):
        if self.depthwise:
            steps = {"stride": self.stride, "dilation": self.dilation}
            return ops.depthwise_conv(x, kernel, **steps)
        if self.size == 1:
            return ops.conv1x1(x[:, :: self.stride, :: self.stride], kernel)
        if self.size == 3 and self.stride == 1:
            return ops.conv3x3(x, kernel, dilation=self.dilation)
        return ops.convolve(x, kernel, stride=self.stride, dilation=self.dilation)


Vector = Float[Array, " c"]


class Norm(NamedTuple):
    """A batch norm in eval mode, by vectors over the channels."""

    gamma: Vector
    beta: Vector
    mean: Vector
    var: Vector


class Statistics(NamedTuple):
    """The statistics of a batch norm, which training mode moves."""

    mean: Vector
    var: Vector


EPSILON = 1e-5
"""Epsilon of ResNets, the only networks here whose batch norm can move."""

MOMENTUM = 0.1
"""Share of a batch in the new statistics, PyTorch's default."""


def fold(norm: Norm, epsilon: float = EPSILON) -> tuple[Vector, Vector]:
    """Returns a norm as a scale and a shift."""
    scale = norm.gamma / (norm.var + epsilon) ** 0.5
    return scale, norm.beta - norm.mean * scale


def normalise_by_batch(
    y: Float[Array, "b h w c"], norm: Norm, statistics: Statistics
) -> tuple[Float[Array, "b h w c"], Statistics]:
    """Normalises by the batch, as PyTorch in training mode, and moves the statistics.

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

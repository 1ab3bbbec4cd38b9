"""The authors' training as it was: batch norm of the frozen backbone drifts.

Their validation in the middle of an epoch put the backbone back into training mode,
to the end of that epoch (docs/released.md). Off unless `config.backbone.drift`. The
state's `params` then hold the statistics of batch norm beside the parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Bool, Float, Int, PyTree, UInt8

from qpenet_jax.backbones.convolutions import refold, statistics_of
from qpenet_jax.backbones.registry import Backbone, deep_part, normalize, with_deep
from qpenet_jax.core.types import BATCH_STATISTICS, Array, Episode
from qpenet_jax.models.losses import LossWeights
from qpenet_jax.training.step import (
    Metrics,
    Network,
    TrainState,
    health_metrics,
    network_inputs,
    sharded_over,
    train_step,
    updated,
)


def with_statistics(params: PyTree[Array], weights: PyTree[Array]) -> PyTree[Array]:
    """Returns parameters with the statistics that backbone weights were folded with."""
    statistics = jax.tree.map(jnp.copy, statistics_of(weights))
    return {**params, BATCH_STATISTICS: statistics}


def drifts(step: Int[Array, ""], epoch: int) -> Bool[Array, ""]:
    """Returns whether batch norm is in training mode in a step; the first is 0.

    So it is in the second half of every epoch of `epoch` steps but the first epoch,
    which had no validation in its middle.
    """
    return (step >= epoch) & (step % epoch >= epoch // 2)


# One trace serves all runs that are alike in a process.
@functools.lru_cache(maxsize=8)
def make_drifting_step(
    model: Network,
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    loss_weights: LossWeights,
    mesh: Mesh | AbstractMesh | None,
    loss: Callable[..., Any],
    epoch: int,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns a train step as `make_train_step` does, in which batch norm drifts."""
    setup = {
        "model": model,
        "backbone": backbone,
        "optimizer": optimizer,
        "loss": lambda *given: loss(*given, loss_weights),
    }
    frozen = functools.partial(frozen_step, **setup)
    moving = functools.partial(moving_step, **setup)

    def step(state, weights, batch, key):
        with sharded_over(mesh):
            moves = drifts(state.step, epoch)
            return jax.lax.cond(moves, moving, frozen, state, weights, batch, key)

    return jax.jit(step, donate_argnums=0)


def frozen_step(
    state: TrainState, weights: PyTree[Array], batch: Episode, key: Array, **setup: Any
) -> tuple[TrainState, Metrics]:
    """Returns the next state by the statistics that batch norm has now."""
    state, statistics = _apart(state)
    weights = refold(weights, statistics)
    state, metrics = train_step(state, weights, batch, key, **setup)
    return _together(state, statistics), metrics


def moving_step(
    state: TrainState,
    weights: PyTree[Array],
    batch: Episode,
    key: Array,
    *,
    model: Network,
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
) -> tuple[TrainState, Metrics]:
    """Returns the next state by the batch's statistics, which move batch norm's."""
    key = jax.random.fold_in(key, state.step)
    state, statistics = _apart(state)
    maps, statistics = drifting_features(backbone, weights, statistics, batch)
    inputs, truth = network_inputs(model, maps, batch)

    def batch_loss(params):
        variables = with_deep(params, weights)
        (logits, out), moved = model.apply(
            variables | {BATCH_STATISTICS: deep_part(statistics)},
            *inputs,
            train=True,
            rngs={"dropout": key},
            mutable=[BATCH_STATISTICS],
        )
        total, terms = loss(out, truth, inputs[1])
        metrics = {"loss": total, **terms, **health_metrics(logits, out, truth)}
        return total, (metrics, moved.get(BATCH_STATISTICS, {}))

    gradient = jax.value_and_grad(batch_loss, has_aux=True)
    (_, (metrics, moved)), grads = gradient(state.params)
    state, metrics = updated(state, grads, metrics, optimizer)
    return _together(state, {**statistics, **moved}), metrics


def drifting_features(
    backbone: Backbone,
    weights: PyTree[Array],
    statistics: PyTree[Array],
    batch: Episode,
) -> tuple[tuple[Float[Array, "b 1 h w f"], Float[Array, "b h w f"]], PyTree[Array]]:
    """Returns support and query features by the batch's statistics, and the new ones.

    As in the authors' code, first all queries of the batch go through the backbone,
    then all supports, one for each query.
    """
    query, statistics = _moved(backbone, weights, statistics, batch.query_image)
    images = batch.support_images[:, 0]
    support, statistics = _moved(backbone, weights, statistics, images)
    return (support[:, None], query), statistics


def _moved(backbone, weights, statistics, images: UInt8[Array, "b height width 3"]):
    x = normalize(images, backbone.mean, backbone.std)
    module: Any = backbone.module
    variables = {"params": weights, BATCH_STATISTICS: statistics}
    stages, changed = module.apply(variables, x, mutable=[BATCH_STATISTICS])
    maps = jnp.concatenate([stages[name] for name in backbone.stages], axis=-1)
    return jax.lax.stop_gradient(maps), changed[BATCH_STATISTICS]


def _apart(state: TrainState) -> tuple[TrainState, PyTree[Array]]:
    params = dict(state.params)
    statistics = params.pop(BATCH_STATISTICS)
    return TrainState(state.step, params, state.opt_state), statistics


def _together(state: TrainState, statistics: PyTree[Array]) -> TrainState:
    params = {**state.params, BATCH_STATISTICS: statistics}
    return TrainState(state.step, params, state.opt_state)

"""The train step: gradient, update, metrics."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Int, PyTree

from qpenet_jax.backbones.precision import InDtype
from qpenet_jax.backbones.registry import Backbone, features, with_deep
from qpenet_jax.core.types import IGNORE, Array, Episode, TrainState
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.prototypes import predicted
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.released.network import ReleasedQPENet
from qpenet_jax.training.health import HEADS

Network = QPENet | ReleasedQPENet | InDtype
Metrics = dict[str, Float[Array, ""]]


# One trace serves all runs that are alike in a process.
@functools.lru_cache(maxsize=8)
def make_train_step(
    model: Network,
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    loss_weights: LossWeights,
    mesh: Mesh | AbstractMesh | None = None,
    loss: Callable[..., Any] = total_loss,
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `train_step(state, weights, batch, key) -> (state, metrics)`, jitted.

    The state is donated. `mesh` holds the devices that share the batch
    (`batches.shardings`), if there are several; `loss` is called as `total_loss` is.
    """

    def step(state, weights, batch, key):
        with sharded_over(mesh):
            return train_step(
                state,
                weights,
                batch,
                key,
                model=model,
                backbone=backbone,
                optimizer=optimizer,
                loss=lambda *given: loss(*given, loss_weights),
                accumulate=accumulate,
            )

    return jax.jit(step, donate_argnums=0)


def train_step(
    state: TrainState,
    weights: PyTree[Array],
    batch: Episode,
    key: Array,
    *,
    model: Network,
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
    accumulate: int = 1,
) -> tuple[TrainState, Metrics]:
    """Returns the next state and the metrics of one step of training.

    Pure: dropout of step t comes from `fold_in(key, t)`. With `accumulate` the step
    goes through so many equal parts of its batch, one after the other, and takes the
    mean of their gradients; the dropout of part i comes from the step's key and i.
    """
    key = jax.random.fold_in(key, state.step)
    episode_loss = functools.partial(batch_loss, model=model, loss=loss)
    gradient = jax.value_and_grad(episode_loss, has_aux=True)

    def gradients(batch, key):
        maps = episode_features(backbone, weights, batch)
        return gradient(state.params, weights, maps, batch, key)

    def part(batch, i):
        return gradients(batch, jax.random.fold_in(key, i))

    if accumulate == 1:
        (_, metrics), grads = gradients(batch, key)
    else:
        (_, metrics), grads = mean_of_parts(part, batch, accumulate)
    return updated(state, grads, metrics, optimizer)


def batch_loss(
    params: PyTree[Array],
    weights: PyTree[Array],
    maps: tuple[Float[Array, "b k h w f"], Float[Array, "b h w f"]],
    batch: Episode,
    key: Array,
    *,
    model: Network,
    loss: Callable[..., Any],
) -> tuple[Float[Array, ""], Metrics]:
    """Returns the loss of a batch of episodes, and the step's metrics.

    `maps` are the backbone's features of supports and queries.
    """
    inputs, truth = network_inputs(model, maps, batch)
    apply: Any = model.apply
    logits, out = apply(
        with_deep(params, weights), *inputs, train=True, rngs={"dropout": key}
    )
    total, terms = loss(out, truth, inputs[1])
    return total, {"loss": total, **terms, **health_metrics(logits, out, truth)}


def network_inputs(
    model: Network, maps: tuple[Array, Array], batch: Episode
) -> tuple[tuple[Any, ...], Int[Array, "b H W"]]:
    """Returns the network's arguments, and the query masks that it has to find.

    The released network is shown where the images are padded as well.
    """
    masks = batch.support_masks.astype(jnp.int32)
    padding = (batch.support_padding, batch.query_padding) if model.sees_padding else ()
    return (maps[0], masks, maps[1], *padding), batch.query_mask.astype(jnp.int32)


def updated(
    state: TrainState,
    grads: PyTree[Array],
    metrics: Metrics,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Returns the state after the optimiser's update, and the metrics with norms."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {
        "grad_norm": optax.tree.norm(grads),
        "norm_P_global": jnp.linalg.norm(state.params["gbc"]["P_global"]),
    }
    return TrainState(state.step + 1, params, opt_state), metrics | norms


def episode_features(
    backbone: Backbone, weights: PyTree[Array], batch: Episode
) -> tuple[Float[Array, "b k h w f"], Float[Array, "b h w f"]]:
    """Returns support and query features; all images go through in one call."""
    b, k = batch.support_images.shape[:2]
    # Behind the batch axis, which devices share: no image moves between them.
    query = batch.query_image[:, None]
    images = jnp.concatenate([batch.support_images, query], axis=1)
    maps = features(backbone, weights, images.reshape(b * (k + 1), *images.shape[2:]))
    maps = maps.reshape(b, k + 1, *maps.shape[1:])
    return maps[:, :k], maps[:, k]


def mean_of_parts(f: Callable[..., Any], batch: PyTree, count: int) -> Any:
    """Returns the mean of `f(part, i)` over equal parts of a batch, one at a time.

    Part i holds the rows i, i + count, ...: devices go through what they have.
    """
    parts = jax.tree.map(
        lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch
    )
    one = jax.eval_shape(f, jax.tree.map(lambda x: x[0], parts), 0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)

    def add(total, numbered):
        return jax.tree.map(jnp.add, total, f(*numbered)), None

    total, _ = jax.lax.scan(add, zero, (parts, jnp.arange(count)))
    return jax.tree.map(lambda x: x / count, total)


def sharded_over(mesh: Mesh | AbstractMesh | None) -> contextlib.AbstractContextManager:
    """Returns a context in which XLA knows the devices that share the batch."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def health_metrics(logits, out, truth) -> Metrics:
    """Returns foreground IoU of the batch, the features' scale and each head's masks.

    `empty_<head>` is the share of images in which a head finds nothing: heads that die
    are how training of this network fails silently.
    """
    found, valid = predicted(logits), truth != IGNORE
    both = (found & (truth == 1)).sum()
    either = ((found | (truth == 1)) & valid).sum()
    iou = both / jnp.maximum(either, 1)
    rms = {f"rms_{F}": jnp.sqrt(jnp.mean(jnp.square(out[F]))) for F in ("F_q", "F_s")}
    empty = {
        f"empty_{head}": jnp.mean(~predicted(out[y]).any((-2, -1)))
        for head, y in HEADS.items()
        if y in out
    }
    return {"iou": iou, **rms, **empty}

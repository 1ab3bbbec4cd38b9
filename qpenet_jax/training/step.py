"""TrainState and the jitted train step."""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, PyTree

from qpenet_jax.backbones.batch_norm import refolded
from qpenet_jax.backbones.precision import InDtype
from qpenet_jax.backbones.registry import (
    DEEP,
    Backbone,
    deep_part,
    features,
    with_deep,
)
from qpenet_jax.core.types import BATCH_STATISTICS, IGNORE, Array, Episode
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.prototypes import predicted
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.released.network import ReleasedQPENet
from qpenet_jax.training import health
from qpenet_jax.training.drift import drifting_features, drifts


@struct.dataclass
class TrainState:
    """What training changes; the frozen backbone is not part of it.

    But the statistics of its batch norm are, in runs where that drifts.
    """

    step: Any  # Int[Array, ""], or what stands for it in a tree of shapes
    params: PyTree
    opt_state: PyTree
    statistics: PyTree = struct.field(default_factory=dict)

    @property
    def learned(self) -> PyTree:
        """The parameters, and the statistics beside them: what predicting needs."""
        if not self.statistics:
            return self.params
        return {**self.params, BATCH_STATISTICS: self.statistics}


def values_hash(tree: PyTree[Array]) -> str:
    """Returns the SHA-256 of the values of a tree, in its order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


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


def init_state(
    model: QPENet | ReleasedQPENet,
    optimizer: optax.GradientTransformation,
    *,
    channels: int,
    key: Array,
) -> TrainState:
    """Returns the state at step 0; `channels` are the backbone's."""
    params = _init(model, channels, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


# One trace serves all networks of a kind that a process makes or opens.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(model, channels, key):
    side, grid = 17, 3  # parameters depend on channels only: any small grid will do
    support = jnp.zeros((1, 1, grid, grid, channels))
    masks = jnp.zeros((1, 1, side, side), jnp.int32)
    params = model.init(key, support, masks, support[:, 0])["params"]
    return {name: params[name] for name in params if name != DEEP}  # the backbone's


# One trace serves all runs that are alike in a process, as with `_init`.
@functools.lru_cache(maxsize=8)
def make_train_step(
    model: QPENet | ReleasedQPENet | InDtype,
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    loss_weights: LossWeights,
    mesh: Mesh | AbstractMesh | None = None,
    loss: Callable[..., Any] = total_loss,
    drift_epoch: int | None = None,
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Returns `train_step(state, weights, batch, key) -> (state, metrics)`, jitted.

    Pure: dropout of step t comes from `fold_in(key, t)`. The state is donated. `mesh`
    holds the devices that share the batch (`sharding.shardings`), if there are several;
    `loss` is called as `total_loss` is. With a `drift_epoch`, of so many steps, batch
    norm of the backbone drifts as `drift.drifts` says. With `accumulate` a step goes
    through so many equal parts of its batch, one after the other, and takes the mean of
    their gradients; the dropout of part i comes from the step's key and i.
    """

    apply: Any = model.apply

    def train_step(state, weights, batch, key):
        with on_mesh():
            if drift_epoch is None:
                return one_step(state, weights, batch, key)
            inputs = state, weights, batch, key
            return jax.lax.cond(
                drifts(state.step, drift_epoch), drifting_step, settled_step, *inputs
            )

    def settled_step(state, weights, batch, key):
        return one_step(state, refolded(weights, state.statistics), batch, key)

    def drifting_step(*inputs):
        return one_step(*inputs, moving=[BATCH_STATISTICS])

    def on_mesh():
        if mesh is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)

    def one_step(state, weights, batch, key, moving=()):
        key = jax.random.fold_in(key, state.step)

        def part(batch, i):
            return gradients(state, weights, batch, jax.random.fold_in(key, i))

        if accumulate == 1:
            grads, metrics, moved = gradients(state, weights, batch, key, moving)
        else:
            grads, metrics, moved = mean_of_parts(part, batch, accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["norm_P_global"] = jnp.linalg.norm(state.params["gbc"]["P_global"])
        statistics = {**state.statistics, **moved}
        return TrainState(state.step + 1, params, opt_state, statistics), metrics

    def gradients(state, weights, batch, key, moving=()):
        statistics = state.statistics
        if moving:
            maps, statistics = drifting_features(backbone, weights, statistics, batch)
        else:
            maps = episode_features(backbone, weights, batch)
        support_maps, query_maps = maps
        masks = batch.support_masks.astype(jnp.int32)
        truth = batch.query_mask.astype(jnp.int32)

        inputs = support_maps, masks, query_maps
        if model.sees_padding:
            inputs += batch.support_padding, batch.query_padding

        def loss_fn(params):
            (logits, out), moved = apply(
                {**with_deep(params, weights), BATCH_STATISTICS: deep_part(statistics)},
                *inputs,
                train=True,
                rngs={"dropout": key},
                mutable=moving,
            )
            total, terms = loss(out, truth, masks, loss_weights)
            return total, (terms, logits, out, moved)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (total, (terms, logits, out, moved)), grads = grad_fn(state.params)
        metrics = {"loss": total, **terms, **_health(logits, out, truth)}
        if not moving:
            return grads, metrics, {}
        return grads, metrics, {**statistics, **moved.get(BATCH_STATISTICS, {})}

    return jax.jit(train_step, donate_argnums=0)


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


def _health(logits, out, truth):
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
        for head, y in health.HEADS.items()
        if y in out
    }
    return {"iou": iou, **rms, **empty}

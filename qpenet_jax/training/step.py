"""TrainState, optimiser and the jitted train step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from qpenet_jax.backbones.registry import Backbone, features
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE, Episode
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.prototypes import predicted
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.training import health


@struct.dataclass
class TrainState:
    """What training changes; the frozen backbone is not part of it."""

    step: Int[Array, ""]
    params: PyTree[Array]
    opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """SGD of the paper (IV.B), or AdamW for short schedules, with poly decay.

    The paper gives lr 0.0025; the released trainer multiplies it by 10 for every
    parameter (PFENet's habit for layers that start from scratch): `lr_factor`.
    """

    name: str = "sgd"
    lr: float = 0.0025
    lr_factor: float = 10.0
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 0.0  # largest norm of the whole gradient; 0: not clipped
    warm_up: int = 0  # steps over which the rate rises linearly to the schedule

    def __post_init__(self):
        """Refuse a name that `build` doesn't know, and what makes no optimiser."""
        if self.name not in ("sgd", "adamw"):
            raise InputError(f"optimizer {self.name!r}: choose 'sgd' or 'adamw'")
        for name in ("clip", "warm_up"):
            if getattr(self, name) < 0:
                raise InputError(
                    f"optimizer.{name}={getattr(self, name)} must be 0 or more"
                )

    def schedule(self, steps: int) -> optax.Schedule:
        """Return lr * lr_factor * (1 - t / steps)^power, after the warm-up if any."""
        peak = self.lr * self.lr_factor
        decay = optax.polynomial_schedule(peak, 0.0, self.power, steps)
        if not self.warm_up:
            return decay
        return lambda t: decay(t) * jnp.minimum(1.0, (t + 1) / self.warm_up)

    def build(self, steps: int) -> optax.GradientTransformation:
        """Return the optimiser for a run of `steps` steps."""
        schedule = self.schedule(steps)
        clip = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        if self.name == "adamw":
            adamw = optax.adamw(schedule, weight_decay=self.weight_decay)
            return optax.chain(*clip, adamw) if clip else adamw
        # As in PyTorch, weight decay is part of the gradient that momentum sums up.
        decay = optax.add_decayed_weights(self.weight_decay)
        return optax.chain(*clip, decay, optax.sgd(schedule, momentum=self.momentum))


def episode_features(
    backbone: Backbone, weights: PyTree[Array], batch: Episode
) -> tuple[Float[Array, "b k h w f"], Float[Array, "b h w f"]]:
    """Return support and query features; all images go through in one call."""
    b, k = batch.support_images.shape[:2]
    supports = batch.support_images.reshape(b * k, *batch.support_images.shape[2:])
    images = jnp.concatenate([supports, batch.query_image])
    maps = features(backbone, weights, images)
    return maps[: b * k].reshape(b, k, *maps.shape[1:]), maps[b * k :]


def init_state(
    model: QPENet,
    optimizer: optax.GradientTransformation,
    *,
    channels: int,
    key: Array,
) -> TrainState:
    """Return the state at step 0; `channels` are the backbone's."""
    side, grid = 17, 3  # parameters depend on channels only: any small grid will do
    support = jnp.zeros((1, 1, grid, grid, channels))
    masks = jnp.zeros((1, 1, side, side), jnp.int32)
    variables = jax.jit(model.init)(key, support, masks, support[:, 0])
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    model: QPENet,
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    loss_weights: LossWeights,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Return `train_step(state, weights, batch, key) -> (state, metrics)`, jitted.

    Pure: dropout of step t comes from `fold_in(key, t)`. The state is donated.
    """

    apply: Any = model.apply

    def train_step(state, weights, batch, key):
        support_maps, query_maps = episode_features(backbone, weights, batch)
        masks = batch.support_masks.astype(jnp.int32)
        truth = batch.query_mask.astype(jnp.int32)

        def loss_fn(params):
            logits, out = apply(
                {"params": params},
                support_maps,
                masks,
                query_maps,
                train=True,
                rngs={"dropout": jax.random.fold_in(key, state.step)},
            )
            loss, terms = total_loss(out, truth, masks, loss_weights)
            return loss, (terms, logits, out)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (terms, logits, out)), grads = grad_fn(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            **terms,
            "grad_norm": optax.tree.norm(grads),
            "norm_P_global": jnp.linalg.norm(state.params["gbc"]["P_global"]),
            **_health(logits, out, truth),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def _health(logits, out, truth):
    """Return foreground IoU of the batch, the features' scale and each head's masks.

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


def shardings(batch_size: int) -> tuple[NamedSharding, NamedSharding]:
    """Return (replicated, split over the batch) for all devices.

    The batch is split over the largest number of devices that divides it.
    """
    devices = jax.devices()
    count = next(n for n in range(len(devices), 0, -1) if batch_size % n == 0)
    mesh = Mesh(np.array(devices[:count]), ("data",))
    return (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("data")),
    )


def global_batch(batch: Episode, sharding: NamedSharding) -> Any:
    """Place this process's part of a batch on its devices."""
    place = jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: place(sharding, np.asarray(x)), batch)

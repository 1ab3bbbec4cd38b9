"""What training begins with: the state, the step of a config, checks of the inputs."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from qpenet_jax.backbones.precision import in_dtype
from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Array
from qpenet_jax.data.versions import shared_photos
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.released.released_loss import released_loss
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.runs.build import (
    build_backbone,
    build_model,
    initial_params,
    is_released,
)
from qpenet_jax.training.batches import shardings
from qpenet_jax.training.released_step import make_drifting_step, with_statistics
from qpenet_jax.training.step import TrainState, make_train_step


def initial_state(config: Any, weights: PyTree[Array], steps: int) -> TrainState:
    """Returns the state at step 0 of a training of so many steps."""
    params = initial_params(config)
    opt_state = Optimizer(**config.optimizer).build(steps).init(params)
    if config.backbone.drift:
        params = with_statistics(params, weights)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def build_train_step(config: Any, steps: int, images: int) -> Callable[..., Any]:
    """Returns the jitted train step, for a batch shared as `shardings` says.

    `images` are those that are trained on; with `config.backbone.drift` batch norm
    drifts by the length of an epoch.
    """
    model, net = in_dtype(build_model(config), build_backbone(config), config.dtype)
    optimizer = Optimizer(**config.optimizer).build(steps)
    _, split = shardings(config.batch_size, config.accumulate)
    loss = released_loss if is_released(config) else total_loss
    parts = model, net, optimizer, LossWeights(**config.loss), split.mesh, loss
    if config.backbone.drift:
        return make_drifting_step(*parts, max(images // config.batch_size, 1))
    return make_train_step(*parts, config.accumulate)


def trained_and_scored(
    what: str, train_set: Any, trained: Any, val_set: Any, scored: Any
) -> dict[str, str]:
    """Returns which scored images are trained on, too, and warns of them.

    `trained` and `scored` are the samplers of episodes over the two data sets. Images
    of one list may serve both, as long as no episode of both shows one.
    """
    found = shared_photos(train_set, val_set, trained.images, scored.images)
    if not found:
        return {}
    text = f"{len(found)} of {len(scored)}, such as {' = '.join(found[0])}"
    cluster.warn(f"{what}: {text}")
    return {what: text}


def refuse_other_inputs(inputs: Mapping[str, str]) -> None:
    """Refuses to train where a process reads other data or weights than the first.

    Raises:
        InputError: naming them, in all processes.
    """
    by_process = [json.loads(x) for x in cluster.gather(json.dumps(inputs).encode())]
    first = by_process[0]
    for process, found in enumerate(by_process):
        if other := [name for name in first if found.get(name) != first[name]]:
            raise InputError(
                f"process {process} reads other inputs than process 0 "
                f"({', '.join(other)} differ): give all processes the same files"
            )

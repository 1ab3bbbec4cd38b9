"""JAX's steps in the speed benchmarks: their weights, their inputs, what is timed."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from qpenet_jax.backbones.precision import cast, in_dtype
from qpenet_jax.backbones.registry import backbone, features, weight_shapes
from qpenet_jax.benchmark.settings import Case
from qpenet_jax.core.runtime import peak_memory
from qpenet_jax.core.types import Episode
from qpenet_jax.evaluation.predictor import qpenet_predictor
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.released.network import ReleasedQPENet
from qpenet_jax.models.released.released_loss import released_loss
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.training.step import TrainState, init_state, make_train_step

RATE, STEPS = 1e-4, 10**6
"""Learning rate, low so that the many steps on noise stay finite, and schedule."""

NO_DROPOUT = {
    f"{kind}_dropout": 0.0 for kind in ("channel", "head", "gate", "attention")
}


class Candidate(NamedTuple):
    """A step of JAX or PyTorch that is timed.

    `call` does a step and returns its result when it is finished; `numbers` takes the
    first result and returns the numbers that must be equal for both.
    """

    call: Callable[[], Any]
    numbers: Callable[[Any], dict[str, np.ndarray]]


class Weights(NamedTuple):
    """The parameters of both sides: the frozen backbone's and QPENet's."""

    backbone: PyTree[Array]
    params: PyTree[Array]


def random_weights(case: Case) -> Weights:
    """Returns random parameters, always the same ones."""
    net, rng = backbone(case.backbone), np.random.default_rng(0)
    frozen = random_params(weight_shapes(net, deep=case.released), rng)
    shapes = jax.eval_shape(lambda: initial_params(case))
    return Weights(frozen, random_params(shapes, rng))


def random_params(shapes: PyTree, rng: np.random.Generator) -> PyTree[Array]:
    """Returns random parameters with which values stay of one size in all layers."""

    def random(leaf: Any) -> Array:
        numbers = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(numbers / math.sqrt(math.prod(leaf.shape[:-1])))

    return jax.tree.map(random, shapes)


def initial_params(case: Case) -> PyTree[Array]:
    """Returns QPENet's parameters as training initialises them."""
    channels, key = backbone(case.backbone).channels, jax.random.key(0)
    none = optax.identity()
    return init_state(network_of(case), none, channels=channels, key=key).params


def network_of(case: Case) -> QPENet | ReleasedQPENet:
    """Returns the network of a case, by default without dropout."""
    fields = {**NO_DROPOUT, **case.network}
    if not case.released:
        return QPENet(**fields)
    return ReleasedQPENet(backbone(case.backbone).deep, **fields)


def step_of(case: Case) -> Callable[..., Any]:
    """Returns the step of a case, compiled when called; it closes over no arrays."""
    network, bare = network_of(case), backbone(case.backbone)
    model, net = in_dtype(network, bare, case.dtype)
    if case.what == "backbone":
        return jax.jit(functools.partial(features, net))
    if case.what == "eval":
        # The step that evaluate and predict run.
        return lambda params, frozen, batch: qpenet_predictor(
            network, bare, params, frozen, case.dtype
        )(batch)
    loss = released_loss if case.released else total_loss
    return make_train_step(model, net, _optimizer(), LossWeights(), loss=loss)


def inputs_of(case: Case, weights: Weights, episodes: Episode) -> tuple[Any, ...]:
    """Returns the arguments of a case's step."""
    frozen, params = weights
    batch = jax.tree.map(jnp.asarray, episodes)
    if case.dtype == "bfloat16":
        frozen = cast(frozen, jnp.bfloat16)
        if case.what != "train":
            params = cast(params, jnp.bfloat16)
    if case.what == "backbone":
        supports = jnp.concatenate(batch.support_images)
        return frozen, jnp.concatenate([supports, batch.query_image])
    if case.what == "eval":
        return params, frozen, batch
    params = jax.tree.map(jnp.copy, params)  # the step takes the state's memory
    state = TrainState(jnp.zeros((), jnp.int32), params, _optimizer().init(params))
    return state, frozen, batch, jax.random.key(0)


def _optimizer() -> optax.GradientTransformation:
    return Optimizer(lr=RATE, lr_factor=1.0).build(STEPS)


def jax_candidate(case: Case, weights: Weights, episodes: Episode) -> Candidate:
    """Returns the step of a case as it is timed; train steps follow each other."""
    step, args = step_of(case), inputs_of(case, weights, episodes)

    def call():
        nonlocal args
        result = jax.block_until_ready(step(*args))
        if case.what == "train":
            args = (result[0], *args[1:])
        return result

    def numbers(result):
        if case.what != "train":
            name = "margin" if case.what == "eval" else "features"
            return {name: np.asarray(result, np.float32)}
        state, metrics = result
        # After one step SGD's momentum is the gradient, weight decay included.
        gradient = as_vector(optax.tree.get(state.opt_state, "trace"))
        return {"loss": np.asarray(metrics["loss"]), "gradient": gradient}

    return Candidate(call, numbers)


def as_vector(tree: PyTree) -> np.ndarray:
    """Returns all numbers of a tree as a vector, by sorted names."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def device_memory() -> int:
    """Returns the peak in bytes: of the device, or of the process on a CPU."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return peak_memory()
    return (device.memory_stats() or {})["peak_bytes_in_use"]

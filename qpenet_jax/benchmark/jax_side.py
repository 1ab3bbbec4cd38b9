"""JAX's steps: inputs, what is timed, the operations and the memory that they need.

As a program this module does a case's first steps in a process of its own.
"""

import dataclasses
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.flatten_util import ravel_pytree
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree
from tqdm import tqdm

from qpenet_jax.backbones.precision import cast, in_dtype
from qpenet_jax.backbones.registry import backbone, features, weight_shapes
from qpenet_jax.benchmark.made_up import made_up_episodes
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.benchmark.timing import Row, Table
from qpenet_jax.core.runtime import keep_freed_memory, peak_memory
from qpenet_jax.core.types import IGNORE, Episode
from qpenet_jax.evaluation.predictor import qpenet_predictor
from qpenet_jax.evaluation.scoring import CACHE_BYTES
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.released.network import ReleasedQPENet
from qpenet_jax.models.released.released_loss import released_loss
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.runs.build import init_params
from qpenet_jax.training.step import TrainState, make_train_step

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
    channels = backbone(case.backbone).channels
    return init_params(network_of(case), channels, jax.random.key(0))


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
        gradient, _ = ravel_pytree(optax.tree.get(state.opt_state, "trace"))
        return {"loss": np.asarray(metrics["loss"]), "gradient": np.asarray(gradient)}

    return Candidate(call, numbers)


# --- operations -------------------------------------------------------------------


def step_flop(case: Case, weights: Weights, episodes: Episode) -> int:
    """Returns the FLOP of a case's step, the same in every dtype."""
    single = dataclasses.replace(case, dtype="float32")
    inputs = inputs_of(single, weights, episodes)
    return flop(jax.make_jaxpr(step_of(single))(*inputs))


def flop(jaxpr: Any) -> int:
    """Returns the FLOP of the convolutions and matrix products that a jaxpr needs.

    A multiplication and an addition are two. Padding counts, zeros put between pixels
    don't. Of `platform_dependent` the default counts: faster formulations (Winograd)
    then show as speed, not as less work. XLA's own `cost_analysis()` counts the body of
    a loop once, and the formulation that the platform takes.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(map(_equation_flop, needed.eqns))


def _equation_flop(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        inner = math.prod(shape[axis] for axis in contracted)
        return 2 * equation.outvars[0].aval.size * inner
    if name == "conv_general_dilated":
        kernel, outputs = equation.invars[1].aval, equation.outvars[0].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        products = outputs.size * (kernel.size // features)
        return 2 * products // math.prod(params["lhs_dilation"])
    if name == "cond":
        branches = params["branches"]
        if params.get("branches_platforms"):
            branches = [branches[params["branches_platforms"].index(None)]]
        return max(map(flop, branches))
    # Of a `while` the number of rounds isn't known: one.
    names = ("jaxpr", "call_jaxpr", "body_jaxpr")
    inner = next((params[key] for key in names if key in params), None)
    rounds = params["length"] if name == "scan" else 1
    return rounds * flop(inner) if inner is not None else 0


# --- memory -----------------------------------------------------------------------

CAPTION = (
    "Memory of one step in GiB, as XLA plans it, with dropout; nothing was run. "
    "Temporaries, and with them the weights, the optimiser's state and the batch. An "
    f"evaluation keeps encoded images as well, up to {CACHE_BYTES / 2**30:g} GiB. "
    "On a CPU the plan for GPUs (cuda) is an estimate: it is XLA's CPU compiler's, of "
    "the formulations that GPUs and TPUs take. A GPU's compiler merges more of them; "
    "CUDA itself, and the workspace of cuDNN's convolutions, come on top."
)


def memory_plans(settings: Settings) -> Iterator[Table]:
    """Yields the plans of every evaluation and train step of the settings.

    On a CPU the plans are for it and for GPUs, else for the device that is here.
    """
    here = export.default_export_platform()
    rows = []
    for case in tqdm([*settings.cases(("eval", "train"))], "planning", unit="step"):
        row: Row = {"step": str(case)}
        for platform in (here, "cuda") if here == "cpu" else (here,):
            temporaries, inputs = plan(case, platform)
            row[f"{platform}: temporaries"] = temporaries / 2**30
            row[f"{platform}: in all"] = (temporaries + inputs) / 2**30
        rows.append(row)
    yield Table(CAPTION, rows)


def plan(case: Case, platform: str) -> tuple[int, int]:
    """Returns `planned` of a case, with dropout, as networks are trained."""
    dropout = {name: getattr(QPENet, name) for name in NO_DROPOUT}
    case = dataclasses.replace(case, network={**dropout, **case.network})
    episodes = made_up_episodes(case)
    episodes = episodes._replace(
        query_padding=episodes.query_mask == IGNORE,
        support_padding=episodes.support_masks == IGNORE,
    )
    inputs = jax.eval_shape(lambda: inputs_of(case, random_weights(case), episodes))
    return planned(step_of(case), inputs, platform)


def planned(
    step: Callable[..., Any], inputs: Sequence[Any], platform: str
) -> tuple[int, int]:
    """Returns the bytes of a step's temporaries, and of its inputs; nothing is run.

    `inputs` are arrays or their shapes; `platform` is one of JAX's, such as "cuda". The
    step is lowered for it, which takes that platform's formulations (`models/ops/`),
    and compiled by the compiler that is here. The results of a step aren't counted: a
    train step's take the place of its inputs.
    """
    check = export.DisabledSafetyCheck
    # Compiled where it isn't to run; and cuDNN's attention, if it is taken.
    attention = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    unchecked = [check.platform(), *map(check.custom_call, attention)]
    exported = export.export(
        jax.jit(step), platforms=(platform,), disabled_checks=unchecked
    )
    compiled = jax.jit(exported(*inputs).call).lower(*inputs).compile()
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes


# --- a process of its own ---------------------------------------------------------


def device_memory() -> int:
    """Returns the peak in bytes: of the device, or of the process on a CPU."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return peak_memory()
    return (device.memory_stats() or {})["peak_bytes_in_use"]


def main() -> None:
    """Does three steps of the case in the JSON argument and prints a row as JSON.

    "start, s" is from the start of the process to the end of the first step, and "MiB"
    the peak memory, of which importing the libraries took "imports, MiB". The variant
    is "JAX", or one of PyTorch on a device.
    """
    fields, variant, device, started = json.loads(sys.argv[1])
    case = Case(**fields)
    keep_freed_memory()
    if variant == "JAX":
        memory, imports = device_memory, device_memory()
        # Training starts with a compiled initialisation, so that counts, too.
        params = initial_params(case)
        weights = random_weights(case)._replace(params=params)
        step = jax_candidate(case, weights, made_up_episodes(case)).call
    else:
        torch_side = importlib.import_module("qpenet_jax.benchmark.torch_side")
        memory = functools.partial(torch_side.device_memory, device)
        imports, episodes = memory(), made_up_episodes(case)
        step = torch_side.torch_candidate(case, variant, device, episodes).call
    step()
    start = time.time() - started
    step()
    step()
    row = {"MiB": memory() / 2**20, "imports, MiB": imports / 2**20}
    print(json.dumps({"start, s": start} | row))


if __name__ == "__main__":
    main()

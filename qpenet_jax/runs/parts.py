"""A run's network as functions of named arrays, for other run times to take.

`encode_support` and `encode_query` take one photo, `decode_Kshot` what they return:
that of K supports stacked, their masks, and the query's.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from qpenet_jax.backbones.convolutions import fold_statistics
from qpenet_jax.backbones.precision import in_dtype
from qpenet_jax.backbones.registry import Backbone, deep_part, features, with_deep
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Array
from qpenet_jax.models.prototypes import foreground_margin
from qpenet_jax.models.qpenet import Role
from qpenet_jax.runs.build import build_backbone, build_model
from qpenet_jax.runs.folder import TrainedRun

Arrays = dict[str, Array]
Shapes = dict[str, jax.ShapeDtypeStruct]


class Part(NamedTuple):
    """A function of arrays by their names, which returns arrays by theirs."""

    function: Callable[..., Arrays]
    inputs: Shapes

    @property
    def outputs(self) -> Shapes:
        """The shapes of what it returns."""
        found: Any = jax.eval_shape(self.function, **self.inputs)
        return found


def parts_of(run: TrainedRun, shots: Sequence[int] = (1,)) -> dict[str, Part]:
    """Returns the parts of a run's network, as `network_parts` does."""
    config = run.config
    params, weights = fold_statistics(run.params, run.weights)
    networks = build_model(config), build_backbone(config)
    return network_parts(networks, params, weights, config.side, shots)


def network_parts(
    networks: tuple[nn.Module, Backbone],
    params: PyTree[Array],
    weights: PyTree[Array],
    side: int,
    shots: Sequence[int] = (1,),
) -> dict[str, Part]:
    """Returns the parts of a network in float32, with its weights in them.

    `networks` are QPENet and its backbone, with their `params` and `weights`. Photos
    are uint8 RGB [1, side, side, 3]; their normalisation is in the network. Masks are
    uint8 [1, K, side, side], where 1 is the object. The released network also takes
    `padding`, where a square holds no photo. `decode_Kshot` returns the foreground's
    `margin` and its `probability`, [1, side, side].

    Raises:
        InputError: `shots` aren't numbers from 1 on.
    """
    if not shots or min(shots) < 1:
        raise InputError("--shots: give numbers from 1 on, such as 1,5")
    model, net = in_dtype(*networks, "float32")

    def encode(role: Role, **inputs: Array) -> Arrays:
        maps = features(net, weights, inputs["image"])
        given = [inputs[name] for name in ("padding",) if name in inputs]
        found = model.apply(
            with_deep(params, weights), maps, *given, roles=(role,), method="encode"
        )
        return {f"{role}_{name}": found[name] for name in found}

    def decode(**inputs: Array) -> Arrays:
        logits, _ = model.apply(
            with_deep(params, deep_part(weights)),
            _of("support", inputs),
            inputs["masks"],
            _of("query", inputs),
            method="decode",
        )
        margin = foreground_margin(logits)
        return {"margin": margin, "probability": jax.nn.sigmoid(margin)}

    photo: Shapes = {"image": jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)}
    if model.sees_padding:
        photo["padding"] = jax.ShapeDtypeStruct((1, side, side), np.bool_)
    encoders = {
        f"encode_{role}": Part(functools.partial(encode, role), photo)
        for role in ("support", "query")
    }
    support, query = (part.outputs for part in encoders.values())

    def decoder(k: int) -> Part:
        stacked = {
            name: jax.ShapeDtypeStruct((1, k, *x.shape[1:]), x.dtype)
            for name, x in support.items()
        }
        masks = {"masks": jax.ShapeDtypeStruct((1, k, side, side), np.uint8)}
        return Part(decode, {**stacked, **masks, **query})

    needed = _needed(decoder(shots[0]))
    return {
        name: Part(functools.partial(_only, needed, part.function), part.inputs)
        for name, part in encoders.items()
    } | {f"decode_{k}shot": _filled(decoder(k), needed) for k in dict.fromkeys(shots)}


def _of(role: Role, inputs: Mapping[str, Array]) -> Arrays:
    start = f"{role}_"
    return {n.removeprefix(start): x for n, x in inputs.items() if n.startswith(start)}


def _needed(part: Part) -> list[str]:
    """Returns the inputs that a part's outputs depend on."""
    exported = jax.export.export(jax.jit(part.function))(**part.inputs)
    names = sorted(part.inputs)  # as a dict is flattened
    return [names[i] for i in exported.module_kept_var_idx]


def _only(names: Sequence[str], function: Callable[..., Arrays], **inputs) -> Arrays:
    return {n: x for n, x in function(**inputs).items() if n in names}


def _filled(part: Part, needed: Sequence[str]) -> Part:
    """Returns a part that is given what it needs; the rest may be anything."""
    rest = {name: x for name, x in part.inputs.items() if name not in needed}

    def function(**inputs: Array) -> Arrays:
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in rest.items()}
        return part.function(**inputs, **zeros)

    return Part(function, {n: x for n, x in part.inputs.items() if n in needed})

"""From a config to its networks and predictors; nothing is read before it is needed.

All functions take a complete config, as `complete` returns it. Data and episodes are in
`datasets.py`.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from qpenet_jax.backbones.convert import load_weights
from qpenet_jax.backbones.convolutions import fold_statistics
from qpenet_jax.backbones.precision import backbone_in_dtype
from qpenet_jax.backbones.registry import DEEP, Backbone, backbone, choose_stages
from qpenet_jax.backbones.torch_layout import no_statistics
from qpenet_jax.config import check, check_fields, flat
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path
from qpenet_jax.core.runtime import refuse_64_bits
from qpenet_jax.core.types import BATCH_STATISTICS
from qpenet_jax.evaluation.predictor import Predictor, qpenet_predictor
from qpenet_jax.evaluation.training_free import (
    SHARPNESS,
    MeanPredictor,
    TrainingFreePredictor,
)
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.released.network import NAME as RELEASED
from qpenet_jax.models.released.network import ReleasedQPENet, resolve_behaviour
from qpenet_jax.models.variants import VARIANTS
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.recipes import resolved

# What a run may change when it is resumed or moved, as no result depends on it: of the
# paths, the contents are compared.
PATHS = (
    "dataset.root",
    "dataset.images",
    "dataset.masks",
    "dataset.train_ids",
    "dataset.val_ids",
    "backbone.weights",
)
BELOW_ROOT = ("dataset.images", "dataset.masks")
FREE = {
    "workers",
    "log_every",
    "save_every",
    "keep_compilations",
    "retries_on_nan",  # the results of a run that has used one say so
    *PATHS,
}


def complete(config: Any) -> Any:
    """Returns a locked copy of a config with the recipe's values, checked.

    Raises:
        InputError: values that could only fail later.
    """
    config = resolved(checked(config))
    build_model(config)
    Optimizer(**config.optimizer)
    return config


def checked(config: Any) -> Any:
    """Returns a locked copy of a config, enough for what needs no recipe.

    Raises:
        InputError: as `complete`, but for the fields of model and optimiser.
    """
    refuse_64_bits()
    check_fields(config)
    config = ConfigDict(config.to_dict())
    for name in set(PATHS) - set(BELOW_ROOT):
        section, field = name.split(".")
        if given := config[section][field]:
            config[section][field] = str(local_path(given))
    check(config)
    return config.lock()


def identity(config: Any) -> str:
    """Returns a hash of all fields that a run's results depend on."""
    fields = flat(json.loads(config.to_json()))
    text = json.dumps({k: v for k, v in fields.items() if k not in FREE})
    return hashlib.sha256(text.encode()).hexdigest()


def build_backbone(config: Any) -> Backbone:
    """Returns the frozen network, with those of its stages that QPENet is given."""
    net, chosen = backbone(config.backbone.name), tuple(config.backbone.stages)
    return choose_stages(net, chosen) if chosen else net


def build_weights(config: Any) -> PyTree[Array]:
    """Reads the backbone's frozen weights onto the device."""
    spec = config.backbone
    released = is_released(config)
    return load_weights(
        spec.name, spec.weights or None, deep=released, norms=spec.drift
    )


def is_released(config: Any) -> bool:
    """Returns whether it is the authors' released network instead of the paper's."""
    return config.variant == RELEASED


def build_model(config: Any) -> QPENet | ReleasedQPENet:
    """Returns the network over the backbone's features.

    QPENet proper, a variant of it, or the released network.

    Raises:
        InputError: fields of the config that don't go together.
    """
    net = build_backbone(config)
    if config.backbone.drift:
        _check_drift(config, net)
    return (_released if is_released(config) else _paper)(config, net)


def _paper(config: Any, net: Backbone) -> QPENet:
    defaults = {f.name: f.default for f in dataclasses.fields(QPENet)}
    given: dict[str, Any] = dict(config.model)
    fixed, _, kind = VARIANTS[config.variant]
    for name, value in fixed.items():
        if given[name] not in (value, defaults[name]):
            raise InputError(
                f"config.model.{name}={given[name]!r} is {value!r} in "
                f"config.variant={config.variant!r}: leave one of them out"
            )
    return kind(**{**given, **fixed})


def _released(config: Any, net: Backbone) -> ReleasedQPENet:
    known = {f.name for f in dataclasses.fields(ReleasedQPENet)}
    defaults = {f.name: f.default for f in dataclasses.fields(QPENet)}
    given: dict[str, Any] = dict(config.model)
    for name, value in given.items():
        if name not in known and value != defaults[name]:
            raise InputError(
                f"config.model.{name}={value!r}: config.variant={RELEASED!r} has "
                "no such field: leave it out"
            )
    if net.deep is not None and net.stages[0] != "layer3":
        raise InputError(
            f"config.backbone.stages={net.stages!r}: for config.variant="
            f"{RELEASED!r} the first must be layer3, which layer4 starts from"
        )
    fields = {name: value for name, value in given.items() if name in known}
    return ReleasedQPENet(net.deep, config.behaviour, **fields)


def _check_drift(config: Any, net: Backbone) -> None:
    """Refuses drifting batch norm where the authors' training has nothing like it."""
    for wrong, needed in (
        (config.variant != RELEASED, f"config.variant={RELEASED!r}"),
        (net.deep is None, "a ResNet as config.backbone.name"),
        (config.shots != 1, "config.shots=1: theirs can't be trained with several"),
        (config.accumulate != 1, "config.accumulate=1: it counts whole batches"),
        (config.dtype == "bfloat16", "config.dtype='float32' or 'tf32'"),
    ):
        if wrong:
            raise InputError(
                "config.backbone.drift=True repeats the training of the released "
                f"network and needs {needed}"
            )


def network_name(config: Any, shots: int) -> str:
    """Returns the network's name in tables; the released one's depends on `shots`."""
    if not is_released(config):
        return "QPENet"
    return f"{resolve_behaviour(config.behaviour, shots)} QPENet"


def initial_params(config: Any) -> PyTree[Array]:
    """Returns the parameters that training starts from."""
    key = jax.random.key(config.seed)
    return init_params(build_model(config), build_backbone(config).channels, key)


# One trace serves all networks of a kind that a process makes or opens.
@functools.partial(jax.jit, static_argnums=(0, 1))
def init_params(
    model: QPENet | ReleasedQPENet, channels: int, key: Array
) -> PyTree[Array]:
    """Returns a network's initial parameters; `channels` are the backbone's."""
    side, grid = 17, 3  # parameters depend on channels only: any small grid will do
    support = jnp.zeros((1, 1, grid, grid, channels))
    masks = jnp.zeros((1, 1, side, side), jnp.int32)
    params = model.init(key, support, masks, support[:, 0])["params"]
    return {name: params[name] for name in params if name != DEEP}  # the backbone's


def params_like(config: Any) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns shapes as checkpoints hold them: parameters, statistics if any.

    Nothing is computed, and what is restored by them lies on one device.
    """
    shapes = jax.eval_shape(lambda: initial_params(config))
    if config.backbone.drift:
        shapes = {**shapes, BATCH_STATISTICS: no_statistics(config.backbone.name)}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes
    )


def build_predictor(
    config: Any, params: PyTree[Array], weights: PyTree[Array]
) -> Predictor:
    """Returns QPENet as it was trained, over the backbone's frozen weights."""
    model, net = build_model(config), build_backbone(config)
    params, weights = fold_statistics(params, weights)
    return qpenet_predictor(model, net, params, weights, config.dtype)


def build_cosine_predictor(config: Any, weights: PyTree[Array]) -> Predictor:
    """Returns the training-free baseline, on all stages, where it scores best."""
    net = backbone_in_dtype(backbone(config.backbone.name), config.dtype)
    return TrainingFreePredictor(net, weights)


def build_self_support_predictor(
    config: Any, weights: PyTree[Array], scale: float = 1.0
) -> Predictor:
    """Returns the best predictor without any training: method prototype.

    Its margins are differences of cosines times `scale`.
    """
    net = backbone_in_dtype(backbone(config.backbone.name), config.dtype)
    return TrainingFreePredictor(net, weights, mixes=True, scale=scale)


def build_mean_predictor(
    config: Any, params: PyTree[Array], weights: PyTree[Array]
) -> Predictor:
    """Returns the mean of the network and of the predictor without training.

    Self-support takes the network's stages of the backbone, then all others.

    Raises InputError for the released network, which is made of other features.
    """
    model, net = build_model(config), build_backbone(config)
    if not isinstance(model, QPENet):
        raise InputError(
            f"config.variant={RELEASED!r} has no mean with self-support: "
            "choose a run of another variant"
        )
    params, weights = fold_statistics(params, weights)
    stages = dict.fromkeys((*net.stages, *backbone(config.backbone.name).stages))
    whole = backbone_in_dtype(net._replace(stages=tuple(stages)), config.dtype)
    return MeanPredictor(
        qpenet_predictor(model, net, params, weights, config.dtype),
        TrainingFreePredictor(whole, weights, mixes=True, scale=SHARPNESS),
    )

"""From a config to its network, and what of a config doesn't go with it."""

import dataclasses
from typing import Any

from qpenet_jax.backbones.registry import Backbone
from qpenet_jax.core.errors import InputError
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.released.network import NAME as RELEASED
from qpenet_jax.models.released.network import ReleasedQPENet
from qpenet_jax.models.variants import VARIANTS


def network(config: Any, net: Backbone) -> QPENet | ReleasedQPENet:
    """Returns the network over a backbone's features.

    QPENet proper, a variant of it, or the released network.

    Raises:
        InputError: fields of the config that don't go together.
    """
    if config.backbone.drift:
        _check_drift(config, net)
    return (_released if config.variant == RELEASED else _papers)(config, net)


def _papers(config: Any, net: Backbone) -> QPENet:
    fields = {f.name: f.default for f in dataclasses.fields(QPENet)}
    given: dict[str, Any] = dict(config.model)
    settled, _, kind = VARIANTS[config.variant]
    for name, value in settled.items():
        if given[name] not in (value, fields[name]):
            raise InputError(
                f"config.model.{name}={given[name]!r} is {value!r} in "
                f"config.variant={config.variant!r}: leave one of them out"
            )
    return kind(**{**given, **settled})


def _released(config: Any, net: Backbone) -> ReleasedQPENet:
    known = {f.name for f in dataclasses.fields(ReleasedQPENet)}
    default = {f.name: f.default for f in dataclasses.fields(QPENet)}
    given: dict[str, Any] = dict(config.model)
    for name, value in given.items():
        if name not in known and value != default[name]:
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

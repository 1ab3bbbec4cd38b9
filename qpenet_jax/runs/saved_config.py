"""How the config of a run is read, of this version or an earlier one."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from qpenet_jax.config import VERSION, default_config
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.fields import fields_like

MEANT: Mapping[int, Mapping[str, Any]] = {
    1: {"recipe": "paper", "dtype": "float32"},
    2: {"optimizer.first": 0},
}
"""What a version without a field meant, where that isn't the default of today."""


def merged(saved: Mapping[str, Any], source: str) -> Any:
    """Returns the config of a run of this version or an earlier one.

    Fields that came later have the value that the run was made with. `source` is the
    file, for messages.

    Raises:
        InputError: a field that no version has, or of a later version.
    """
    version = saved.get("version", 1)
    if version not in range(1, VERSION + 1):
        raise InputError(
            f"{source} is a config of version {version}, this qpenet_jax knows 1 to "
            f"{VERSION}: use the qpenet_jax that the run was made with, or a newer one"
        )
    config = default_config()
    for before in range(version, VERSION):
        config.update_from_flattened_dict(dict(MEANT[before]))
    _fill(config, saved, source)
    config.version = VERSION
    return config


def _fill(config: Any, saved: Mapping[str, Any], source: str, prefix: str = "") -> None:
    """Puts saved values over defaults, part by part."""
    for name, value in saved.items():
        where = f"{prefix}{name}"
        if name not in config:
            meant = " or ".join(
                f"{prefix}{field}" for field in fields_like(name, config)
            )
            hint = f": is it {meant}?" if meant else ""
            raise InputError(f"{source} has an unknown field {where}{hint}")
        default = config[name]
        if isinstance(default, ConfigDict):
            if not isinstance(value, Mapping):
                raise InputError(f"{source}: {where} must hold fields, not {value!r}")
            _fill(default, value, source, f"{where}.")
            continue
        try:
            config[name] = tuple(value) if isinstance(default, tuple) else value
        except TypeError:
            raise InputError(
                f"{source}: {where}={value!r} is not of the type of {default!r}"
            ) from None

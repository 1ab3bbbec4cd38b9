"""Configs are read from a file with `get_config()` or from a run, and changed."""

import contextlib
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from qpenet_jax.config import VERSION, default_config, flat, no_such_field
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path

OVERRIDE = re.compile(r"--?(?:no)?config\.([^=\[]+)")


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns the locked ConfigDict of a file such as configs/pascal_fold0.py.

    `overrides` are words of the command line, such as `--config.dataset.root=DIR`.

    Raises:
        InputError: no such file or field, an error inside the file (with its
            line), or a value of another type.
    """
    path = local_path(file)
    if not path.is_file():
        raise InputError(f"{file}: no such config file; configs/ holds examples")
    with _importable_from(path), _errors_with_line(path):
        # Imported, it would leave bytecode beside it, which overlooks quick edits.
        config = runpy.run_path(str(path))["get_config"]()
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{file}: get_config() must return an ml_collections.ConfigDict"
        )
    return override(config, overrides)


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config with fields changed, locked.

    Raises:
        InputError: no such field, or a value of another type.
    """
    for word in overrides:
        if match := OVERRIDE.match(word):
            _check_field(match[1], config)
    values, argv = flags.FlagValues(), ["qpenet", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, lock_config=True, flag_values=values, sys_argv=argv
        )
        rest = values(argv)
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    if len(rest) > 1:
        raise InputError(
            f"unknown argument {rest[1]!r}: fields are changed by --config.x=y"
        )
    return values.config


def saved_config(saved: Mapping[str, Any], source: str) -> ConfigDict:
    """Returns the config of a run from what its file holds.

    `source` is the file, for messages.

    Raises:
        InputError: an unknown field, a value of another type, or another version.
    """
    if saved.get("version") != VERSION:
        raise InputError(
            f"{source} is a config of version {saved.get('version')}, this qpenet_jax "
            f"knows {VERSION}: use the qpenet_jax that the run was made with"
        )
    config = default_config()
    defaults = flat(config.to_dict())
    for name, value in flat(saved).items():
        if name not in defaults:
            raise InputError(f"{source}: {no_such_field(name, config)}")
        default = defaults[name]
        try:
            if isinstance(default, tuple):
                value = tuple(value)
            config.update_from_flattened_dict({name: value})
        except TypeError:
            raise InputError(
                f"{source}: {name}={value!r} is not of the type of {default!r}"
            ) from None
    return config


def refuse_others(overrides: Sequence[str], fields: Sequence[str], why: str) -> None:
    """Refuses to change other fields than these.

    Raises:
        InputError: naming the override; `why` is the reason.
    """
    for word in overrides:
        match = OVERRIDE.match(word)
        if match and match[1] not in fields:
            raise InputError(f"{word}: {why}")


def _check_field(name: str, config: ConfigDict) -> None:
    """Refuses a name that is neither a field nor a part."""
    known = flat(config.to_dict())
    if not any(f"{field}.".startswith(f"{name}.") for field in known):
        raise no_such_field(name, config)


@contextlib.contextmanager
def _importable_from(path: Path) -> Iterator[None]:
    """Lets a config import what lies beside it, and `configs.common` of a checkout.

    Modules of `configs` are forgotten before and after: each checkout has its own.
    """
    folder = path.resolve().parent
    before = sys.path.copy()
    sys.path[:0] = map(str, (folder.parent, folder, Path.cwd()))
    _forget_configs()
    try:
        yield
    finally:
        sys.path[:] = before
        _forget_configs()


def _forget_configs() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "configs"]:
        del sys.modules[name]


@contextlib.contextmanager
def _errors_with_line(path: Path) -> Iterator[None]:
    """Turns whatever a user's file raises into one line with the file and its line."""
    try:
        yield
    except SyntaxError as error:
        # Python names neither of a text that it can't decode.
        place = f"{error.filename or path}, line {error.lineno or 1}"
        raise InputError(f"{place}: {type(error).__name__}: {error.msg}") from error
    except Exception as error:
        place = _place(path, error)
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{place}: {kind}{error}") from error


def _place(path: Path, error: Exception) -> str:
    """Returns the innermost line of the user's own files that led to an error."""
    folder = path.resolve().parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().is_relative_to(folder)
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else str(path)

"""Read a config file with its overrides outside of absl's own flags."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from qpenet_jax.core.errors import InputError


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Return the ConfigDict of a file such as configs/pascal_fold0.py.

    `overrides` are written as for train.py, `--config.dataset.root=DIR`.

    Raises:
        InputError: no such file or field, or a value of another type.
    """
    if not Path(file).is_file():
        raise InputError(f"{file}: no such config file; configs/ holds ours")
    # Our configs import `configs.common` from the folder that holds configs/.
    sys.path.insert(0, str(Path(file).resolve().parents[1]))
    values = flags.FlagValues()
    argv = ["qpenet", f"--config={file}", *overrides]
    config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=argv
    )
    with tell_config_errors():
        rest = values(argv)
    if len(rest) > 1:
        raise InputError(f"unknown argument {rest[1]!r}: overrides are --config.x=y")
    return values.config


@contextlib.contextmanager
def tell_config_errors() -> Iterator[None]:
    """Turn what absl and ml_collections raise about overrides into one line."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, KeyError) as error:
        field = " ".join(str(error).split())
        raise InputError(
            f"no such config field: {field}; configs/common.py lists them all"
        ) from None
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from None

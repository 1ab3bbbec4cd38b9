"""The one file of a published run: its parameters, and what was known of them.

A .safetensors file holds numbers and text, nothing that could run.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

from qpenet_jax.backbones.torch_files import read_tensors
from qpenet_jax.backbones.torch_layout import check_tensors
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.types import values_hash

MODEL_FILE = "model.safetensors"
"""Beside the config of a published run, in place of checkpoints."""

FORMAT = "qpenet_jax run 1"

STORED: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": jnp.bfloat16,
}
"""What the numbers may be stored in. They are float32 again when they are read."""


class Facts(NamedTuple):
    """What the file tells of its parameters."""

    step: int
    selection: str  # which checkpoint of the run it was
    inputs: dict[str, str]  # those of INPUTS_FILE
    sha256: str  # of the values as they are stored


def write_model(
    path: Path,
    params: PyTree[Array],
    dtype: str,
    step: int,
    selection: str,
    inputs: dict[str, str],
) -> None:
    """Writes parameters, with their statistics if any, whole or not at all.

    Raises:
        InputError: `dtype` is none of STORED, or too small for a value.
    """
    check_choice("--dtype ", dtype, STORED)
    stored = {
        name: np.ascontiguousarray(_rounded(np.asarray(array), dtype))
        for name, array in _flat(params).items()
    }
    facts = Facts(step, selection, inputs, values_hash(stored))
    metadata = {"format": FORMAT, "facts": json.dumps(facts._asdict())}
    write_whole(path, safetensors.numpy.save(stored, metadata=metadata))


def _rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = array.astype(STORED[dtype])
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise InputError(
            f"the parameters hold a value that {dtype} can't: choose --dtype bfloat16, "
            "which reaches as far as float32, or float32"
        )
    return rounded


def read_facts(path: Path) -> Facts:
    """Returns what the file tells of its parameters.

    Raises:
        InputError: the file is broken, or no published run's.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')}, not {FORMAT!r}")
        facts = Facts(**json.loads(metadata["facts"]))
        if not isinstance(facts.inputs, dict) or not isinstance(facts.step, int):
            raise ValueError("its facts are of other types")
        return facts
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path} is no model of `qpenet publish` ({e}): get it again, or publish "
            "the run once more"
        ) from None


def read_params(path: Path, like: PyTree[Any]) -> PyTree[Array]:
    """Returns the parameters in float32; `like` gives their shapes.

    Raises:
        InputError: they don't fit, or aren't what was written.
    """
    facts, tensors = read_facts(path), read_tensors(path)
    expected = {name: tuple(leaf.shape) for name, leaf in _flat(like).items()}
    check_tensors(f"{path} doesn't fit its config", expected, tensors)
    if values_hash(tensors) != facts.sha256:
        raise InputError(f"{path}: its values aren't what was written: get it again")
    wide = {name: x.astype(np.float32) for name, x in tensors.items()}
    return jax.device_put(unflatten_dict(wide, sep="/"))


def _flat(tree: PyTree[Any]) -> dict[str, Any]:
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    return flat

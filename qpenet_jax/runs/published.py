"""The parameter file of a published run, and runs on the Hugging Face hub.

The name of a run on the hub is org/name, or org/name@revision. A .safetensors file
holds numbers and text, but no code that could run.
"""

import json
import re
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
from qpenet_jax.core.choices import STORED_DTYPES
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.types import values_hash

MODEL_FILE = "model.safetensors"
"""Beside the config of a published run, in place of checkpoints."""

FORMAT = "qpenet_jax run 1"


class Facts(NamedTuple):
    """What the file says about its parameters."""

    step: int
    selection: str  # which checkpoint of the run it was
    inputs: dict[str, str]  # those of INPUTS_FILE
    sha256: str = ""  # of the values as they are stored; `write_model` computes it


def write_model(path: Path, params: PyTree[Array], dtype: str, facts: Facts) -> None:
    """Writes parameters, with their statistics if any, and what the file says of them.

    Raises:
        InputError: `dtype` is none of STORED_DTYPES, or too small for a value; no file
            is written then.
    """
    check_choice("--dtype ", dtype, STORED_DTYPES)
    with np.errstate(over="ignore"):
        stored = {
            name: np.asarray(array, order="C").astype(jnp.dtype(dtype))
            for name, array in _flat(params).items()
        }
    if not all(np.isfinite(x.astype(np.float32)).all() for x in stored.values()):
        raise InputError(
            f"the parameters hold a value that {dtype} can't: choose --dtype bfloat16, "
            "which reaches as far as float32, or float32"
        )
    facts = facts._replace(sha256=values_hash(stored))
    metadata = {"format": FORMAT, "facts": json.dumps(facts._asdict())}
    write_whole(path, safetensors.numpy.save(stored, metadata=metadata))


def read_facts(path: Path) -> Facts:
    """Returns what the file says about its parameters.

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


NAME = re.compile(r"([\w.-]+)/[\w.-]+(@[\w./-]+)?")

FILES = ("*.json", "*.safetensors", "*.md")
"""The files that are downloaded; a repository may hold others beside them."""


def is_on_hub(workdir: str | Path) -> bool:
    """Returns whether the name is one of the hub, and not of a folder of this machine.

    A wrong name within an existing folder, such as runs/, is not looked for on the hub.
    """
    path = Path(workdir)
    match = NAME.fullmatch(path.as_posix())
    return match is not None and not path.exists() and not Path(match[1]).exists()


def run_folder(workdir: str | Path) -> Path:
    """Returns the folder of a run; a run on the hub is downloaded first.

    Files that were downloaded before are used again, even without a connection.

    Raises:
        InputError: the hub doesn't have the run, or can't be reached.
    """
    if not is_on_hub(workdir):
        return Path(workdir)
    name, _, revision = Path(workdir).as_posix().partition("@")
    try:
        import huggingface_hub

        fetched = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=[*FILES]
        )
        return Path(str(fetched))
    except ImportError:
        raise InputError(
            f"{workdir}: no such folder; to look for it on the Hugging Face hub, run "
            "`pip install huggingface_hub`"
        ) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{workdir}: no such folder, and the Hugging Face hub doesn't give it "
            f"({reason}); check the name, the connection, and whether `hf auth login` "
            "is needed"
        ) from None

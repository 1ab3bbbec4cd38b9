"""The folder of a run: who may write it, what it was made with, how it is opened."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Array, PyTree

from qpenet_jax.backbones.precision import resolve_dtype
from qpenet_jax.config import LAST, flat, selections
from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.types import SegmentationDataset, values_hash
from qpenet_jax.data.versions import dataset_version, shared_photos
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.recipes import resolved
from qpenet_jax.runs.build import FREE, PATHS, build_weights, complete, params_like
from qpenet_jax.runs.config_files import override, refuse_others, saved_config
from qpenet_jax.runs.published import MODEL_FILE, read_facts, read_params, run_folder

CONFIG_FILE = "config.json"

INPUTS_FILE = "inputs.json"

SHARED = "scored images that were trained on"
SELECTED_ON = "images for the selection that were trained on"
"""Entries of INPUTS_FILE, if there are any: how many, and one of them. That of a
selection beside the result's ends with its name."""

WEIGHTS = "backbone weights"
"""Entry of INPUTS_FILE: the hash that `weights_hash` returns."""

DTYPE = "dtype"
"""Entry of INPUTS_FILE: the dtype that the config's means on the device of the run."""

OWN_BACKBONE = "backbone.safetensors"
"""File with the backbone's weights, in a published run that holds them."""

NO_TRAINING = ("workers", "behaviour", *PATHS)
"""Fields whose values may be changed when a finished run is used."""


def claim(workdir: Path, config: Any, inputs: dict[str, str]) -> None:
    """Writes the config into a new workdir, or checks that it's that of an old one.

    `inputs` are hashes of what the config names by path. Beside them stands what its
    dtype means on this device, where a run may go on only if it means the same.

    Raises:
        InputError: naming what differs, from the workdir or between processes.
    """
    by_process = [json.loads(x) for x in cluster.gather(json.dumps(inputs).encode())]
    for process, found in enumerate(by_process):
        first = by_process[0]
        if other := [name for name in first if found.get(name) != first[name]]:
            raise InputError(
                f"process {process} reads other inputs than process 0 "
                f"({', '.join(other)} differ): give all processes the same files"
            )
    cluster.by_first(lambda: _claim(workdir, config, inputs))


def _claim(workdir: Path, config: Any, inputs: dict[str, str]) -> None:
    if (workdir / MODEL_FILE).exists():
        raise InputError(
            f"{workdir} holds a published run, which can't be trained on: choose "
            "another --workdir"
        )
    path, dtype = workdir / INPUTS_FILE, resolve_dtype(config.dtype)
    if (workdir / CONFIG_FILE).exists():
        configs = config, resolved(read_config(workdir))
        now, before = (
            flat(each.to_dict()) | {DTYPE: resolve_dtype(each.dtype)}
            for each in configs
        )
        remedy = "choose another --workdir, or give the same config to resume"
        _refuse_changes(f"{workdir} holds a run of another config", now, before, remedy)
    else:
        write_json(workdir / CONFIG_FILE, json.loads(config.to_json()))
    inputs = inputs | {DTYPE: dtype}
    remedy = (
        "give the same data and weights as it started with, on a device that computes "
        "in the same dtype, or choose another --workdir"
    )
    before = read_inputs(workdir)
    _refuse_changes(f"{workdir} holds a run on other inputs", inputs, before, remedy)
    write_json(path, inputs)


def _refuse_changes(
    what: str, now: dict[str, Any], before: dict[str, Any], remedy: str
) -> None:
    """Refuses other values than before, of all that both hold and that isn't FREE."""
    common = now.keys() & before.keys() - FREE
    if changed := sorted(name for name in common if now[name] != before[name]):
        raise InputError(f"{what} ({', '.join(changed)} differ): {remedy}")


def inputs_of(
    train: SegmentationDataset, val: SegmentationDataset, weights: PyTree[Array]
) -> dict[str, str]:
    """Returns hashes of names and pixel counts, of files if any, and of the weights."""
    inputs = {WEIGHTS: weights_hash(weights)}
    for split, dataset in (("training", train), ("validation", val)):
        inputs[f"{split} images"] = dataset_version(dataset)
        if content := getattr(dataset, "content", None):  # none where all is drawn
            inputs[f"{split} files"] = content
    return inputs


def trained_and_scored(
    what: str, train_set: Any, trained: Any, val_set: Any, scored: Any
) -> dict[str, str]:
    """Returns which scored images are trained on, too, and warns of them.

    `trained` and `scored` are the samplers of episodes over the two data sets. Images
    of one list may serve both, as long as no episode of both shows one.
    """
    found = shared_photos(train_set, val_set, trained.images, scored.images)
    if not found:
        return {}
    text = f"{len(found)} of {len(scored)}, such as {' = '.join(found[0])}"
    cluster.warn(f"{what}: {text}")
    return {what: text}


def weights_hash(weights: PyTree[Array]) -> str:
    """Returns 12 hex digits of a hash over a backbone's weights."""
    return values_hash(weights)[:12]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run that can be evaluated: its selected checkpoint, and what it needs."""

    folder: Path
    config: Any
    params: PyTree[Array]
    step: int

    @property
    def shared(self) -> dict[str, str]:
        """The entries SHARED and SELECTED_ON of its inputs, which results repeat."""
        inputs = read_inputs(self.folder)
        return {k: v for k, v in inputs.items() if k.startswith((SHARED, SELECTED_ON))}

    @functools.cached_property
    def weights(self) -> PyTree[Array]:
        """The backbone's weights, on the device.

        Raises InputError if they aren't there, or not those that the run saw.
        """
        expected = read_inputs(self.folder).get(WEIGHTS)
        spec = self.config.backbone
        if spec.weights and not Path(spec.weights).exists():
            raise InputError(
                f"{spec.weights}: no such file, and {self.folder} needs the weights of "
                f"{spec.name} that it was trained with (hash {expected}): give them by "
                "--config.backbone.weights=FILE"
            )
        weights = build_weights(self.config)
        found = weights_hash(weights)
        if expected not in (None, found):
            raise InputError(
                f"{spec.weights or spec.name}: not the weights that {self.folder} was "
                f"trained with (hash {found}, there {expected}): give those by "
                "--config.backbone.weights=FILE"
            )
        return weights


def open_run(
    workdir: str | Path, overrides: Sequence[str] = (), selection: str | None = None
) -> TrainedRun:
    """Returns the run of a workdir, with the parameters that it selected.

    The workdir may also be a published run, `qpenet publish`'s folder or a name on the
    Hugging Face hub (`runs/published.py`), which holds the parameters of one selection.
    `overrides` are other paths than it was trained with, such as
    `--config.dataset.root=DIR`. `selection` takes another checkpoint than the
    result's: "last", or one that the run's `select_on` names.

    Raises:
        InputError: it holds no run or no checkpoint yet, or an override is no path, or
            the run kept no checkpoint by that selection.
    """
    folder = run_folder(workdir)
    config = read_config(folder)
    if (folder / OWN_BACKBONE).exists():
        config.backbone.weights = str(folder / OWN_BACKBONE)
    config = complete(_moved(config, overrides))
    model, like = folder / MODEL_FILE, params_like(config)
    facts = read_facts(model) if model.exists() else None
    kept = [facts.selection] if facts else [*selections(config), LAST]
    chosen = selection or kept[0]
    check_choice(f"{folder} kept no checkpoint by ", chosen, dict.fromkeys(kept))
    if facts:
        return TrainedRun(folder, config, read_params(model, like), facts.step)
    # Here: Orbax takes half a second, and models of one file do without it.
    from qpenet_jax.runs.checkpoints import restore_params

    params, step = restore_params(folder, like, chosen)
    return TrainedRun(folder, config, params, step)


def read_inputs(folder: Path) -> dict[str, Any]:
    """Returns what is known of the inputs of a run."""
    if (folder / MODEL_FILE).exists():
        return read_facts(folder / MODEL_FILE).inputs
    path = folder / INPUTS_FILE
    return read_json(path) if path.exists() else {}


def read_config(workdir: Path) -> Any:
    """Returns the config of a run.

    Raises:
        InputError: no run, or a broken config.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise InputError(
            f"{workdir} is no run: it has no {CONFIG_FILE}; give the --workdir of "
            "train.py"
        )
    return saved_config(read_json(path), str(path))


def _moved(config: Any, overrides: Sequence[str]) -> Any:
    """Returns the config with other paths, or another number of loading processes."""
    why = (
        "a finished run decides this; only workers, behaviour and the paths "
        f"{', '.join(PATHS)} can be changed"
    )
    refuse_others(overrides, NO_TRAINING, why)
    return override(config, overrides)


def read_json(path: Path) -> dict[str, Any]:
    """Returns a file of a workdir; raises InputError if it is broken."""
    remedy = "restore it, or use another --workdir"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: {remedy}")
    return content

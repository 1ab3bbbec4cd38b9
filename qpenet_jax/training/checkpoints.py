"""Checkpoints of a run by Orbax: the latest, and the best of every selection."""

import contextlib
import functools
import hashlib
import inspect
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as policies

from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.types import BATCH_STATISTICS, Array
from qpenet_jax.training.step import TrainState

FOLDER = "checkpoints"

METRICS = "metrics"
"""What Orbax calls the folder of a step's scores, and the file in it."""


HASHES = "sha256"
"""The entry of a step's metadata with the hash of each item, by its name."""

LAST = "last"
"""The selection that takes the latest checkpoint; the others take their best."""


def open_checkpoints(
    workdir: Path, selections: Sequence[str] = (), read_only: bool = False
) -> ocp.CheckpointManager:
    """Return the manager of a run, to be used in a `with` (closing finishes saves).

    Of each of the `selections` the best checkpoint is kept; the latest always is.
    """
    best = [
        policies.BestN(
            get_metric_fn=functools.partial(_score, selection=name),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        for name in selections
        if name != LAST
    ]
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda scores: 0.0,  # Orbax saves no scores without; ours is `step_of`
        preservation_policy=policies.AnyPreservationPolicy(
            [policies.LatestN(1), *best]
        ),
        read_only=read_only,
    )
    return ocp.CheckpointManager((workdir / FOLDER).resolve(), options=options)


def _score(scores: Mapping[str, float], selection: str) -> float:
    """Return the score by a selection; earlier versions had one, called miou."""
    return scores[selection] if selection in scores else scores["miou"]


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Save the state under its step, unless that step is saved already.

    `scores` are mIoUs by the names of selections. Hashes of the values go with them:
    Orbax's files have no checksums, and a flipped bit would be another number.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    rest = {"step": state.step, "opt_state": state.opt_state}
    items = {"params": state.learned, "optimizer": rest}
    hashes = {name: values_hash(tree) for name, tree in items.items()}
    manager.save(
        step,
        args=ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        ),
        metrics=dict(scores) if scores else None,
        custom_metadata={HASHES: hashes},
    )


def values_hash(tree: PyTree[Array]) -> str:
    """Return the SHA-256 of the values of a tree, in its order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def is_scored(manager: ocp.CheckpointManager, step: int) -> bool:
    """Return whether a saved step competes for best."""
    return manager.metrics(step) is not None


def add_scores(
    manager: ocp.CheckpointManager, step: int, scores: Mapping[str, float]
) -> None:
    """Give a saved step its scores afterwards, as `save` would have."""

    # Orbax reads the scores from these files, and has no call to add one later.
    def write():
        file = Path(manager.directory) / str(step) / METRICS / METRICS
        write_whole(file, json.dumps(dict(scores)))

    cluster.by_first(write, "scores")
    manager.reload()


def restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """Return the latest saved state, or `state` if there is none."""
    step = manager.latest_step()
    if step is None:
        return state
    rest = {"step": state.step, "opt_state": state.opt_state}
    saved = _restore(manager, step, params=state.learned, optimizer=rest)
    params = dict(saved["params"])
    statistics = params.pop(BATCH_STATISTICS, {})
    return TrainState(params=params, statistics=statistics, **saved["optimizer"])


def step_of(manager: ocp.CheckpointManager, selection: str) -> int | None:
    """Return the step that a selection takes; the latest if none is scored."""
    scores = {step: manager.metrics(step) for step in manager.all_steps()}
    scored = {step: of for step, of in scores.items() if of}
    if selection == LAST or not scored:
        return manager.latest_step()
    return max(scored, key=lambda step: (_score(scored[step], selection), step))


def restore_params(
    workdir: Path, like: PyTree[Array], selection: str
) -> tuple[PyTree[Array], int]:
    """Return the parameters of `step_of` and that step.

    `like` gives shapes and devices.

    Raises:
        InputError: there is no checkpoint, or it is damaged.
    """
    missing = InputError(f"{workdir} has no checkpoint yet: train until one is saved")
    if not (workdir / FOLDER).is_dir():
        raise missing
    with open_checkpoints(workdir, read_only=True) as manager:
        step = step_of(manager, selection)
        if step is None:
            raise missing
        return _restore(manager, step, params=like)["params"], step


def _restore(manager: ocp.CheckpointManager, step: int, **like: PyTree):
    items = {name: ocp.args.StandardRestore(_abstract(t)) for name, t in like.items()}
    try:
        restored = _read(manager, step, ocp.args.Composite(**items))
        # An earlier version wrote no hashes.
        told = (manager.metadata(step).custom_metadata or {}).get(HASHES, {})
        for name in items.keys() & told.keys():
            if values_hash(restored[name]) != told[name]:
                raise ValueError(f"its {name} aren't what was saved")
        return restored
    except Exception as error:  # whatever Orbax and TensorStore find wrong with it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"checkpoint {manager.directory}/{step} can't be read ({reason[:200]}); "
            "delete that folder to go on from an older one"
        ) from error


def _read(manager: ocp.CheckpointManager, step: int, items: ocp.args.Composite):
    """Return what Orbax restores; where that fails, without pages of tracebacks.

    It reads all arrays at once, and where one is damaged it doesn't wait for the
    others: they fail later, at the latest when the process ends.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return manager.restore(step, args=items)
        except Exception:
            _silence_reads()
            raise


def _silence_reads() -> None:
    """Tell Python not to print how the reads end that a failed one left behind."""
    unraisable, uncaught = sys.unraisablehook, sys.excepthook

    def is_late(error) -> bool:
        return str(error) == "Event loop is closed"

    def on_unraisable(found: Any) -> None:
        if not inspect.iscoroutine(found.object) and not is_late(found.exc_value):
            unraisable(found)

    def on_uncaught(kind, error, trace) -> None:
        if not is_late(error):
            uncaught(kind, error, trace)

    sys.unraisablehook, sys.excepthook = on_unraisable, on_uncaught
    logging.getLogger("asyncio").addFilter(lambda record: "never" not in record.msg)


def _abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)

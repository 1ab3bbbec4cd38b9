"""Checkpoints of a run by Orbax: the latest, and the best of every selection."""

import contextlib
import functools
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as policies

from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.runtime import silence_late
from qpenet_jax.core.types import BATCH_STATISTICS, Array
from qpenet_jax.training.step import TrainState, values_hash

FOLDER = "checkpoints"

DAMAGED = "damaged"
"""Folder of a workdir for checkpoints that training couldn't go on from."""

DELETED = "deleted"
"""Folder beside the checkpoints for those that are no longer kept: renamed at once, so
that a kill leaves none in part, and deleted with the next save."""

METRICS = "metrics"
"""What Orbax calls the folder of a step's scores, and the file in it."""

HASHES = "sha256"
"""The entry of a step's metadata with the hash of each item, by its name."""

LAST = "last"
"""The selection that takes the latest checkpoint; the others take their best."""


class DamagedCheckpoint(InputError):
    """A checkpoint can't be read; `what` is the message without the remedy."""

    def __init__(self, folder: str | Path, reason: object):
        self.what = f"checkpoint {folder} can't be read ({_brief(reason)})"
        super().__init__(
            f"{self.what}; put back a copy of that folder, or delete that folder to go "
            "on from an older one"
        )


@contextlib.contextmanager
def open_checkpoints(
    workdir: Path, selections: Sequence[str] = (), read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """Holds the manager of a run for as long as the `with` lasts; its end ends saves.

    Of each of the `selections` the best checkpoint is kept; the latest two always are.
    What an interrupted save left is removed, unless it is opened `read_only`.

    Raises:
        InputError: scores that can't be read, but for the latest checkpoint's, which
            are made again; at the end, a save that failed.
    """
    folder = (workdir / FOLDER).resolve()
    _check_scores(folder, mend=not read_only)
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
            [policies.LatestN(2), *best]
        ),
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        todelete_subdir=DELETED,
    )
    manager = ocp.CheckpointManager(folder, options=options)
    silence_late()
    try:
        yield manager
    finally:
        with _told(folder):
            manager.close()
        if not read_only:
            shutil.rmtree(folder / DELETED, ignore_errors=True)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turns what Orbax raises of a save, perhaps of the one before, into one line."""
    try:
        yield
    except Exception as error:  # of many types, from its threads
        raise InputError(
            f"{folder}: a checkpoint can't be saved ({_brief(error)}); the ones before "
            "are whole: make room, and the same command goes on from the latest"
        ) from error


def _brief(reason: object) -> str:
    """Returns where and why, the start and the end of a message of TensorStore's."""
    text = (str(reason) or type(reason).__name__).splitlines()[0]
    return text if len(text) < 200 else f"{text[:80]} [...] {text[-80:]}"


def _check_scores(folder: Path, mend: bool) -> None:
    """Looks whether Orbax can read all scores; forget the latest's, if they `mend`."""
    steps = (int(path.name) for path in folder.glob("*") if path.name.isdigit())
    for place, step in enumerate(sorted(steps, reverse=True)):
        file = folder / str(step) / METRICS / METRICS
        try:
            if file.exists():
                json.loads(file.read_text())
        except (OSError, ValueError) as error:
            damaged = DamagedCheckpoint(file.parents[1], f"its scores: {error}")
            if place or not mend:
                raise damaged from None
            file.unlink(missing_ok=True)  # another process may have
            cluster.warn(f"{damaged.what}; it is scored again")


def _score(scores: Mapping[str, float], selection: str) -> float:
    """Returns the score by a selection; earlier versions had one, called miou."""
    return scores[selection] if selection in scores else scores["miou"]


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Saves the state under its step, unless that step is saved already.

    `scores` are mIoUs by the names of selections. Hashes of the values go with them:
    Orbax's files have no checksums, and a flipped bit would be another number.

    Raises:
        InputError: this save or the one before failed, as on a full disk.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    rest = {"step": state.step, "opt_state": state.opt_state}
    items = {"params": state.learned, "optimizer": rest}
    hashes = {name: values_hash(tree) for name, tree in items.items()}
    folder = Path(manager.directory)
    with _told(folder):
        manager.wait_until_finished()  # as `save` does
        shutil.rmtree(folder / DELETED, ignore_errors=True)
        manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            ),
            metrics=dict(scores) if scores else None,
            custom_metadata={HASHES: hashes},
        )


def is_scored(manager: ocp.CheckpointManager, step: int) -> bool:
    """Returns whether a saved step competes for best."""
    return manager.metrics(step) is not None


def add_scores(
    manager: ocp.CheckpointManager, step: int, scores: Mapping[str, float]
) -> None:
    """Gives a saved step its scores afterwards, as `save` would have."""

    # Orbax reads the scores from these files, and has no call to add one later.
    def write():
        file = Path(manager.directory) / str(step) / METRICS / METRICS
        write_whole(file, json.dumps(dict(scores)))

    cluster.by_first(write, "scores")
    manager.reload()


def restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """Returns the latest saved state that can be read, or `state` if none is saved.

    Damaged ones are told and put into the folder DAMAGED of the workdir.

    Raises:
        InputError: all are damaged.
    """
    manager.wait_until_finished()
    damaged: dict[int, DamagedCheckpoint] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = _state(manager, step, state)
        except DamagedCheckpoint as error:
            damaged[step] = error
            continue
        for other, error in damaged.items():
            folder = Path(manager.directory) / str(other)
            aside = cluster.by_first(functools.partial(_put_aside, folder), "aside")
            cluster.warn(f"{error.what}; it is now {aside}, going on from step {step}")
        manager.reload()
        return found
    if damaged:
        raise next(iter(damaged.values()))
    return state


def _put_aside(checkpoint: Path) -> str:
    """Moves a checkpoint out of Orbax's sight, in the place of an earlier one."""
    aside = checkpoint.parents[1] / DAMAGED / checkpoint.name
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    return str(checkpoint.rename(aside))


def _state(manager: ocp.CheckpointManager, step: int, state: TrainState) -> TrainState:
    rest = {"step": state.step, "opt_state": state.opt_state}
    saved = _restore(manager, step, params=state.learned, optimizer=rest)
    params = dict(saved["params"])
    statistics = params.pop(BATCH_STATISTICS, {})
    return TrainState(params=params, statistics=statistics, **saved["optimizer"])


def step_of(manager: ocp.CheckpointManager, selection: str) -> int | None:
    """Returns the step that a selection takes; the latest if none is scored.

    Raises:
        InputError: a checkpoint that was saved with scores has lost them.
    """
    scores = {step: manager.metrics(step) for step in manager.all_steps()}
    scored = {step: of for step, of in scores.items() if of}
    if selection == LAST or not scored:
        return manager.latest_step()
    for step in scores.keys() - scored.keys():
        if METRICS in (manager.metadata(step).item_handlers or ()):
            folder = Path(manager.directory) / str(step)
            raise DamagedCheckpoint(folder, "its scores are missing")
    return max(scored, key=lambda step: (_score(scored[step], selection), step))


def restore_params(
    workdir: Path, like: PyTree, selection: str
) -> tuple[PyTree[Array], int]:
    """Returns the parameters of `step_of` and that step.

    `like` holds arrays or their shapes, and the devices.

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
        metadata = manager.metadata(step)
        if not metadata.init_timestamp_nsecs:
            raise ValueError("its metadata are lost, and the hashes with them")
        # An earlier version wrote no hashes.
        told = (metadata.custom_metadata or {}).get(HASHES, {})
        for name in items.keys() & told.keys():
            if values_hash(restored[name]) != told[name]:
                raise ValueError(f"its {name} aren't what was saved")
        return restored
    except Exception as error:  # whatever Orbax and TensorStore find wrong with it
        raise DamagedCheckpoint(f"{manager.directory}/{step}", error) from error


def _read(manager: ocp.CheckpointManager, step: int, items: ocp.args.Composite):
    """Returns what Orbax restores; where that fails, without pages of tracebacks."""
    with contextlib.redirect_stderr(io.StringIO()):
        return manager.restore(step, args=items)


def _abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)

"""Checkpoints of a run by Orbax: the latest two, and the best of every selection.

Scores of checkpoints lie beside them, in SCORES.
"""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as policies

from qpenet_jax.config import LAST
from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.types import Array, TrainState, values_hash

FOLDER = "checkpoints"

SCORES = "scores.json"
"""File of a workdir: mIoU of its checkpoints, by step and selection."""

DAMAGED = "damaged"
"""Folder of a workdir for checkpoints that training couldn't go on from."""

HASHES = "sha256"
"""The entry of a step's metadata with the hash of each item, by its name."""

Scores = dict[int, dict[str, float]]


class DamagedCheckpoint(InputError):
    """A checkpoint can't be read; `what` is the message without the remedy."""

    def __init__(self, folder: str | Path, reason: object):
        self.what = f"checkpoint {folder} can't be read ({_brief(reason)})"
        super().__init__(
            f"{self.what}; put back a copy of that folder, or delete that folder to go "
            "on from an older one"
        )


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run, as `open_checkpoints` opens them."""

    workdir: Path
    manager: ocp.CheckpointManager
    scores: Scores

    def steps(self) -> list[int]:
        """Returns the steps that are saved, in order."""
        return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        """Returns the latest step that is saved."""
        return self.manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves a training under its step, unless that step is saved already.

        Hashes of the values go with it: Orbax's files have no checksums, and a flipped
        bit would be another number.

        Raises:
            InputError: this save or the one before failed, as on a full disk.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        items = _items(state)
        hashes = {name: values_hash(tree) for name, tree in items.items()}
        with _one_line_errors(self.workdir):
            self.manager.wait_until_finished()
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(x) for name, x in items.items()}
                ),
                custom_metadata={HASHES: hashes},
            )

    def add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Writes a step's scores: mIoU by the names of selections."""
        self.scores[step] = dict(scores)
        text = json.dumps(self.scores, indent=1) + "\n"
        cluster.by_first(lambda: write_whole(self.workdir / SCORES, text))

    def restore(self, like: TrainState) -> TrainState | None:
        """Returns the latest checkpoint that can be read, if there are any.

        `like` holds arrays of the same shapes, on the same devices. Damaged ones are
        put into the folder DAMAGED of the workdir, with a warning.

        Raises:
            InputError: all are damaged.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.steps()):
            try:
                saved = self._read(step, **_items(like))
            except DamagedCheckpoint as error:
                damaged[step] = error
                continue
            for other, error in damaged.items():
                aside = cluster.by_first(functools.partial(self._put_aside, other))
                cluster.warn(f"{error.what}; it is now {aside}, going on from {step}")
            self.manager.reload()
            return TrainState(params=saved["params"], **saved["rest"])
        if damaged:
            raise next(iter(damaged.values()))
        return None

    def params(self, step: int, like: PyTree) -> PyTree[Array]:
        """Returns the parameters of a step; `like` holds arrays or their shapes.

        Raises:
            InputError: the checkpoint is damaged.
        """
        return self._read(step, params=like)["params"]

    def selected(self, selection: str) -> int:
        """Returns the step that a selection takes; the latest if none is scored.

        Raises:
            InputError: there is no checkpoint yet.
        """
        saved = self.steps()
        if not saved:
            raise InputError(
                f"{self.workdir} has no checkpoint yet: train until one is saved"
            )
        best = None if selection == LAST else _best(self.scores, saved, selection)
        return saved[-1] if best is None else best

    def _put_aside(self, step: int) -> str:
        aside = self.workdir / DAMAGED / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        return str((self.workdir / FOLDER / str(step)).rename(aside))

    def _read(self, step: int, **like: PyTree) -> dict[str, Any]:
        shapes = {
            name: ocp.args.StandardRestore(
                jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            )
            for name, tree in like.items()
        }
        with _one_line_errors(self.workdir):
            self.manager.wait_until_finished()
        try:
            # Orbax prints pages of tracebacks where it can't read a file.
            with contextlib.redirect_stderr(io.StringIO()):
                items = ocp.args.Composite(**shapes)
                restored = self.manager.restore(step, args=items)
            saved = (self.manager.metadata(step).custom_metadata or {})[HASHES]
            for name in like:
                if values_hash(restored[name]) != saved[name]:
                    raise ValueError(f"its {name} aren't what was saved")
            return {name: restored[name] for name in like}
        except Exception as error:  # whatever Orbax and TensorStore find wrong with it
            folder = self.workdir / FOLDER / str(step)
            raise DamagedCheckpoint(folder, error) from error


def _items(state: TrainState) -> dict[str, PyTree]:
    """Returns Orbax's items: parameters alone, as predicting needs nothing else."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    return {"params": state.params, "rest": rest}


@contextlib.contextmanager
def open_checkpoints(
    workdir: Path, selections: Sequence[str] = (), read_only: bool = False
) -> Iterator[Checkpoints]:
    """Holds the checkpoints of a run for as long as the `with` lasts.

    Of each of the `selections` the best checkpoint is kept; the latest two always are.
    Unless it is opened `read_only`, what an interrupted save left is removed, and
    SCORES is there from now on: without it, scores have been lost.

    Raises:
        InputError: scores that can't be read; at the end, a save that failed.
    """
    scores = _read_scores(workdir)
    if not (read_only or scores):
        cluster.by_first(lambda: write_whole(workdir / SCORES, "{}\n"))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_LatestAndBest(scores, selections),
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
    )
    folder = (workdir / FOLDER).resolve()
    manager = ocp.CheckpointManager(folder, options=options)
    try:
        yield Checkpoints(workdir, manager, scores)
    finally:
        with _one_line_errors(workdir):
            manager.close()


def restore_params(
    workdir: Path, like: PyTree, selection: str
) -> tuple[PyTree[Array], int]:
    """Returns the parameters of the step that a selection takes, and that step.

    `like` holds arrays or their shapes, and the devices.

    Raises:
        InputError: there is no checkpoint, it is damaged, or scores are missing.
    """
    any_saved = (workdir / FOLDER).is_dir()
    if any_saved and selection != LAST and not (workdir / SCORES).exists():
        raise InputError(
            f"{workdir} has lost its {SCORES}: put back a copy, or run train.py again "
            "with the same --workdir, which scores the checkpoints that are kept"
        )
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.selected(selection)
        return checkpoints.params(step, like), step


@dataclasses.dataclass(frozen=True)
class _LatestAndBest(policies.PreservationPolicy):
    """Keeps the latest two checkpoints and the best of every selection."""

    scores: Scores
    selections: Sequence[str]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any):
        """Returns whether to keep each of the checkpoints, which are in order."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = (_best(self.scores, steps, name) for name in self.selections)
        kept = {*steps[-2:], *best}
        return [step in kept for step in steps]


def _best(scores: Scores, steps: Sequence[int], selection: str) -> int | None:
    """Returns the step with the highest score, the later of equal ones, if any has."""
    scored = [step for step in steps if selection in scores.get(step, ())]
    return max(scored, key=lambda s: (scores[s][selection], s), default=None)


def _read_scores(workdir: Path) -> Scores:
    path = workdir / SCORES
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            int(step): {name: float(score) for name, score in scores.items()}
            for step, scores in found.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} can't be read ({_brief(error)}): put back a copy, or delete it "
            "and run train.py again, which scores the checkpoints that are kept"
        ) from None


@contextlib.contextmanager
def _one_line_errors(workdir: Path) -> Iterator[None]:
    """Turns what Orbax raises of a save, perhaps of the one before, into one line."""
    try:
        yield
    except Exception as error:  # of many types, from its threads
        raise InputError(
            f"{workdir / FOLDER}: a checkpoint can't be saved ({_brief(error)}); the "
            "ones before are whole: make room, and the same command goes on from the "
            "latest"
        ) from error


def _brief(reason: object) -> str:
    """Returns where and why, the start and the end of a message of TensorStore's."""
    text = (str(reason) or type(reason).__name__).splitlines()[0]
    return text if len(text) < 200 else f"{text[:80]} [...] {text[-80:]}"

"""Train one experiment: restore, step, select, save; then score what was selected."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter

from qpenet_jax.core.files import locked
from qpenet_jax.runs.evaluator import Evaluator
from qpenet_jax.runs.experiment import Experiment
from qpenet_jax.runs.folder import claim, inputs_of
from qpenet_jax.runs.progress import Progress
from qpenet_jax.runs.stopping import Interrupted, StopSignal
from qpenet_jax.runs.trainer import Trainer
from qpenet_jax.training import checkpoints
from qpenet_jax.training.step import TrainState

LOCK_FILE = "lock"
"""Held by the one process that trains in a workdir."""


def train(config: Any, workdir: Path) -> None:
    """Train and evaluate one experiment, or go on with it if it was stopped.

    Raises:
        InputError: bad input, another run in the workdir, or a loss that diverges.
        Interrupted: by Ctrl-C or SIGTERM; the same call goes on.
    """
    with StopSignal() as stop:
        trainer = Trainer(Experiment(config))
        experiment, weights = trainer.experiment, trainer.weights
        val = experiment.dataset("val")
        evaluator = Evaluator(experiment, weights, workdir, val)
        selection = experiment.selection_protocol()
        selector = selection and Evaluator(experiment, weights, workdir, val, selection)
        busy = (
            f"{workdir} is in use: another process trains there; wait for it, or "
            "choose another --workdir"
        )
        with locked(workdir / LOCK_FILE, busy):
            claim(workdir, trainer.config, inputs_of(trainer.dataset, val, weights))
            name, images = trainer.config.dataset.name, len(trainer.sampler)
            print(f"{name}: {images} training images, {trainer.steps} steps")
            print(evaluator.describe())
            state = _trained(trainer, workdir, evaluator, selector, stop)
            _score_selected(trainer, workdir, evaluator, state)
    print(evaluator.report())
    print(f"results, figure, checkpoints and TensorBoard events: {workdir}")


def _trained(
    trainer: Trainer,
    workdir: Path,
    evaluator: Evaluator,
    selector: Evaluator | None,
    stop: StopSignal,
) -> TrainState:
    """Take the steps that are left and return the last state, saved as all due ones."""
    with checkpoints.open_checkpoints(workdir) as manager:
        state = _started(trainer, manager, evaluator)
        return Loop(trainer, workdir, manager, selector, stop).run(state)


def _started(
    trainer: Trainer, manager: ocp.CheckpointManager, evaluator: Evaluator
) -> TrainState:
    """Return the workdir's latest state, else that of step 0 after its references."""
    state = checkpoints.restore(manager, trainer.initial_state())
    if int(state.step) == 0 and trainer.config.eval.references:
        print(f"before training\n{evaluator.references()}")
    return trainer.placed(state)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The steps of one training, with what happens every so many of them.

    The `selector` scores checkpoints; without one the last is the run's result.
    """

    trainer: Trainer
    workdir: Path
    manager: ocp.CheckpointManager
    selector: Evaluator | None
    stop: StopSignal

    def run(self, state: TrainState) -> TrainState:
        """Take all steps that are left and return the last state."""
        trainer, start = self.trainer, int(state.step)
        with (
            Progress(trainer, self.workdir, start) as progress,
            contextlib.closing(trainer.batches(start)) as batches,
        ):
            self._score_restored(state, progress)
            with self.stop.postponed():
                for step in range(start + 1, trainer.steps + 1):
                    state, measured = trainer.step(state, next(batches))
                    progress.add(measured)
                    self._after(step, state, progress)
        return state

    def _after(self, step: int, state: TrainState, progress: Progress) -> None:
        """Tell, select and save where it is time to, or where a stop was asked for."""
        config = self.trainer.config
        due = self._is_due(step)
        saving = due or self.stop.asked or step % config.save_every == 0
        if not saving and step % config.log_every:
            return
        progress.tell(step, saved=self.manager.latest_step())
        if saving:
            miou = self._score_unless_stopped(state, progress) if due else None
            checkpoints.save(self.manager, state, miou)
        progress.restart_clock()
        if saving and self.stop.asked:
            raise Interrupted(f"step {step} is saved: the same command goes on")

    def _is_due(self, step: int) -> bool:
        """Return whether a step is saved and, for the selection, scored."""
        return step == self.trainer.steps or step % self.trainer.config.eval.every == 0

    def _score_unless_stopped(
        self, state: TrainState, progress: Progress
    ) -> float | None:
        """Return mIoU for the selection; None without one, or after a stop.

        A stop doesn't wait for a score: the resumed run finds the step unscored.
        """
        try:
            with self.stop.at_once():
                return self._score(state, progress)
        except Interrupted:
            return None

    def _score_restored(self, state: TrainState, progress: Progress) -> None:
        """Score the restored checkpoint if a stop left it unscored."""
        step = int(state.step)
        if step == 0 or not self._is_due(step):
            return
        if checkpoints.is_scored(self.manager, step):
            return
        miou = self._score(state, progress)
        if miou is not None:
            checkpoints.add_score(self.manager, step, miou)
        progress.restart_clock()

    def _score(self, state: TrainState, progress: Progress) -> float | None:
        if self.selector is None:
            return None
        miou, name = self.selector.miou(state.learned), self.trainer.config.select_on
        progress.scalars("eval", {f"{name}_miou": miou}, int(state.step))
        return miou


def _score_selected(
    trainer: Trainer, workdir: Path, evaluator: Evaluator, state: TrainState
) -> None:
    """Score the selected checkpoint on the novel classes, unless it was before."""
    params, selected = checkpoints.restore_params(workdir, state.learned)
    if evaluator.step() == selected:
        return
    results, figure = evaluator(trainer.placed(params), step=selected)
    with SummaryWriter(str(workdir)) as writer:
        writer.add_scalar("eval/miou", results["miou"], selected)
        writer.add_scalar("eval/fb_iou", results["fb_iou"], selected)
        writer.add_image("episodes", figure, selected, dataformats="HWC")

"""Train one experiment: restore, step, select, save; then score what was selected."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from qpenet_jax.core import cluster, markdown
from qpenet_jax.core.cluster import warn
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path, locked, refuse_overwriting
from qpenet_jax.data.versions import shared_photos
from qpenet_jax.evaluation.report import RESULTS
from qpenet_jax.runs import retries
from qpenet_jax.runs.evaluator import Evaluator
from qpenet_jax.runs.events import Events
from qpenet_jax.runs.experiment import Experiment
from qpenet_jax.runs.folder import SELECTED_ON, SHARED, claim, inputs_of, read_json
from qpenet_jax.runs.profiling import Profile
from qpenet_jax.runs.progress import NotFinite, Progress
from qpenet_jax.runs.stopping import Interrupted, StopSignal
from qpenet_jax.runs.trainer import Trainer
from qpenet_jax.training import checkpoints
from qpenet_jax.training.health import is_finite
from qpenet_jax.training.step import TrainState

LOCK_FILE = "lock"
"""Held by the one process that trains in a workdir."""


def train(config: Any, workdir: Path, profile: int = 0) -> None:
    """Trains and evaluates one experiment, or go on with it if it was stopped.

    `profile` is the number of steps to be traced, for TensorBoard or xprof.

    Raises:
        InputError: bad input, another run in the workdir, or a loss that diverges.
        Interrupted: by Ctrl-C or SIGTERM; the same call goes on.
    """
    workdir = local_path(workdir)
    with StopSignal() as stop:
        experiment = Experiment(config)
        refuse_overwriting([workdir / LOCK_FILE], experiment.inputs)
        trainer = Trainer(experiment)
        warn(trainer.warning)
        weights = trainer.weights
        val = experiment.dataset("val")
        evaluator = Evaluator(experiment, weights, workdir, val)
        selectors = {
            name: Evaluator(experiment, weights, workdir, val, protocol)
            for name, protocol in experiment.selection_protocols().items()
        }
        busy = (
            f"{workdir} is in use: another process trains there; wait for it, or "
            "choose another --workdir"
        )
        with _locked(workdir / LOCK_FILE, busy):
            shared = _trained_on(trainer, SHARED, evaluator)
            for selector in selectors.values():
                shared |= _trained_on(trainer, SELECTED_ON, selector)
            inputs = inputs_of(trainer.dataset, val, weights)
            _refuse_other_inputs(inputs)
            cluster.by_first(
                lambda: claim(workdir, trainer.config, inputs | shared), "claim"
            )
            name, images = trainer.config.dataset.name, len(trainer.sampler)
            print(f"{name}: {images} training images, {trainer.steps} steps")
            print(evaluator.describe())
            state = _trained(trainer, workdir, evaluator, selectors, stop, profile)
            _score_selected(trainer, workdir, evaluator, state, shared)
            others = _score_others(trainer, evaluator, state, shared)
        print(evaluator.report())
        if others:
            print(others)
        print(f"results, figure, checkpoints and TensorBoard events: {workdir}")


@contextlib.contextmanager
def _locked(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock in the first process; what that finds counts for all."""
    with contextlib.ExitStack() as held:
        cluster.by_first(lambda: held.enter_context(locked(path, busy)), "lock")
        yield


def _refuse_other_inputs(inputs: Mapping[str, str]) -> None:
    """Refuses to train where a process reads other data or weights than the first.

    Raises:
        InputError: naming them, in all processes.
    """
    theirs = [json.loads(x) for x in cluster.gather(json.dumps(inputs).encode(), "in")]
    for process, found in enumerate(theirs):
        if other := [name for name in theirs[0] if found.get(name) != theirs[0][name]]:
            raise InputError(
                f"process {process} reads other inputs than process 0 "
                f"({', '.join(other)} differ): give all processes the same files"
            )


def _trained_on(trainer: Trainer, what: str, evaluator: Evaluator) -> dict[str, str]:
    """Finds the scored images that are trained on, too; warn of them.

    Images of one list may serve both, as long as no episode of both shows one.
    """
    trained: Any = trainer.sampler
    scored: Any = evaluator.samplers[0]
    val = evaluator.val
    found = shared_photos(trainer.dataset, val, trained.images, scored.images)
    if not found:
        return {}
    text = f"{len(found)} of {len(scored)}, such as {' = '.join(found[0])}"
    warn(f"{what}: {text}")
    return {what: text}


def _trained(
    trainer: Trainer,
    workdir: Path,
    evaluator: Evaluator,
    selectors: Mapping[str, Evaluator],
    stop: StopSignal,
    profile: int,
) -> TrainState:
    """Takes the steps that are left and returns the last state, saved as all due ones."""
    with checkpoints.open_checkpoints(workdir, list(selectors)) as manager:
        loop = Loop(trainer, workdir, manager, selectors, stop, profile)
        while True:
            state = _started(trainer, manager, evaluator)
            try:
                return loop.run(state)
            except NotFinite as error:
                to, limit = manager.latest_step() or 0, trainer.config.retries_on_nan
                went_wrong = functools.partial(
                    retries.go_back, workdir, error, to, limit
                )
                cluster.by_first(went_wrong, "retry")


def _started(
    trainer: Trainer, manager: ocp.CheckpointManager, evaluator: Evaluator
) -> TrainState:
    """Returns the workdir's latest state, else that of step 0 after its references."""
    state = checkpoints.restore(manager, trainer.initial_state())
    if int(state.step) == 0 and trainer.config.eval.references:
        print(f"before training\n{evaluator.references()}")
    return trainer.placed(state)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The steps of one training, with what happens every so many of them.

    The `selectors` score checkpoints; without one the last is the run's result.
    """

    trainer: Trainer
    workdir: Path
    manager: ocp.CheckpointManager
    selectors: Mapping[str, Evaluator]
    stop: StopSignal
    profile: int = 0  # steps to be traced

    def run(self, state: TrainState) -> TrainState:
        """Takes all steps that are left and returns the last state."""
        trainer, start = self.trainer, int(state.step)
        traced = self.profile if cluster.is_first() else 0
        with (
            Progress(trainer, self.workdir, start) as progress,
            Profile(self.workdir, traced, start, trainer.steps) as profile,
            contextlib.closing(
                trainer.batches(start + retries.skipped(self.workdir, start))
            ) as batches,
        ):
            self._score_restored(state, progress)
            with self.stop.postponed():
                for step in range(start + 1, trainer.steps + 1):
                    with profile.step(step):
                        with progress.waiting():
                            batch = next(batches)
                        state, measured = trainer.step(state, batch)
                        progress.add(measured)
                    profile.finished(step, measured)
                    stops = trainer.stops(self.stop.asked)
                    self._after(step, state, progress, stops)
        return state

    def _after(
        self, step: int, state: TrainState, progress: Progress, stops: bool
    ) -> None:
        """Tells, select and saves where it is time to, or where a stop was asked for."""
        config = self.trainer.config
        due = self._is_due(step)
        saving = due or stops or step % config.save_every == 0
        if not saving and step % config.log_every:
            return
        progress.tell(step, saved=self.manager.latest_step())
        if saving:
            if not is_finite(state.learned):
                saved = self.manager.latest_step()
                raise NotFinite("a parameter isn't finite", step, saved)
            scores = self._score_unless_stopped(state, progress) if due else None
            checkpoints.save(self.manager, state, scores)
        progress.restart_clock()
        if saving and cluster.any_of(self.stop.asked, "stop"):
            self.stop.asked = True  # here too: it is acted on
            raise Interrupted(f"step {step} is saved: the same command goes on")

    def _is_due(self, step: int) -> bool:
        """Returns whether a step is saved and, for the selection, scored."""
        return step == self.trainer.steps or step % self.trainer.config.eval.every == 0

    def _score_unless_stopped(
        self, state: TrainState, progress: Progress
    ) -> dict[str, float] | None:
        """Returns mIoU for every selection; None after a stop.

        A stop doesn't wait for a score: the resumed run finds the step unscored.
        """
        scores = None
        with contextlib.suppress(Interrupted), self.stop.at_once():
            scores = self._score(state, progress)
        return None if cluster.any_of(scores is None, "unscored") else scores

    def _score_restored(self, state: TrainState, progress: Progress) -> None:
        """Scores the restored checkpoint if a stop left it unscored."""
        step = int(state.step)
        if step == 0 or not self._is_due(step) or not self.selectors:
            return
        if checkpoints.is_scored(self.manager, step):
            return
        checkpoints.add_scores(self.manager, step, self._score(state, progress))
        progress.restart_clock()

    def _score(self, state: TrainState, progress: Progress) -> dict[str, float]:
        scores = {
            name: selector.miou(state.learned)
            for name, selector in self.selectors.items()
        }
        mious = {f"{name}_miou": miou for name, miou in scores.items()}
        progress.scalars("eval", mious, int(state.step))
        return scores


def _score_selected(
    trainer: Trainer,
    workdir: Path,
    evaluator: Evaluator,
    state: TrainState,
    shared: dict[str, str],
) -> None:
    """Scores the selected checkpoint on the novel classes, unless it was before."""
    selection = trainer.experiment.selections[0]
    params, selected = checkpoints.restore_params(workdir, state.learned, selection)
    if evaluator.step() == selected:
        return

    def tell(results, figure):
        with Events(workdir) as events:
            events.add_scalar("eval/miou", results["miou"], selected)
            events.add_scalar("eval/fb_iou", results["fb_iou"], selected)
            events.add_image("episodes", figure, selected)

    facts = {"step": selected, "shared": shared, **retries.told(workdir)}
    evaluator(trainer.placed(params), tell, **facts)


def _score_others(
    trainer: Trainer, evaluator: Evaluator, state: TrainState, shared: dict[str, str]
) -> str:
    """Scores what the other selections take; return all as a table, if there are any.

    Each in a folder of its own, as `evaluate` writes it, unless its checkpoint is one
    that has been scored.
    """
    workdir, names = evaluator.folder, trainer.experiment.selections
    if len(names) == 1:
        return ""
    selected = evaluator.step()
    written, steps = {selected: workdir}, {names[0]: selected}
    for name in names[1:]:
        params, step = checkpoints.restore_params(workdir, state.learned, name)
        if step not in written:
            beside = evaluator.of_selection(name)
            if beside.step() != step:
                facts = {"step": step, "shared": shared, **retries.told(workdir)}
                beside(trainer.placed(params), **facts)
            written[step] = beside.folder
        steps[name] = step
    if not cluster.is_first():
        return ""
    found = {step: read_json(folder / RESULTS) for step, folder in written.items()}
    rows = [
        [name, str(step), *(f"{found[step][key]:.1f}" for key in ("miou", "fb_iou"))]
        for name, step in steps.items()
    ]
    titles = ("checkpoint by", "step", "mIoU", "FB-IoU")
    return markdown.table(titles, rows)

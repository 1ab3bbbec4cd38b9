"""The training of a run, from top to bottom: data, network, optimiser, restore, loop.

`train` is the page to read. What it builds comes from `runs/build.py` and
`runs/datasets.py`, the gradient from `step.py`, batches from `batches.py`.
"""

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from qpenet_jax.config import selections
from qpenet_jax.core import cluster, markdown
from qpenet_jax.core.files import local_path, locked, refuse_overwriting
from qpenet_jax.core.types import Array
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.evaluation.report import RESULTS
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.runs.build import (
    build_weights,
    complete,
)
from qpenet_jax.runs.checkpoints import Saved, open_checkpoints
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_train_sampler,
    files_read,
    selection_protocols,
    training_steps,
)
from qpenet_jax.runs.evaluator import Evaluator
from qpenet_jax.runs.folder import SELECTED_ON, SHARED, claim, inputs_of, read_json
from qpenet_jax.training import health
from qpenet_jax.training.batches import (
    any_asked,
    build_batches,
    idle_devices,
    on_devices,
    shardings,
)
from qpenet_jax.training.events import (
    fetched,
    open_events,
    speeds,
    write_results_events,
    write_scalars,
)
from qpenet_jax.training.profiling import Profile
from qpenet_jax.training.retries import (
    not_finite,
    note_retry,
    read_retries,
    skipped_batches,
)
from qpenet_jax.training.setup import (
    build_train_step,
    initial_state,
    refuse_other_inputs,
    trained_and_scored,
)
from qpenet_jax.training.step import TrainState
from qpenet_jax.training.stopping import StopSignal

LOCK_FILE = "lock"
"""Held by the one process that trains in a workdir."""


def train(config: Any, workdir: Path, profile: int = 0) -> None:
    """Trains and evaluates one run, or goes on with it if it was stopped.

    `profile` is the number of steps to be traced, for TensorBoard or xprof.

    Raises:
        InputError: bad input, another run in the workdir, or a loss that diverges.
        KeyboardInterrupt: by Ctrl-C or SIGTERM; the same call goes on.
    """
    workdir, config = local_path(workdir), complete(config)
    refuse_overwriting([workdir / LOCK_FILE], files_read(config))
    with StopSignal() as stop, contextlib.ExitStack() as stack:
        # Data: base classes to train on, the val split to score.
        train_set = build_dataset(config, "train")
        val_set = build_dataset(config, "val")
        sampler = build_train_sampler(config, train_set)
        steps = training_steps(config, len(sampler))

        # Network: frozen weights with a copy on every device.
        replicated, split = shardings(config.batch_size, config.accumulate)
        cluster.warn(idle_devices(config.batch_size, config.accumulate))
        weights = jax.device_put(build_weights(config), replicated)

        # Evaluation: of the result, and of checkpoints for each selection.
        def evaluator_of(protocol: Protocol | None = None) -> Evaluator:
            return Evaluator(
                config,
                weights,
                workdir,
                val_set,
                protocol,
                stop_asked=lambda: stop.asked,
            )

        evaluator = evaluator_of()
        protocols = selection_protocols(config, selections(config))
        selectors = {name: evaluator_of(p) for name, p in protocols.items()}

        # Workdir: one training at a time, of one config on the same inputs.
        busy = f"{workdir} is in use: another process trains there; wait for it, or "
        lock = locked(workdir / LOCK_FILE, f"{busy}choose another --workdir")
        cluster.by_first(lambda: stack.enter_context(lock))
        shared = {}
        for scorer in (evaluator, *selectors.values()):
            what = SHARED if scorer is evaluator else SELECTED_ON
            scored = scorer.samplers[0]
            shared |= trained_and_scored(what, train_set, sampler, val_set, scored)
        inputs = inputs_of(train_set, val_set, weights)
        refuse_other_inputs(inputs)
        cluster.by_first(lambda: claim(workdir, config, inputs | shared))
        print(f"{config.dataset.name}: {len(sampler)} training images, {steps} steps")
        print(evaluator.describe())

        # Optimiser, and the step that takes the gradient.
        train_step = build_train_step(config, steps, len(sampler))
        learning_rate = Optimizer(**config.optimizer).schedule(steps)
        key = jax.random.key(config.seed + 1)

        # Restore: the latest checkpoint, or step 0.
        checkpoints = stack.enter_context(open_checkpoints(workdir, selections(config)))

        def restored() -> TrainState:
            first = initial_state(config, weights, steps)
            first = jax.device_put(first, replicated)
            saved = checkpoints.restore(
                Saved(first.step, first.params, first.opt_state)
            )
            return TrainState(*jax.device_put(saved, replicated)) if saved else first

        state = restored()
        if int(state.step) == 0 and config.eval.references:
            print(f"before training\n{evaluator.references()}")

        def is_due(step: int) -> bool:
            return step == steps or step % config.eval.every == 0

        # Checkpoints that a stop left without a score.
        like = shapes_of(state.params)
        for step in filter(is_due, checkpoints.steps() if selectors else ()):
            if step not in checkpoints.scores:
                params = checkpoints.params(step, like)
                checkpoints.add_scores(step, mious(selectors, params))

        # The loop, which begins again after every retry.
        while (start := int(state.step)) < steps:
            skipped = skipped_batches(workdir, start)
            batches = build_batches(config, train_set, sampler, start + skipped)
            dead_heads, recent, asked = health.DeadHeads(), [], False
            waited, clock = 0.0, time.perf_counter()
            with (
                contextlib.closing(batches),
                open_events(workdir, start) as events,
                Profile(workdir, profile * cluster.is_first(), start, steps) as trace,
                tqdm(
                    desc="training",
                    unit="step",
                    total=steps,
                    initial=start,
                    disable=not cluster.is_first(),
                ) as bar,
            ):
                for step in range(start + 1, steps + 1):
                    # Batch.
                    before = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - before

                    # Update. It runs ahead of the device by one step, so that batches
                    # don't pile up in the device's memory.
                    with trace.step(step):
                        episodes = on_devices(config, batch, split)
                        state, metrics = train_step(state, weights, episodes, key)
                    jax.block_until_ready(recent[-1:])
                    trace.finished(step, metrics)
                    recent.append(metrics)
                    bar.update()

                    # Of several processes all learn a step later that any was asked to
                    # stop: none waits for the others.
                    if cluster.count() > 1:
                        stopping, asked = bool(asked), any_asked(stop.asked, split)
                    else:
                        stopping = stop.asked
                    saving = is_due(step) or stopping or step % config.save_every == 0
                    if not saving and step % config.log_every:
                        continue

                    # Log.
                    history = fetched(recent)
                    params = state.params if saving else {}
                    if problem := not_finite(history, step, params):
                        break
                    for warning in dead_heads(history):
                        bar.write(warning, file=sys.stderr)
                    bar.set_postfix(
                        {k: f"{history[-1][k]:.2f}" for k in ("loss", "iou")}
                    )
                    speed = speeds(config, len(history), clock, waited)
                    rate = {"learning_rate": float(np.asarray(learning_rate(step - 1)))}
                    write_scalars(events, "train", history[-1] | rate | speed, step)
                    recent = []

                    # Save, evaluate.
                    if saving:
                        checkpoints.save(
                            Saved(state.step, state.params, state.opt_state)
                        )
                    if is_due(step) and selectors and not stopping:
                        scores = mious(selectors, state.params)
                        checkpoints.add_scores(step, scores)
                        named = {f"{name}_miou": miou for name, miou in scores.items()}
                        write_scalars(events, "eval", named, step)
                    if stopping:
                        raise KeyboardInterrupt(
                            f"step {step} is saved: the same command goes on"
                        )
                    waited, clock = 0.0, time.perf_counter()
                else:
                    break
            # Retry, if the config allows it, from the latest checkpoint.
            note_retry(workdir, *problem, checkpoints.latest(), config.retries_on_nan)
            state = restored()

        # Final scores: of the result's checkpoint, and of other selections' beside it.
        folders: dict[int, Path] = {}
        chosen = {name: checkpoints.selected(name) for name in selections(config)}
        for name, step in chosen.items():
            if step in folders:
                continue
            scorer = evaluator.of_selection(name) if folders else evaluator
            folders[step] = scorer.folder
            if scorer.step() == step:
                continue  # it was scored before
            params = checkpoints.params(step, like)
            retries = {"retries": r} if (r := read_retries(workdir)) else {}
            facts = {"step": step, "shared": shared, **retries}
            results = scorer.score(params, **facts)
            if scorer is evaluator:
                write_results_events(workdir, results)
            scorer.write(results)

    print(evaluator.report())
    if len(chosen) > 1:
        print(selections_table(chosen, folders))
    print(f"results, figure, checkpoints and TensorBoard events: {workdir}")


def shapes_of(params: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns shapes, types and devices of parameters."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )


def mious(
    selectors: Mapping[str, Evaluator], params: PyTree[Array]
) -> dict[str, float]:
    """Returns the mIoU of parameters by the protocol of every selection."""
    return {name: selector.miou(params) for name, selector in selectors.items()}


def selections_table(chosen: Mapping[str, int], folders: Mapping[int, Path]) -> str:
    """Returns a table of the final scores by selection, in the first process."""
    if not cluster.is_first():
        return ""
    found = {step: read_json(folder / RESULTS) for step, folder in folders.items()}
    rows = [
        [name, str(step), *(f"{found[step][key]:.1f}" for key in ("miou", "fb_iou"))]
        for name, step in chosen.items()
    ]
    return markdown.table(("checkpoint by", "step", "mIoU", "FB-IoU"), rows)

"""The training of a run, from top to bottom: data, network, optimiser, restore, loop.

`train` is the page to read. What it builds comes from `runs/build.py` and
`runs/datasets.py`, batches from `batches.py`, the gradient from `train_step` in
`step.py`; `runs/checkpoints.py` says which checkpoint a selection takes (`_best`).
"""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from tqdm import tqdm

from qpenet_jax.backbones.precision import in_dtype
from qpenet_jax.config import selections
from qpenet_jax.core import cluster, markdown
from qpenet_jax.core.files import local_path, locked, refuse_overwriting
from qpenet_jax.core.types import Array, TrainState
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.evaluation.report import RESULTS
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.released.released_loss import released_loss
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.runs.build import (
    build_backbone,
    build_model,
    build_weights,
    complete,
    initial_params,
    is_released,
)
from qpenet_jax.runs.checkpoints import open_checkpoints
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_train_sampler,
    files_read,
    selection_protocols,
    training_steps,
)
from qpenet_jax.runs.evaluator import Evaluator
from qpenet_jax.runs.folder import (
    SELECTED_ON,
    SHARED,
    claim,
    inputs_of,
    read_json,
    trained_and_scored,
)
from qpenet_jax.training import health
from qpenet_jax.training.batches import (
    build_batches,
    idle_devices,
    on_devices,
    shardings,
)
from qpenet_jax.training.events import (
    Events,
    Profile,
    fetched,
    speeds,
    write_results_events,
)
from qpenet_jax.training.interruptions import (
    StopSignal,
    batches_left_out,
    divergence,
    not_finite,
    read_retries,
    with_retries,
)
from qpenet_jax.training.released_step import make_drifting_step, with_statistics
from qpenet_jax.training.step import make_train_step

LOCK_FILE = "lock"
"""Held by the one process that trains in a workdir."""


@with_retries
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

        # Evaluators: of the result, and of checkpoints by each selection that scores.
        def build_evaluator(protocol: Protocol | None = None) -> Evaluator:
            given = config, weights, workdir, val_set, protocol
            return Evaluator(*given, stop_asked=lambda: stop.asked)

        result = build_evaluator()
        protocols = selection_protocols(config, selections(config))
        selecting = {name: build_evaluator(p) for name, p in protocols.items()}

        # Workdir: one training at a time, of one config on the same inputs.
        busy = f"{workdir} is in use: another process trains there; wait for it, or "
        lock = locked(workdir / LOCK_FILE, f"{busy}choose another --workdir")
        cluster.by_first(lambda: stack.enter_context(lock))
        shared = {}
        for what, evaluator in {
            SHARED: result,
            **{f"{SELECTED_ON} ({name})": each for name, each in selecting.items()},
        }.items():
            scored = evaluator.samplers[0]
            shared |= trained_and_scored(what, train_set, sampler, val_set, scored)
        claim(workdir, config, inputs_of(train_set, val_set, weights) | shared)
        print(f"{config.dataset.name}: {len(sampler)} training images, {steps} steps")
        print(result.describe())

        # Optimiser, in the step that takes the gradient; its rate again for the log.
        train_step = build_train_step(config, steps, len(sampler))
        learning_rate = Optimizer(**config.optimizer).schedule(steps)
        key = jax.random.key(config.seed + 1)  # the seed's own makes the parameters

        # Restore: the latest checkpoint, or step 0.
        checkpoints = stack.enter_context(open_checkpoints(workdir, selections(config)))
        state = jax.device_put(build_state(config, weights, steps), replicated)
        state = jax.device_put(checkpoints.restore(state) or state, replicated)

        # Scores of the untrained network, and of checkpoints that a stop left without.
        if int(state.step) == 0 and config.eval.references:
            print(f"before training\n{result.references()}")

        def is_due(step: int) -> bool:
            return step == steps or step % config.eval.every == 0

        for step in filter(is_due, checkpoints.steps() if selecting else ()):
            if step not in checkpoints.scores:
                params = checkpoints.params(step, state.params)
                checkpoints.add_scores(step, mious(selecting, params))

        # The loop.
        if (start := int(state.step)) < steps:
            left_out = batches_left_out(workdir, start)
            batches = build_batches(config, train_set, sampler, start + left_out)
            dead_heads, recent = health.DeadHeads(), []
            waited, clock = 0.0, time.perf_counter()
            with (
                contextlib.closing(batches),
                Events(workdir, purge_step=start + 1) as events,
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

                    stopping = stop.in_any_process(split)
                    saving = is_due(step) or stopping or step % config.save_every == 0
                    if not saving and step % config.log_every:
                        continue

                    # Log. No parameter that isn't finite is ever saved.
                    history = fetched(recent)
                    params = state.params if saving else {}
                    if found := not_finite(history, step, params):
                        saved, limit = checkpoints.latest(), config.retries_on_nan
                        raise divergence(workdir, *found, saved, limit)
                    for warning in dead_heads(history):
                        bar.write(warning, file=sys.stderr)
                    bar.set_postfix(
                        {k: f"{history[-1][k]:.2f}" for k in ("loss", "iou")}
                    )
                    speed = speeds(config, len(history), clock, waited)
                    # Schedules count the steps that were taken before.
                    rate = {
                        "learning_rate": float(jnp.asarray(learning_rate(step - 1)))
                    }
                    events.add_scalars("train", history[-1] | rate | speed, step)
                    recent = []

                    # Save, evaluate.
                    if saving:
                        checkpoints.save(state)
                    if is_due(step) and selecting and not stopping:
                        scores = mious(selecting, state.params)
                        checkpoints.add_scores(step, scores)
                        named = {f"{name}_miou": miou for name, miou in scores.items()}
                        events.add_scalars("eval", named, step)
                    if stopping:
                        raise KeyboardInterrupt(
                            f"step {step} is saved: the same command goes on"
                        )
                    waited, clock = 0.0, time.perf_counter()

        # Final scores: of the result's checkpoint, and of other selections' beside it.
        folders: dict[int, Path] = {}
        chosen = {name: checkpoints.selected(name) for name in selections(config)}
        for name, step in chosen.items():
            if step in folders:
                continue
            evaluator = result.of_selection(name) if folders else result
            folders[step] = evaluator.folder
            if evaluator.step() == step:
                continue  # it was scored before
            params = checkpoints.params(step, state.params)
            retries = {"retries": r} if (r := read_retries(workdir)) else {}
            results = evaluator.score(params, step=step, shared=shared, **retries)
            if evaluator is result:
                write_results_events(workdir, results)
            evaluator.write(results)

    print(result.report())
    if len(chosen) > 1:
        print(selections_table(chosen, folders))
    print(f"results, figure, checkpoints and TensorBoard events: {workdir}")


def build_state(config: Any, weights: PyTree[Array], steps: int) -> TrainState:
    """Returns the state at step 0 of a training of so many steps."""
    params = initial_params(config)
    opt_state = Optimizer(**config.optimizer).build(steps).init(params)
    if config.backbone.drift:
        params = with_statistics(params, weights)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def build_train_step(config: Any, steps: int, images: int) -> Callable[..., Any]:
    """Returns the jitted train step, for a batch shared as `shardings` says.

    `images` are those that are trained on; with `config.backbone.drift` batch norm
    drifts by the length of an epoch.
    """
    model, net = in_dtype(build_model(config), build_backbone(config), config.dtype)
    optimizer = Optimizer(**config.optimizer).build(steps)
    _, split = shardings(config.batch_size, config.accumulate)
    loss = released_loss if is_released(config) else total_loss
    parts = model, net, optimizer, LossWeights(**config.loss), split.mesh, loss
    if config.backbone.drift:
        return make_drifting_step(*parts, max(images // config.batch_size, 1))
    return make_train_step(*parts, config.accumulate)


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

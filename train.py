"""Train QPENet: data, networks, restore, loop.

    python train.py --config configs/quickstart.py
    python train.py --config configs/pascal_fold0.py --check
    python train.py --config configs/pascal_fold0.py --config.optimizer.lr=0.001 \
        --workdir runs/my_run

`--check` trains for 200 steps, writes nothing and says whether a long run may start:
finite, all heads alive, loading keeps up, memory, hours to go. Run the same command
again to resume. The workdir holds config.json, checkpoints, TensorBoard events,
results.json, the scored episodes and a figure of some of them.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tensorboardX import SummaryWriter
from tqdm import tqdm

from qpenet_jax.core.errors import InputError, exit_on_input_error
from qpenet_jax.core.runtime import keep_compilations, keep_freed_memory
from qpenet_jax.data.episodes import training_batches
from qpenet_jax.runs import preflight
from qpenet_jax.runs.config_files import tell_config_errors
from qpenet_jax.runs.evaluator import Evaluator
from qpenet_jax.runs.experiment import Experiment
from qpenet_jax.runs.folder import claim, inputs_of
from qpenet_jax.training import checkpoints, health
from qpenet_jax.training.sharding import global_batch, shardings

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "default: runs/<name of the config>")
CHECK = flags.DEFINE_bool("check", False, "train for 200 steps and give a verdict")


def train(config: Any, workdir: Path) -> None:
    """Train and evaluate one experiment."""
    # Data.
    experiment = Experiment(config)
    config = experiment.config  # with the recipe's values
    dataset = experiment.dataset("train")
    sampler = experiment.train_sampler(dataset)
    steps = experiment.steps(len(sampler))

    # Networks.
    replicated, split = shardings(config.batch_size)
    weights = jax.device_put(experiment.backbone_weights(), replicated)
    tx = experiment.optimizer.build(steps)
    rate = experiment.optimizer.schedule(steps)
    train_step = experiment.train_step(tx)
    val = experiment.dataset("val")
    evaluator = Evaluator(experiment, weights, workdir, val)
    selection = experiment.selection_protocol()
    selector = selection and Evaluator(experiment, weights, workdir, val, selection)
    key = jax.random.key(config.seed + 1)

    claim(workdir, config, inputs_of(dataset, val, weights))
    print(f"{config.dataset.name}: {len(sampler)} training images, {steps} steps")
    print(evaluator.describe())
    with checkpoints.open_checkpoints(workdir) as manager, stop_signal() as stop:
        # Restore: the latest checkpoint of this workdir, else step 0.
        state = checkpoints.restore(manager, experiment.init(tx))
        state = jax.device_put(state, replicated)
        start = int(state.step)
        if start == 0 and config.eval.references:
            print(f"before training\n{evaluator.references()}")

        # Loop.
        batches = training_batches(
            experiment.loader(dataset),
            sampler,
            batch_size=config.batch_size,
            start_step=start,
            workers=config.workers,
            shard=(jax.process_index(), jax.process_count()),
        )
        watch, clock = health.Watch(), time.perf_counter()
        recent: list[Any] = []  # metrics of the steps since the last log
        with (
            contextlib.closing(batches),
            SummaryWriter(str(workdir), purge_step=start + 1) as writer,
            tqdm(total=steps, initial=start, desc="training", unit="step") as bar,
        ):
            for step in range(start + 1, steps + 1):
                batch = experiment.augmented(global_batch(next(batches), split))
                state, measured = train_step(state, weights, batch, key)
                recent.append(measured)
                bar.update()
                stopping = stop.is_set()
                last = step == steps
                due = last or step % config.eval.every == 0
                saving = due or stopping or step % config.save_every == 0
                if saving or step % config.log_every == 0:
                    # All at once: a step's values would make the device wait for us.
                    history = fetched(recent)
                    values = history[-1]
                    stop_on_nan(values, step, manager.latest_step())
                    for warning in watch(history):
                        bar.write(warning, file=sys.stderr)
                    values["learning_rate"] = float(np.asarray(rate(step - 1)))
                    images = len(recent) * config.batch_size * (config.shots + 1)
                    seconds = time.perf_counter() - clock
                    values["images_per_second"] = images / seconds
                    recent = []
                    shown = {name: f"{values[name]:.2f}" for name in ("loss", "iou")}
                    bar.set_postfix(shown)
                    for name, value in values.items():
                        writer.add_scalar(f"train/{name}", value, step)
                miou = None
                if selector and due:
                    miou = selector.miou(state.params)
                    writer.add_scalar(f"eval/{config.select_on}_miou", miou, step)
                if saving:
                    checkpoints.save(manager, state, miou)
                if not recent:
                    clock = time.perf_counter()  # evaluating and saving don't count
                if stopping and step < steps:
                    raise Interrupted(f"step {step} is saved: the same command goes on")

    # Result: the selected checkpoint on the novel classes.
    params, selected = checkpoints.restore_params(workdir, state.params)
    if evaluator.step() != selected:
        params = jax.device_put(params, replicated)
        results, figure = evaluator(params, step=selected)
        with SummaryWriter(str(workdir)) as writer:
            writer.add_scalar("eval/miou", results["miou"], selected)
            writer.add_scalar("eval/fb_iou", results["fb_iou"], selected)
            writer.add_image("episodes", figure, selected, dataformats="HWC")
    print(evaluator.report())
    print(f"results, figure, checkpoints and TensorBoard events: {workdir}")


class Interrupted(Exception):
    """Training was stopped by Ctrl-C or SIGTERM after a save."""


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C or SIGTERM sets, so that a step is never cut in two.

    A second Ctrl-C stops at once.
    """
    stop = threading.Event()

    def on_signal(number, frame):
        print("\nstopping after this step; again to stop at once", file=sys.stderr)
        stop.set()
        signal.signal(number, signal.default_int_handler)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fetched(recent: Any) -> list[dict[str, float]]:
    """Return the metrics of some steps as numbers, fetched from the device at once."""
    steps: Any = jax.device_get(recent)
    return [{name: float(value) for name, value in m.items()} for m in steps]


def stop_on_nan(values: dict[str, float], step: int, saved: int | None) -> None:
    """Raise InputError if the loss or the gradient is not finite any more."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            kept = "none is saved yet" if saved is None else f"step {saved} is kept"
            raise InputError(
                f"{name} is {values[name]} at step {step}; last good checkpoint: {kept}"
                "; start again in a new --workdir with --config.recipe=stable or a "
                "lower config.optimizer.lr"
            )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse the flags; raises InputError for a missing file or an unknown override."""
    with tell_config_errors():
        rest = flags.FLAGS(argv)
        if not flags.FLAGS["config"].present:
            raise InputError("--config is missing: give configs/quickstart.py")
        file = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(file).is_file():
        raise InputError(f"{file}: no such config file; configs/ holds ours")
    if len(rest) > 1:
        raise InputError(f"unknown argument {rest[1]!r}: overrides are --config.x=y")
    return rest


def main(argv: Sequence[str]) -> None:
    """Run training with the parsed flags."""
    del argv
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of a save
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    keep_freed_memory()
    if CONFIG.value.keep_compilations:
        keep_compilations()
    if CHECK.value:
        sys.exit(0 if preflight.check(Experiment(CONFIG.value)) else 1)
    train(CONFIG.value, Path(WORKDIR.value or f"runs/{name}"))


if __name__ == "__main__":
    try:
        with exit_on_input_error():
            app.run(main, flags_parser=parse_flags)
    except Interrupted as interruption:
        print(f"\n{interruption}", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", file=sys.stderr)
        sys.exit(130)

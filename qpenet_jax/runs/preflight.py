"""The first steps of a training, timed, and a verdict before a day of it is spent."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from qpenet_jax.core import cluster
from qpenet_jax.core.cluster import warn
from qpenet_jax.core.runtime import peak_memory
from qpenet_jax.runs.experiment import Experiment
from qpenet_jax.runs.progress import fetched
from qpenet_jax.runs.trainer import Trainer
from qpenet_jax.training import health
from qpenet_jax.training.step import TrainState

STEPS = 200

WARM_UP = 20
"""Steps at the start whose times don't count: compiling, filling the buffers."""

JUDGED = 50
"""The heads are judged by the last of the steps."""

GRADIENT = 100.0
"""A larger norm of the gradient is a warning: healthy runs stay far below."""

WAITING = 0.1
"""Loading keeps up if the device waits for less than this share of the time."""

GIB = 2**30


class Step(NamedTuple):
    """A step of training: what it measured, seconds of waiting for data and in all."""

    state: TrainState
    metrics: dict[str, float]
    waited: float
    took: float


def first_steps(trainer: Trainer) -> Generator[Step]:
    """Yields the steps of a new training without end, each finished before the next.

    Nothing is written. Close the generator to end the processes that load.
    """
    state = trainer.initial_state()
    with contextlib.closing(trainer.batches()) as batches:
        while True:
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - start
            state, measured = trainer.step(state, batch)
            (metrics,) = fetched([measured])
            yield Step(state, metrics, waited, time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the verdict."""

    name: str
    good: bool
    text: str

    def __str__(self) -> str:
        """Returns the line as it is printed."""
        return f"  {'ok ' if self.good else 'BAD'}  {self.name:<9} {self.text}"


def findings(
    steps: Sequence[Step], total: int, memory: Sequence[tuple[str, int, int]]
) -> list[Finding]:
    """Judges the first steps of a run of `total` steps.

    `memory` holds (name, peak, limit) in bytes.
    """
    metrics = [step.metrics for step in steps]
    timed = steps[WARM_UP:] if len(steps) > WARM_UP else steps
    return [
        _finite(metrics),
        _heads(metrics[-JUDGED:]),
        _loading(timed),
        *(_memory(*used) for used in memory),
        _to_go(timed, total),
    ]


def _finite(metrics: Sequence[health.Values]) -> Finding:
    bad = [i for i, values in enumerate(metrics, 1) if not is_finite(values)]
    if bad:
        return Finding(
            "finite", False, f"loss or gradient isn't, from step {bad[0]} on"
        )
    losses = [values["loss"] for values in metrics]
    norms = [values["grad_norm"] for values in metrics]
    first, last = (float(np.mean(part)) for part in (losses[:10], losses[-10:]))
    text = (
        f"loss {first:.2f} -> {last:.2f}, norm of the gradient at most {max(norms):.1f}"
    )
    if max(norms) > GRADIENT:
        return Finding("finite", False, f"{text}, more than {GRADIENT:.0f}: unstable")
    return Finding("finite", True, text)


def is_finite(values: health.Values) -> bool:
    """Returns whether the loss and the gradient of a step are finite."""
    return math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])


def _heads(metrics: Sequence[health.Values]) -> Finding:
    dead = health.dead_heads(metrics)
    if dead:
        text = ", ".join(f"{y} {why}" for y, why in dead.items())
        return Finding("heads", False, f"in the last {len(metrics)} steps {text}")

    def mean(name):
        return float(np.mean([values[name] for values in metrics]))

    alive = [
        f"{y} {mean(health.LOSSES[head]):.2f} ({mean(f'empty_{head}'):.0%} empty)"
        for head, y in health.HEADS.items()
        if f"empty_{head}" in metrics[0]
    ]
    return Finding("heads", True, f"loss and empty masks: {', '.join(alive)}")


def _loading(timed: Sequence[Step]) -> Finding:
    share = sum(step.waited for step in timed) / sum(step.took for step in timed)
    text = f"{share:.0%} of the time is spent on waiting for images"
    if share > WAITING:
        return Finding("loading", False, f"{text}: raise config.workers")
    return Finding("loading", True, text)


def _memory(name: str, peak: int, limit: int) -> Finding:
    text = f"{name}: peak {peak / GIB:.1f} of {limit / GIB:.1f} GiB"
    if peak > 0.95 * limit:
        remedy = "raise config.accumulate, or lower config.batch_size"
        return Finding("memory", False, f"{text}: {remedy}")
    return Finding("memory", True, text)


def _to_go(timed: Sequence[Step], total: int) -> Finding:
    seconds = float(np.median([step.took for step in timed]))
    length = f"{total:,} steps of {seconds:.2f} s = {total * seconds / 3600:,.1f} hours"
    return Finding("to go", True, f"{length}, evaluations not counted")


def memory() -> list[tuple[str, int, int]]:
    """Returns the peak and the limit of each device's memory, or of the host's."""
    told = [(str(d), d.memory_stats() or {}) for d in jax.local_devices()]
    devices = [
        (name, stats["peak_bytes_in_use"], stats["bytes_limit"])
        for name, stats in told
        if {"peak_bytes_in_use", "bytes_limit"} <= stats.keys()
    ]
    lines = Path("/proc/meminfo")
    if devices or not lines.exists():
        return devices
    total = int(lines.read_text().split()[1]) * 1024
    return [("this process", peak_memory(), total)]


def check(experiment: Experiment, steps: int = STEPS) -> bool:
    """Trains for some steps, prints what was found, returns whether a run may start.

    Nothing is written. Raises InputError where data or weights are missing.
    """
    trainer = Trainer(experiment)
    warn(trainer.warning)
    total = trainer.steps
    steps = min(steps, total)
    recipe = experiment.config.recipe
    print(
        f"check: the first {steps} of {total:,} steps, recipe {recipe}, computed in "
        f"{experiment.dtype}"
    )
    taken: list[Step] = []
    with (
        contextlib.closing(first_steps(trainer)) as stream,
        tqdm(
            total=steps, desc="checking", unit="step", disable=not cluster.is_first()
        ) as bar,
    ):
        for step in stream:
            taken.append(step)
            bar.update()
            if len(taken) == steps or not is_finite(step.metrics):
                break
    found = findings(taken, total, memory())
    print("\n".join(map(str, found)))
    bad = [finding.name for finding in found if not finding.good]
    print(f"verdict: {'do not start: ' + ', '.join(bad) if bad else 'go ahead'}")
    return cluster.by_first(lambda: not bad, "verdict")

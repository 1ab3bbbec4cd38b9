"""The first steps of a training, timed, and a verdict before a day of it is spent."""

import contextlib
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from qpenet_jax.backbones.precision import resolve_dtype
from qpenet_jax.core import cluster
from qpenet_jax.core.runtime import peak_memory
from qpenet_jax.runs.build import build_weights, complete
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_train_sampler,
    training_steps,
)
from qpenet_jax.training import health
from qpenet_jax.training.batches import (
    build_batches,
    idle_devices,
    on_devices,
    shardings,
)
from qpenet_jax.training.events import fetched
from qpenet_jax.training.interruptions import not_finite
from qpenet_jax.training.step import TrainState
from qpenet_jax.training.train import build_state, build_train_step

STEPS = 200

WARM_UP = 20
"""Steps at the start whose times don't count: they compile and fill the prefetch."""

JUDGED = 50
"""Number of the last steps by which the heads are judged."""

GRADIENT = 100.0
"""Largest norm of the gradient that is good; it is far smaller in a good training."""

WAITING = 0.1
"""Largest share of the time that the device may wait for data."""

GIB = 2**30


class Step(NamedTuple):
    """A step of training: what it measured, seconds of waiting for data and in all.

    `total` is the length of the training in steps.
    """

    state: TrainState
    total: int
    metrics: dict[str, float]
    waited: float
    took: float


def first_steps(config: Any) -> Generator[Step]:
    """Yields the steps of a new training without end, each finished before the next.

    The config is complete. Nothing is written. Close the generator to end the processes
    that load.
    """
    dataset = build_dataset(config, "train")
    sampler = build_train_sampler(config, dataset)
    total = training_steps(config, len(sampler))
    replicated, split = shardings(config.batch_size, config.accumulate)
    weights = jax.device_put(build_weights(config), replicated)
    train_step = build_train_step(config, total, len(sampler))
    state = jax.device_put(build_state(config, weights, total), replicated)
    key = jax.random.key(config.seed + 1)
    with contextlib.closing(build_batches(config, dataset, sampler)) as batches:
        while True:
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - start
            episodes = on_devices(config, batch, split)
            state, measured = train_step(state, weights, episodes, key)
            (metrics,) = fetched([measured])
            yield Step(state, total, metrics, waited, time.perf_counter() - start)


class Finding(NamedTuple):
    """One line of the verdict."""

    name: str
    good: bool
    text: str


def findings(
    steps: Sequence[Step], total: int, memory: Sequence[tuple[str, int, int]]
) -> list[Finding]:
    """Judges the first steps of a run of `total` steps.

    `memory` holds (name, peak, limit) in bytes.
    """
    metrics = [step.metrics for step in steps]
    timed = steps[WARM_UP:] if len(steps) > WARM_UP else steps
    seconds = float(np.median([step.took for step in timed]))
    share = sum(step.waited for step in timed) / sum(step.took for step in timed)
    found = [
        _finite(metrics),
        _heads(metrics[-JUDGED:]),
        _judged(
            "loading",
            share <= WAITING,
            f"{share:.0%} of the time is spent on waiting for images",
            "raise config.workers",
        ),
    ]
    for name, peak, limit in memory:
        text = f"{name}: peak {peak / GIB:.1f} of {limit / GIB:.1f} GiB"
        remedy = "raise config.accumulate, or lower config.batch_size"
        found.append(_judged("memory", peak <= 0.95 * limit, text, remedy))
    text = (
        f"{total:,} steps of {seconds:.2f} s = {total * seconds / 3600:,.1f} hours, "
        "evaluations not counted"
    )
    return [*found, Finding("to go", True, text)]


def _judged(name: str, good: bool, text: str, remedy: str) -> Finding:
    return Finding(name, good, text if good else f"{text}: {remedy}")


def _finite(metrics: Sequence[health.Values]) -> Finding:
    if problem := not_finite(metrics, len(metrics), {}):
        what, step = problem
        return Finding("finite", False, f"{what} from step {step} on")
    losses = [values["loss"] for values in metrics]
    norm = max(values["grad_norm"] for values in metrics)
    first, last = (float(np.mean(part)) for part in (losses[:10], losses[-10:]))
    text = f"loss {first:.2f} -> {last:.2f}, norm of the gradient at most {norm:.1f}"
    remedy = f"more than {GRADIENT:.0f} is unstable"
    return _judged("finite", norm <= GRADIENT, text, remedy)


def _heads(metrics: Sequence[health.Values]) -> Finding:
    if dead := health.dead_heads(metrics):
        text = ", ".join(f"{y} {why}" for y, why in dead.items())
        return Finding("heads", False, f"in the last {len(metrics)} steps {text}")
    means = {name: np.mean([values[name] for values in metrics]) for name in metrics[0]}
    alive = [
        f"{y} {means[health.LOSSES[head]]:.2f} ({means[f'empty_{head}']:.0%} empty)"
        for head, y in health.HEADS.items()
        if f"empty_{head}" in means
    ]
    return Finding("heads", True, f"loss and empty masks: {', '.join(alive)}")


def memory() -> list[tuple[str, int, int]]:
    """Returns the peak and the limit of each device's memory, or of the host's."""
    found = [(str(d), d.memory_stats() or {}) for d in jax.local_devices()]
    devices = [
        (name, stats["peak_bytes_in_use"], stats["bytes_limit"])
        for name, stats in found
        if {"peak_bytes_in_use", "bytes_limit"} <= stats.keys()
    ]
    lines = Path("/proc/meminfo")
    if devices or not lines.exists():
        return devices
    total = int(lines.read_text().split()[1]) * 1024
    return [("this process", peak_memory(), total)]


def check(config: Any, steps: int = STEPS) -> bool:
    """Trains for some steps, prints what was found, returns whether a run may start.

    Nothing is written. Raises InputError where data or weights are missing.
    """
    config = complete(config)
    cluster.warn(idle_devices(config.batch_size, config.accumulate))
    taken: list[Step] = []
    with (
        contextlib.closing(first_steps(config)) as stream,
        tqdm(desc="checking", unit="step", disable=not cluster.is_first()) as bar,
    ):
        for step in stream:
            if not taken:
                total, steps = step.total, min(steps, step.total)
                bar.reset(steps)
                bar.write(
                    f"check: the first {steps} of {total:,} steps, recipe "
                    f"{config.recipe}, computed in {resolve_dtype(config.dtype)}"
                )
            taken.append(step)
            bar.update()
            if len(taken) == steps or not_finite([step.metrics], 1, {}):
                break
    found = findings(taken, taken[0].total, memory())
    for name, good, text in found:
        print(f"  {'ok ' if good else 'BAD'}  {name:<9} {text}")
    bad = [finding.name for finding in found if not finding.good]
    print(f"verdict: {'do not start: ' + ', '.join(bad) if bad else 'go ahead'}")
    return cluster.by_first(lambda: not bad)

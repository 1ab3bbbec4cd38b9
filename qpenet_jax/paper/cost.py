"""What a table would take: the dry run of `qpenet reproduce`."""

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from qpenet_jax.config import selections
from qpenet_jax.core import markdown
from qpenet_jax.evaluation.protocols import of_dataset
from qpenet_jax.evaluation.scoring import score_episodes
from qpenet_jax.paper.plan import PlannedRun
from qpenet_jax.runs.build import build_predictor, build_weights
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_eval_samplers,
    build_protocol,
    selection_protocols,
)
from qpenet_jax.runs.folder import CONFIG_FILE
from qpenet_jax.training.preflight import first_steps

MEASURED_STEPS, MEASURED_EPISODES = 20, 10


class Cost(NamedTuple):
    """Seconds of a training step, and of a scored episode by its number of shots."""

    step: float
    episode: Mapping[int, float]


def measured_cost(run: PlannedRun) -> Cost:
    """Measures some steps and episodes of a run, once they are compiled."""
    config = run.config
    with contextlib.closing(first_steps(config)) as stream:
        steps = list(itertools.islice(stream, 1 + MEASURED_STEPS))
    per_step = statistics.mean(step.took for step in steps[1:])  # the first compiles
    predict = build_predictor(config, steps[-1].state.params, build_weights(config))
    val = build_dataset(config, "val")

    def per_episode(shots):
        protocol = of_dataset(build_protocol(config, shots=shots), val)
        samplers = build_eval_samplers(config, val, protocol)[:1]
        start = 0.0
        for count in (1, MEASURED_EPISODES):  # the first compiles
            start = time.perf_counter()
            few = dataclasses.replace(protocol, episodes=count)
            score_episodes(predict, val, few, samplers, label=f"{shots} shot(s)")
        return (time.perf_counter() - start) / MEASURED_EPISODES

    return Cost(per_step, {shots: per_episode(shots) for shots in run.shots})


def print_plan(
    runs: Sequence[PlannedRun],
    measure: Callable[[PlannedRun], Cost] = measured_cost,
) -> None:
    """Prints every run with its state, and the time of all by the `measure` of one.

    One of each backbone is measured, its last, which of the ablations is `full`.
    """
    counts = [(run.steps, _episodes(run)) for run in runs]
    rows = [
        [run.name, f"{steps:,}", f"{sum(episodes.values()):,}", _state(run)]
        for run, (steps, episodes) in zip(runs, counts, strict=True)
    ]
    header = ("run", "steps", "episodes scored", "state")
    print(markdown.table(header, rows), flush=True)
    last = {run.config.backbone.name: run for run in runs}
    costs = {backbone: measure(run) for backbone, run in last.items()}
    for backbone, (step, episode) in costs.items():
        each = (f"{s:.2f} s an episode of {k} shot(s)" for k, s in episode.items())
        print(f"{last[backbone].name}: {step:.2f} s a step, {', '.join(each)}")
    seconds = []
    for run, (steps, episodes) in zip(runs, counts, strict=True):
        step, episode = costs[run.config.backbone.name]
        scoring = sum(episode[k] * count for k, count in episodes.items())
        seconds += [] if run.is_done else [steps * step + scoring]
    print(
        f"(measured on {MEASURED_STEPS} steps and {MEASURED_EPISODES} episodes)\n"
        f"{len(runs)} runs, {len(seconds)} to do: about {sum(seconds) / 3600:.1f} h, "
        "without start-up and compilation; nothing was written"
    )


def _state(run: PlannedRun) -> str:
    if run.is_done:
        return "done"
    if not (run.folder / CONFIG_FILE).exists():
        return "to do"
    return "begun" if run.has_same_config() else "folder holds another config"


def _episodes(run: PlannedRun) -> dict[int, int]:
    """Returns how many episodes a run scores by shots, selection included."""
    config, (first, *_) = run.config, run.shots
    names, protocol = selections(config), build_protocol(config)
    own = protocol.episodes * len(protocol.seeds)
    counts = dict.fromkeys(run.shots, own)
    # Once for each selection, and without training by two references.
    counts[first] *= len(names) + (2 if config.eval.references else 0)
    times = math.ceil(run.steps / config.eval.every)
    for of in selection_protocols(config, names).values():
        counts[first] += times * of.episodes * len(of.seeds)
    return counts

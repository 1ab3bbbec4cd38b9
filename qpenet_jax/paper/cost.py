"""What a table would take: the dry run of `qpenet reproduce`."""

import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from qpenet_jax.config import selections
from qpenet_jax.core import markdown
from qpenet_jax.evaluation.protocols import of_dataset
from qpenet_jax.evaluation.scoring import score_episodes
from qpenet_jax.paper.measures import has_config_of, is_done
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

    def seconds(self, steps: int, episodes: Mapping[int, int]) -> float:
        """Returns what a run takes, its episodes counted by shots."""
        scoring = (self.episode[k] * count for k, count in episodes.items())
        return steps * self.step + sum(scoring)


def measured_cost(run: PlannedRun) -> Cost:
    """Measures some steps and episodes of a run, once they are compiled."""
    step, params = _seconds_per_step(run.config)
    predict = build_predictor(run.config, params, build_weights(run.config))
    score = functools.partial(_seconds_per_episode, run.config, predict)
    return Cost(step, {shots: score(shots) for shots in run.shots})


def _seconds_per_step(config: Any) -> tuple[float, PyTree[Array]]:
    """Returns the mean, and the parameters after the measured steps."""
    with contextlib.closing(first_steps(config)) as stream:
        steps = list(itertools.islice(stream, 1 + MEASURED_STEPS))
    seconds = statistics.mean(step.took for step in steps[1:])  # the first compiles
    return seconds, steps[-1].state.params


def _seconds_per_episode(config: Any, predict: Any, shots: int) -> float:
    val = build_dataset(config, "val")
    protocol = of_dataset(build_protocol(config, shots=shots), val)
    samplers = build_eval_samplers(config, val, protocol)[:1]
    start = 0.0
    for count in (1, MEASURED_EPISODES):  # the first compiles
        start = time.perf_counter()
        few = dataclasses.replace(protocol, episodes=count)
        label = f"measuring {shots} shot(s)"
        score_episodes(predict, val, few, samplers, label=label)
    return (time.perf_counter() - start) / MEASURED_EPISODES


def print_plan(
    runs: Sequence[PlannedRun],
    measure: Callable[[PlannedRun], Cost] = measured_cost,
) -> None:
    """Prints every run with its state, and the time of all by the `measure` of one."""
    steps = [run.steps for run in runs]
    episodes = [_episodes(*pair) for pair in zip(runs, steps, strict=True)]
    states = [_state(run) for run in runs]
    plan = list(zip(runs, steps, episodes, states, strict=True))
    rows = [[r.name, f"{n:,}", f"{sum(e.values()):,}", s] for r, n, e, s in plan]
    header = ("run", "steps", "episodes scored", "state")
    print(markdown.table(header, rows), flush=True)
    # Measured once per backbone: on its last row, which of the ablations is `full`.
    last = {run.config.backbone.name: run for run in runs}
    costs = {backbone: measure(run) for backbone, run in last.items()}
    for backbone, cost in costs.items():
        scoring = [
            f"{s:.2f} s an episode of {k} shot(s)" for k, s in cost.episode.items()
        ]
        print(f"{last[backbone].name}: {cost.step:.2f} s a step, {', '.join(scoring)}")
    seconds = [
        costs[run.config.backbone.name].seconds(steps, episodes)
        for run, steps, episodes, state in plan
        if state != "done"
    ]
    print(
        f"(measured on {MEASURED_STEPS} steps and {MEASURED_EPISODES} episodes)\n"
        f"{len(runs)} runs, {len(seconds)} to do: about {sum(seconds) / 3600:.1f} h, "
        "without start-up and compilation; nothing was written"
    )


def _state(run: PlannedRun) -> str:
    if is_done(run):
        return "done"
    if not (run.folder / CONFIG_FILE).exists():
        return "to do"
    return "begun" if has_config_of(run) else "folder holds another config"


def _episodes(run: PlannedRun, steps: int) -> dict[int, int]:
    """Returns how many episodes a run scores by shots, selection included."""
    config = run.config
    names, protocol = selections(config), build_protocol(config)
    counts = dict.fromkeys(run.shots, protocol.episodes * len(protocol.seeds))
    if config.eval.references:
        counts[run.shots[0]] *= 3  # untrained and cosine as well
    times = math.ceil(steps / config.eval.every)
    for of in selection_protocols(config, names).values():
        counts[run.shots[0]] += times * of.episodes * len(of.seeds)
    others = len(names) - 1
    counts[run.shots[0]] += others * protocol.episodes * len(protocol.seeds)
    return counts

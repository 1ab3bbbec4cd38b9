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


@dataclasses.dataclass(frozen=True)
class PlannedWork:
    """How much a run computes: training steps, and scored episodes by shots."""

    run: PlannedRun
    steps: int
    episodes: Mapping[int, int]
    state: str

    @property
    def backbone(self) -> str:
        """Runs of one backbone cost about the same."""
        return self.run.config.backbone.name

    def seconds(self, cost: Cost) -> float:
        """Returns what is left to compute, 0 for a finished run."""
        if self.state == "done":
            return 0.0
        scoring = sum(cost.episode[k] * count for k, count in self.episodes.items())
        return self.steps * cost.step + scoring


def print_plan(
    runs: Sequence[PlannedRun], measure: Callable[[PlannedRun], Cost] | None = None
) -> None:
    """Prints every run with its state, and the measured time of all.

    `measure` returns the cost of a run, by default `measured_cost`.
    """
    measure = measure or measured_cost
    plan = [_work(run) for run in runs]
    print(_plan_table(plan), flush=True)
    # Measured once per backbone: on its last row, which of the ablations is `full`.
    last = {work.backbone: work.run for work in plan}
    costs = {backbone: measure(run) for backbone, run in last.items()}
    for backbone, cost in costs.items():
        scoring = [
            f"{s:.2f} s an episode of {k} shot(s)" for k, s in cost.episode.items()
        ]
        print(f"{last[backbone].name}: {cost.step:.2f} s a step, {', '.join(scoring)}")
    hours = sum(work.seconds(costs[work.backbone]) for work in plan) / 3600
    left = sum(work.state != "done" for work in plan)
    print(
        f"(measured on {MEASURED_STEPS} steps and {MEASURED_EPISODES} episodes)\n"
        f"{len(runs)} runs, {left} to do: about {hours:.1f} h, without start-up and "
        "compilation; nothing was written"
    )


def _plan_table(plan: Sequence[PlannedWork]) -> str:
    rows = [
        [w.run.name, f"{w.steps:,}", f"{sum(w.episodes.values()):,}", w.state]
        for w in plan
    ]
    return markdown.table(("run", "steps", "episodes scored", "state"), rows)


def _work(run: PlannedRun) -> PlannedWork:
    steps = run.steps
    return PlannedWork(run, steps, _episodes(run, steps), _state(run))


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

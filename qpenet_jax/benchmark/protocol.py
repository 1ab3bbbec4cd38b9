"""What an episode of an evaluation costs, beside a step that keeps nothing."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from qpenet_jax.backbones.registry import Backbone, backbone
from qpenet_jax.benchmark import ours
from qpenet_jax.benchmark.measure import Case
from qpenet_jax.benchmark.photos import made_up_photos
from qpenet_jax.data.episodes import EpisodeSampler, load_episode
from qpenet_jax.evaluation.predictor import qpenet_predictor
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.evaluation.scoring import Samplers, score_episodes
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.runs.experiment import Experiment

EPISODES = 100
"""Of an evaluation on made-up photos: each of the 64 comes several times."""

STEPS = 10
"""Episodes whose steps are timed before the evaluation, and again after it: what one
costs depends on how much of its supports is foreground."""


class Evaluation(NamedTuple):
    """A network, in words too, with all that an evaluation of it needs."""

    network: str
    model: QPENet
    backbone: Backbone
    params: PyTree[Array]
    weights: PyTree[Array]
    dataset: Any
    protocol: Protocol
    samplers: Samplers
    workers: int


def protocol_run(
    given: Case, shots: int, experiment: Experiment | None, episodes: int | None
) -> dict[str, Any]:
    """Time an evaluation and, before and after it, uncached steps of some episodes.

    It is the experiment's protocol with these shots, and with `episodes` a seed if they
    are given; without an experiment made-up photos, and the network, of `given`.
    Raises InputError as the experiment does.
    """
    with contextlib.ExitStack() as stack:
        if experiment:
            made = _of_experiment(experiment, shots, episodes)
        else:
            made = stack.enter_context(_made_up(given, shots, episodes or EPISODES))
        _run(made, dataclasses.replace(made.protocol, episodes=1))  # compiles
        time_steps = _steps(made)
        steps = time_steps()
        seconds = _run(made, made.protocol)
        steps += time_steps()
    each = seconds / (made.protocol.episodes * len(made.samplers))
    step = float(np.mean(steps))
    return {
        "network": made.network,
        "shots": shots,
        "episodes": made.protocol.episodes,
        "seeds": len(made.samplers),
        "protocol": str(made.protocol),
        "seconds_per_episode": each,
        "step_seconds": step,
        "ratio": each / step,
    }


def _of_experiment(
    experiment: Experiment, shots: int, episodes: int | None
) -> Evaluation:
    changes: dict[str, Any] = {"shots": shots} | (
        {"episodes": episodes} if episodes else {}
    )
    protocol = experiment.protocol(**changes)
    dataset = experiment.dataset("val")
    net = experiment.config.backbone
    return Evaluation(
        f"{net.name}, weights {net.weights or 'of its package'}",
        experiment.model,
        experiment.backbone,
        experiment.untrained(),
        experiment.backbone_weights(),
        dataset,
        protocol,
        experiment.eval_samplers(dataset, protocol),
        experiment.config.workers,
    )


@contextlib.contextmanager
def _made_up(given: Case, shots: int, episodes: int) -> Iterator[Evaluation]:
    weights = ours.draw_weights(given)
    with tempfile.TemporaryDirectory() as folder:
        dataset: Any = made_up_photos(Path(folder))
        classes = tuple(range(1, len(dataset.classes) + 1))
        protocol = Protocol(
            dataset="made-up photos",
            split="blocks",
            fold=0,
            classes=dataset.classes,
            shots=shots,
            episodes=episodes,
            side=given.size,
        )
        yield Evaluation(
            f"{given.backbone}, weights {given.weights or 'drawn'}",
            QPENet(**given.network),
            backbone(given.backbone),
            weights.params,
            weights.backbone,
            dataset,
            protocol,
            [EpisodeSampler(dataset.counts, classes, shots, given.seed, on_few="drop")],
            workers=0,
        )


def _run(made: Evaluation, protocol: Protocol) -> float:
    """Return the seconds of an evaluation as the library does it."""
    predict = qpenet_predictor(made.model, made.backbone, made.params, made.weights)
    start = time.perf_counter()
    score_episodes(predict, made.dataset, protocol, made.samplers, workers=made.workers)
    return time.perf_counter() - start


def _steps(made: Evaluation) -> Callable[[], list[float]]:
    """Return what does eval steps from the images and tells the seconds of each."""
    side, resize = made.protocol.side, made.protocol.resize

    def batch_of(index):
        ids = made.samplers[0](index)
        loaded = load_episode(made.dataset, ids, side, resize=resize)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], loaded)

    batches = [batch_of(i) for i in range(min(STEPS, made.protocol.episodes))]
    step = ours.eval_step(made.model, made.backbone)

    def seconds(batch):
        start = time.perf_counter()
        jax.block_until_ready(step(made.params, made.weights, batch))
        return time.perf_counter() - start

    seconds(batches[0])  # compiles
    return lambda: [seconds(batch) for batch in batches]

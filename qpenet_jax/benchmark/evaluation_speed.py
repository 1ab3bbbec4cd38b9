"""What an episode of an evaluation costs, beside a prediction that keeps nothing.

An evaluation keeps what it has computed from an image alone, and so encodes an image
once for all its episodes. The prediction beside it encodes all images of its episode.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qpenet_jax.backbones.precision import meant
from qpenet_jax.backbones.registry import backbone
from qpenet_jax.benchmark import jax_side as ours
from qpenet_jax.benchmark.made_up import made_up_photos
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.data.loader import load_episode
from qpenet_jax.evaluation.predictor import Predictor, qpenet_predictor
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.evaluation.scoring import Samplers, score_episodes
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.runs.build import build_predictor, build_weights, initial_params
from qpenet_jax.runs.datasets import build_dataset, build_eval_samplers, build_protocol

EPISODES = 100
"""Of an evaluation on made-up photos: each of the 64 comes several times."""

STEPS = 10
"""Episodes whose predictions are timed before the evaluation, and again after it: what
one costs depends on how much of its supports is foreground."""


class Workload(NamedTuple):
    """An evaluation to be timed; `network` and `dtype` are its network in words."""

    network: str
    dtype: str
    predictor: Predictor
    dataset: Any
    protocol: Protocol
    samplers: Samplers
    workers: int


def protocol_runs(settings: Settings, config: Any | None) -> Iterator[dict[str, Any]]:
    """Times an evaluation for every number of shots.

    It is the config's protocol and dtype, with the episodes of the settings if they
    give a number; without an config the settings' network on made-up photos, in
    every dtype. Raises InputError as the config does.
    """
    for shots in settings.shots:
        if config:
            yield time_workload(of_config(config, shots, settings.episodes))
            continue
        for dtype in settings.dtype:
            case = settings.case("eval", shots, 1, dtype)
            with made_up(case, settings.episodes or EPISODES) as workload:
                yield time_workload(workload)


def time_workload(workload: Workload) -> dict[str, Any]:
    """Times the evaluation and, before and after it, uncached steps of some episodes."""
    _evaluate(workload, dataclasses.replace(workload.protocol, episodes=1))  # compiles
    time_steps = _steps(workload)
    steps = time_steps()
    seconds = _evaluate(workload, workload.protocol)
    steps += time_steps()
    protocol = workload.protocol
    each = seconds / (protocol.episodes * len(workload.samplers))
    step = float(np.mean(steps))
    return {
        "network": workload.network,
        "dtype": workload.dtype,
        "shots": protocol.shots,
        "episodes": protocol.episodes,
        "seeds": len(workload.samplers),
        "protocol": str(protocol),
        "seconds_per_episode": each,
        "step_seconds": step,
        "ratio": each / step,
    }


def of_config(config: Any, shots: int, episodes: int | None = None) -> Workload:
    """Returns the config's evaluation, by an untrained network of its dtype."""
    changes: dict[str, Any] = {"shots": shots}
    if episodes:
        changes["episodes"] = episodes
    protocol = build_protocol(config, **changes)
    dataset = build_dataset(config, "val")
    net = config.backbone
    weights = build_weights(config)
    return Workload(
        f"{net.name}, weights {net.weights or 'of its package'}",
        meant(config.dtype),
        build_predictor(config, initial_params(config), weights),
        dataset,
        protocol,
        build_eval_samplers(config, dataset, protocol),
        config.workers,
    )


@contextlib.contextmanager
def made_up(case: Case, episodes: int) -> Iterator[Workload]:
    """Yields an evaluation of the case's network on made-up photos."""
    weights = ours.random_weights(case)
    predictor = qpenet_predictor(
        QPENet(**case.network),
        backbone(case.backbone),
        weights.params,
        weights.backbone,
        case.dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset: Any = made_up_photos(Path(folder))
        classes = tuple(range(1, len(dataset.classes) + 1))
        protocol = Protocol(
            dataset="made-up photos",
            split="blocks",
            fold=0,
            classes=dataset.classes,
            shots=case.shots,
            episodes=episodes,
            side=case.size,
        )
        sampler = EpisodeSampler(
            dataset.counts, classes, case.shots, case.seed, on_few="drop"
        )
        yield Workload(
            f"{case.backbone}, weights {case.weights or 'random'}",
            case.dtype,
            predictor,
            dataset,
            protocol,
            [sampler],
            workers=0,
        )


def _evaluate(workload: Workload, protocol: Protocol) -> float:
    """Returns the seconds of an evaluation as the library does it."""
    start = perf_counter()
    score_episodes(
        workload.predictor,
        workload.dataset,
        protocol,
        workload.samplers,
        workers=workload.workers,
    )
    return perf_counter() - start


def _steps(workload: Workload) -> Callable[[], list[float]]:
    """Returns what predicts whole episodes and returns the seconds of each."""
    side, resize = workload.protocol.side, workload.protocol.resize

    def batch_of(index):
        ids = workload.samplers[0](index)
        loaded = load_episode(workload.dataset, ids, side, resize=resize)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], loaded)

    count = min(STEPS, workload.protocol.episodes)
    batches = [batch_of(i) for i in range(count)]

    def seconds(batch):
        start = perf_counter()
        jax.block_until_ready(workload.predictor(batch))
        return perf_counter() - start

    seconds(batches[0])  # compiles
    return lambda: [seconds(batch) for batch in batches]

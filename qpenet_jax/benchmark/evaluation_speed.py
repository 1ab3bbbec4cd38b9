"""The time of an episode of an evaluation, beside a prediction that keeps nothing.

An evaluation keeps encoded images, and so encodes an image once for all its episodes.
The prediction beside it encodes all images of its episode.
"""

import dataclasses
import itertools
from collections.abc import Callable
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpenet_jax.backbones.precision import resolve_dtype
from qpenet_jax.backbones.registry import weight_shapes
from qpenet_jax.benchmark.jax_side import random_params
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.benchmark.speed_report import Row, Table
from qpenet_jax.config import default_config
from qpenet_jax.data.loader import load_episode
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.evaluation.scoring import score_episodes
from qpenet_jax.runs.build import (
    build_backbone,
    build_predictor,
    complete,
    is_released,
    params_like,
)
from qpenet_jax.runs.datasets import build_dataset, build_eval_samplers, build_protocol

PREDICTIONS = 10
"""Episodes whose predictions are timed before the evaluation, and again after it: the
time of one depends on how much of its supports is foreground."""


def evaluation_speed(settings: Settings, config: Any | None = None) -> Table:
    """Times an evaluation for every number of shots, by random weights.

    Protocol, images and dtype are the config's, with the episodes of the settings if
    they give a number; without a config it is the settings' backbone on made-up images,
    in every dtype. Raises InputError as the build functions of a config do.
    """
    configs = (
        [config] if config else [made_up_config(settings, d) for d in settings.dtype]
    )
    return Table(
        "A whole evaluation, with loading and scoring: its time for each episode, "
        "beside the time in which the same network predicts one episode from its "
        "images (means). An evaluation encodes every image once, however many episodes "
        "show it.",
        [
            timed_evaluation(each, shots, settings.episodes)
            for each, shots in itertools.product(configs, settings.shots)
        ],
    )


def made_up_config(settings: Settings, dtype: str) -> Any:
    """Returns a config of the settings' backbone on 64 made-up images."""
    config = default_config()
    config.update(side=settings.size, dtype=dtype, workers=0)
    config.backbone.name = settings.backbone
    config.model.update(settings.network)
    config.dataset.update(
        kind="shapes", name="Shapes", side=settings.size, val_images=64, on_few="drop"
    )
    config.dataset.min_pixels = 64
    config.eval.update(protocol="default", episodes=settings.episodes or 100)
    return complete(config)


def timed_evaluation(config: Any, shots: int, episodes: int = 0) -> Row:
    """Times an evaluation and, before and after it, predictions of single episodes."""
    changes: dict[str, Any] = {"episodes": episodes} if episodes else {}
    protocol = build_protocol(config, shots=shots, **changes)
    dataset, rng = build_dataset(config, "val"), np.random.default_rng(0)
    samplers = build_eval_samplers(config, dataset, protocol)
    shapes = weight_shapes(build_backbone(config), deep=is_released(config))
    predictor = build_predictor(
        config, random_params(params_like(config), rng), random_params(shapes, rng)
    )

    def evaluate(protocol: Protocol) -> None:
        score_episodes(predictor, dataset, protocol, samplers, workers=config.workers)

    def predict() -> list[float]:
        batches = (
            load_episode(dataset, samplers[0](i), protocol.side, resize=protocol.resize)
            for i in (
                0,
                *range(min(PREDICTIONS, protocol.episodes)),
            )  # the first compiles
        )
        arrays = (jax.tree.map(lambda x: jnp.asarray(x)[None], b) for b in batches)
        return [seconds_of(predictor, batch) for batch in arrays][1:]

    evaluate(dataclasses.replace(protocol, episodes=1))  # compiles
    before = predict()
    each = seconds_of(evaluate, protocol) / (protocol.episodes * len(samplers))
    step = float(np.mean(before + predict()))
    return {
        "backbone": config.backbone.name,
        "dtype": resolve_dtype(config.dtype),
        "shots": protocol.shots,
        "episodes": protocol.episodes,
        "seeds": len(samplers),
        "evaluation, ms per episode": 1e3 * each,
        "one prediction, ms": 1e3 * step,
        "ratio": each / step,
        "protocol": str(protocol),
    }


def seconds_of(function: Callable[[Any], Any], argument: Any) -> float:
    """Returns how long a function takes, until its result is computed."""
    start = perf_counter()
    jax.block_until_ready(function(argument))
    return perf_counter() - start

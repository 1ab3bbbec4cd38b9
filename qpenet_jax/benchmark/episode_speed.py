"""The time of episodes: loaded for training, and scored in an evaluation.

Loading is compared with a pipeline that does what most few-shot codes do: float32 from
the file on, and normalisation on the host.
"""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from qpenet_jax.backbones.precision import resolve_dtype
from qpenet_jax.backbones.registry import weight_shapes
from qpenet_jax.benchmark.jax_side import random_params
from qpenet_jax.benchmark.made_up import made_up_photos
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.benchmark.timing import Row, Table, measure
from qpenet_jax.config import default_config
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data import loader
from qpenet_jax.data.augmentation import Augmentation, augment, draw
from qpenet_jax.data.episodes import (
    AUGMENT_STREAM,
    EpisodeIds,
    EpisodeSampler,
    generator,
)
from qpenet_jax.data.sources.decoded import Decoded
from qpenet_jax.data.transforms import binary_mask
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.evaluation.scoring import score_episodes
from qpenet_jax.runs import build
from qpenet_jax.runs.datasets import build_dataset, build_eval_samplers, build_protocol

BATCH = 4
"""Episodes a batch, as in the paper."""

WARM_UP = 8
"""Batches per worker that aren't timed: more than all buffers hold."""

MEAN = 255 * np.array([0.485, 0.456, 0.406], np.float32)
STD = 255 * np.array([0.229, 0.224, 0.225], np.float32)

Load = Callable[[EpisodeIds], Any]


def loading_speed(settings: Settings) -> Iterator[Table]:
    """Measures training episodes of the config's data set, or of made-up photos.

    For every number of shots the comparison takes `settings.seconds`, and so does every
    number of workers.

    Raises:
        InputError: no episode can be sampled from the data set.
    """
    with contextlib.ExitStack() as stack:
        # What is measured is one core: no threads of OpenCV's own.
        stack.callback(cv2.setNumThreads, cv2.getNumThreads())
        cv2.setNumThreads(0)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if settings.config:
            data: Any = build_dataset(settings.config, "train")
        else:
            data = made_up_photos(folder / "photos")
        classes = tuple(range(1, len(data.classes) + 1))
        samplers = [
            EpisodeSampler(data.counts, classes, k, 0, on_few="drop")
            for k in settings.shots
        ]
        loads = ways_to_load(data, settings.size, folder / "decoded")
        # Before Grain, whose threads go on for a while.
        yield Table(
            f"Training episodes at {settings.size} pixels from "
            f"{getattr(data, 'version', type(data).__name__)}, {len(data)} images. On "
            "one core, in this process (cv2.setNumThreads(0), freed memory is kept), "
            "the same episodes in turns: in float32, normalised as well; as the host "
            "augments; and the host's work where the device augments, from decoded "
            "images. The ratio is the time in float32 divided by the row's.",
            [
                row
                for sampler in samplers
                for row in compare_loads(sampler, loads, settings.seconds)
            ],
        )
        streams = itertools.product(("host", "device"), samplers, settings.workers)
        yield Table(
            f"Batches of {BATCH} episodes from Grain (cv2.setNumThreads(0)); 0 workers "
            "are a thread.",
            [
                {"augments": where}
                | throughput(loads[where], sampler, workers, settings.seconds)
                for where, sampler, workers in streams
            ],
        )


def ways_to_load(data: SegmentationDataset, side: int, folder: Path) -> dict[str, Load]:
    """Returns the loading in float32, and that for augmenting on host and device."""
    options = {"side": side, "augmentation": Augmentation(), "seed": 0}
    decoded = Decoded(data, folder)
    raw = {"canvas": loader.canvas_side(decoded.sizes, side)} | options
    return {
        "float32": functools.partial(load_float32, data, **options),
        "host": functools.partial(loader.load_episode, data, **options),
        "device": functools.partial(loader.load_raw_episode, decoded, **raw),
    }


def load_float32(
    dataset: SegmentationDataset,
    ids: EpisodeIds,
    side: int,
    augmentation: Augmentation,
    seed: int,
) -> tuple[Float32[np.ndarray, "k s s 3"], UInt8[np.ndarray, "k s s"]]:
    """Returns images and masks of the episode of `load_episode`, the query first.

    The images are normalised by ImageNet's mean and standard deviation.
    """
    images, masks = [], []
    for slot, item in enumerate((ids.query, *ids.supports)):
        image = dataset.image(item).astype(np.float32)
        mask = binary_mask(dataset.label(item), ids.class_id)
        rng = generator(seed, AUGMENT_STREAM, ids.index, slot)
        draws = draw(rng, augmentation, mask.shape, side)
        image, mask = augment(image, mask, side, draws)
        images.append((image - MEAN) / STD)
        masks.append(mask)
    return np.stack(images), np.stack(masks)


def compare_loads(
    sampler: EpisodeSampler, loads: Mapping[str, Load], seconds: float
) -> list[Row]:
    """Makes the same episodes in all ways in turns; rates are of the median round."""
    calls = {
        name: map(load, map(sampler, itertools.count())).__next__
        for name, load in loads.items()
    }
    return [
        {"shots": sampler.shots} | row | _rates(1e3 / row["ms"][1], sampler)
        for row in measure(calls, seconds)
    ]


def _rates(episodes: float, sampler: EpisodeSampler) -> Row:
    return {"episodes/s": episodes, "images/s": episodes * (sampler.shots + 1)}


def throughput(
    load: Load,
    sampler: EpisodeSampler,
    workers: int,
    seconds: float,
    clock: Callable[[], float] = perf_counter,
) -> Row:
    """Counts the episodes of a stream from when its workers and buffers run."""
    stream = loader.training_batches(load, sampler, batch_size=BATCH, workers=workers)
    with contextlib.closing(stream) as batches:
        for _ in range(WARM_UP * max(workers, 1)):
            next(batches)
        start, episodes = clock(), 0
        while not episodes or clock() - start < seconds:
            next(batches)
            episodes += BATCH
        rates = _rates(episodes / (clock() - start), sampler)
    return {"shots": sampler.shots, "workers": workers} | rates


# --- an evaluation ----------------------------------------------------------------

PREDICTIONS = 10
"""Episodes whose predictions are timed before the evaluation, and again after it: the
time of one depends on how much of its supports is foreground."""


def evaluation_speed(settings: Settings) -> Iterator[Table]:
    """Times an evaluation for every number of shots, by random weights.

    Protocol, images and dtype are the config's, with the episodes of the settings if
    they give a number; without a config it is the settings' backbone on made-up images,
    in every dtype. Raises InputError as the build functions of a config do.
    """
    configs = [settings.config] if settings.config else made_up_configs(settings)
    yield Table(
        "A whole evaluation, with loading and scoring: its time for each episode, "
        "beside the time in which the same network predicts one episode from its "
        "images (means). An evaluation encodes every image once, however many episodes "
        "show it.",
        [
            timed_evaluation(each, shots, settings.episodes)
            for each, shots in itertools.product(configs, settings.shots)
        ],
    )


def made_up_configs(settings: Settings) -> Iterator[Any]:
    """Yields configs of the settings' backbone on 64 made-up images, in every dtype."""
    for dtype in settings.dtype:
        config = default_config()
        config.update(side=settings.size, dtype=dtype, workers=0)
        config.backbone.name = settings.backbone
        config.model.update(settings.network)
        config.dataset.update(kind="shapes", name="Shapes", side=settings.size)
        config.dataset.update(val_images=64, on_few="drop", min_pixels=64)
        config.eval.update(protocol="default", episodes=100)
        yield build.complete(config)


def timed_evaluation(config: Any, shots: int, episodes: int = 0) -> Row:
    """Times an evaluation and, before and after it, predictions of single episodes."""
    changes: dict[str, Any] = {"episodes": episodes} if episodes else {}
    protocol = build_protocol(config, shots=shots, **changes)
    dataset, rng = build_dataset(config, "val"), np.random.default_rng(0)
    samplers = build_eval_samplers(config, dataset, protocol)
    net, deep = build.build_backbone(config), build.is_released(config)
    params = random_params(build.params_like(config), rng)
    frozen = random_params(weight_shapes(net, deep=deep), rng)
    predictor = build.build_predictor(config, params, frozen)
    ids = [samplers[0](i) for i in range(min(PREDICTIONS, protocol.episodes))]
    loaded = (
        loader.load_episode(dataset, each, protocol.side, resize=protocol.resize)
        for each in ids
    )
    batches = [jax.tree.map(lambda x: jnp.asarray(x)[None], each) for each in loaded]

    def evaluate(protocol: Protocol) -> None:
        score_episodes(predictor, dataset, protocol, samplers, workers=config.workers)

    evaluate(dataclasses.replace(protocol, episodes=1))  # compiles, as the next line
    seconds_of(predictor, batches[0])
    before = [seconds_of(predictor, batch) for batch in batches]
    each = seconds_of(evaluate, protocol) / (protocol.episodes * len(samplers))
    after = [seconds_of(predictor, batch) for batch in batches]
    step = float(np.mean(before + after))
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

"""How fast training episodes are loaded, beside a plain float32 pipeline.

`benchmark_data` measures, tables.py shows what it returns; plain.py is the opponent.
"""

import contextlib
import functools
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np

from qpenet_jax.benchmark import reference_pipeline as plain
from qpenet_jax.benchmark.made_up import made_up_photos
from qpenet_jax.benchmark.stages import Load, stages
from qpenet_jax.core.runtime import keep_freed_memory, processor
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.data.device_augmentation import canvas_side, load_raw_episode
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.data.loader import load_episode, training_batches
from qpenet_jax.data.sources.decoded import Decoded

BATCH = 4
"""Episodes a batch, as in the paper."""

ROUND = 8
"""Episodes that one pipeline makes before the other makes the same ones."""

WARM_UP = 8
"""Batches per worker that aren't timed: more than all buffers hold."""


def benchmark_data(
    dataset: SegmentationDataset | None = None,
    *,
    side: int = 473,
    shots: Sequence[int] = (1, 5),
    seconds: float = 10.0,
    workers: Sequence[int] = (0, 1, 2),
    seed: int = 0,
) -> dict[str, Any]:
    """Measures training episodes of a data set, or of made-up photos without one.

    For every shot count the comparison with the plain pipeline takes `seconds`, and so
    does every number of workers. `side` is in pixels. The result holds numbers and
    strings alone, for JSON and for tables. As in training, the process keeps freed
    memory from then on; the plain pipeline gains most from that.

    Raises:
        InputError: no episode can be drawn from the data set.
    """
    if dataset is None:
        with tempfile.TemporaryDirectory() as folder:
            return benchmark_data(
                made_up_photos(Path(folder)),  # pyright: ignore[reportArgumentType]
                side=side,
                shots=shots,
                seconds=seconds,
                workers=workers,
                seed=seed,
            )
    classes = tuple(range(1, len(dataset.classes) + 1))
    samplers = [
        EpisodeSampler(dataset.counts, classes, k, seed, on_few="drop") for k in shots
    ]
    options = {"side": side, "augmentation": Augmentation(), "seed": seed}
    ours = functools.partial(load_episode, dataset, **options)
    opponent = functools.partial(plain.plain_episode, dataset, **options)
    keep_freed_memory()
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        decoded = Decoded(dataset, folder)
        canvas = canvas_side(decoded.sizes, side)
        raw = functools.partial(load_raw_episode, decoded, canvas=canvas, **options)
        augmenting = {"host": ours, "device": raw}
        return {
            "machine": _machine(),
            "data": getattr(dataset, "version", type(dataset).__name__),
            "images": len(dataset),
            "side": side,
            "one_core": [_compare(s, ours, raw, opponent, seconds) for s in samplers],
            # Before Grain, whose threads go on for a while.
            "stages": stages(dataset, samplers[0], ours, opponent),
            "grain": [
                {"augmenting": where} | _throughput(load, s, n, seconds)
                for where, load in augmenting.items()
                for s in samplers
                for n in workers
            ],
        }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps OpenCV from using threads of its own: what is measured is one core."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _compare(
    sampler: EpisodeSampler, ours: Load, raw: Load, plain: Load, seconds: float
) -> dict[str, Any]:
    """Lets all make the same episodes in turn; rates are those of the median round.

    `raw` leaves augmentation to the device.
    """
    times: dict[Load, list[float]] = {ours: [], plain: [], raw: []}
    start, rounds = perf_counter(), 0
    while rounds < 3 or perf_counter() - start < seconds:
        # Whoever comes second finds the files in the cache: take turns in that, too.
        for load in (ours, plain, raw) if rounds % 2 else (raw, plain, ours):
            times[load].append(_time(load, sampler, rounds * ROUND))
        rounds += 1
    # The first round warms up.
    ours_s, raw_s, plain_s = (
        np.array(times[load][1:]) / ROUND for load in (ours, raw, plain)
    )
    return {
        "shots": sampler.shots,
        "rounds": rounds - 1,
        "episodes_per_s": float(1 / np.median(ours_s)),
        "raw_episodes_per_s": float(1 / np.median(raw_s)),
        "plain_episodes_per_s": float(1 / np.median(plain_s)),
        "ratio": float(np.median(plain_s) / np.median(ours_s)),
        "ratio_quartiles": np.quantile(plain_s / ours_s, (0.25, 0.75)).tolist(),
    }


def _time(load: Load, sampler: EpisodeSampler, first: int) -> float:
    start = perf_counter()
    for index in range(first, first + ROUND):
        load(sampler(index))
    return perf_counter() - start


def _throughput(
    load: Load, sampler: EpisodeSampler, workers: int, seconds: float
) -> dict[str, Any]:
    """Counts the episodes of a stream from when its workers and buffers run."""
    stream = training_batches(load, sampler, batch_size=BATCH, workers=workers)
    with contextlib.closing(stream) as batches:
        for _ in range(WARM_UP * max(workers, 1)):
            next(batches)
        start, episodes = perf_counter(), 0
        while not episodes or perf_counter() - start < seconds:
            next(batches)
            episodes += BATCH
        rate = episodes / (perf_counter() - start)
    return {"shots": sampler.shots, "workers": workers, "episodes_per_s": rate}


def _machine() -> str:
    versions = (f"{n} {importlib.metadata.version(n)}" for n in ("numpy", "grain"))
    return (
        f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"OpenCV {cv2.__version__}, {', '.join(versions)}"
    )

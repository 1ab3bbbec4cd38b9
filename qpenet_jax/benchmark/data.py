"""How fast training episodes are made, and a plain float32 pipeline to compare with.

`benchmark_data` measures, `markdown` prints; plain.py is the opponent.
"""

import contextlib
import cProfile
import functools
import importlib.metadata
import inspect
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from qpenet_jax.benchmark import plain
from qpenet_jax.benchmark.photos import made_up_photos
from qpenet_jax.core.runtime import keep_freed_memory, processor
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data import host_augmentation
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler
from qpenet_jax.data.loader import load_episode, training_batches
from qpenet_jax.data.raw_episodes import canvas_side, load_raw_episode
from qpenet_jax.data.sources.decoded import Decoded
from qpenet_jax.data.transforms import binary_mask

BATCH = 4
"""Episodes a batch, as in the paper."""

ROUND = 8
"""Episodes that one side makes before the other makes the same ones."""

PROFILED = 5 * ROUND
"""Episodes whose time is split into stages."""

WARM_UP = 8
"""Batches per worker that aren't timed: more than all buffers hold."""

Load = Callable[[EpisodeIds], Any]


def benchmark_data(
    dataset: SegmentationDataset | None = None,
    *,
    side: int = 473,
    shots: Sequence[int] = (1, 5),
    seconds: float = 10.0,
    workers: Sequence[int] = (0, 1, 2),
    seed: int = 0,
) -> dict[str, Any]:
    """Measure training episodes of a data set, or of made-up photos without one.

    For every shot count the comparison with the opponent takes `seconds`, and so does
    every number of workers. `side` is in pixels. What is returned are numbers and
    strings alone, for JSON and for `markdown`. As in training, the process keeps freed
    memory from then on; the opponent gains most from that.

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
        canvas = canvas_side(decoded.sizes)
        raw = functools.partial(load_raw_episode, decoded, canvas=canvas, **options)
        augmenting = {"host": ours, "device": raw}
        return {
            "machine": _machine(),
            "data": getattr(dataset, "version", type(dataset).__name__),
            "images": len(dataset),
            "side": side,
            "one_core": [_compare(s, ours, raw, opponent, seconds) for s in samplers],
            "grain": [
                {"augmenting": where} | _throughput(load, s, n, seconds)
                for where, load in augmenting.items()
                for s in samplers
                for n in workers
            ],
            "stages": _stages(dataset, samplers[0], ours, opponent),
        }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep OpenCV from using threads of its own: what is measured is one core."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _compare(
    sampler: EpisodeSampler, ours: Load, raw: Load, plain: Load, seconds: float
) -> dict[str, Any]:
    """Let all make the same episodes in turn; rates are those of the median round.

    `raw` leaves augmentation to the device.
    """
    times: dict[Load, list[float]] = {ours: [], plain: [], raw: []}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
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
    start = time.perf_counter()
    for index in range(first, first + ROUND):
        load(sampler(index))
    return time.perf_counter() - start


def _throughput(
    load: Load, sampler: EpisodeSampler, workers: int, seconds: float
) -> dict[str, Any]:
    """Count the episodes of a stream from when its workers and buffers run."""
    stream = training_batches(load, sampler, batch_size=BATCH, workers=workers)
    with contextlib.closing(stream) as batches:
        for _ in range(WARM_UP * max(workers, 1)):
            next(batches)
        start, episodes = time.perf_counter(), 0
        while not episodes or time.perf_counter() - start < seconds:
            next(batches)
            episodes += BATCH
        rate = episodes / (time.perf_counter() - start)
    return {"shots": sampler.shots, "workers": workers, "episodes_per_s": rate}


def _stages(
    dataset: SegmentationDataset, sampler: EpisodeSampler, ours: Load, opponent: Load
) -> dict[str, list[float]]:
    """Return the milliseconds per image of every step: ours, the opponent's."""
    h, source = host_augmentation, type(dataset)
    plain_cut = (plain._flip, plain._pad, plain._crop)
    steps: dict[str, tuple[Sequence[Callable], Sequence[Callable]]] = {
        "read and decode the image": ((source.image,), (plain._image,)),
        "read and decode the label": ((source.label,), (plain._label,)),
        "mask of the class": ((binary_mask,), (plain._mask,)),
        "warp: scale": ((h._scale,), (plain._scale,)),
        "warp: rotate": ((h._rotate,), (plain._rotate,)),
        "blur": ((h._blur,), (plain._blur,)),
        "flip, pad, crop": ((h._flip, h._pad, h._crop), plain_cut),
        "normalise": ((), (plain._normalise,)),
        "all": ((load_episode,), (plain.plain_episode,)),
    }
    clocks = _profile(sampler, (ours, opponent))
    return {
        name: [sum(map(clock, side)) for clock, side in zip(clocks, sides, strict=True)]
        for name, sides in steps.items()
    }


def _profile(
    sampler: EpisodeSampler, loads: Sequence[Load]
) -> list[Callable[[Callable], float]]:
    """Return for each `load` what tells a function's milliseconds per image."""
    profiles = [cProfile.Profile(builtins=False) for _ in loads]
    for index in range(PROFILED):
        for profile, load in zip(profiles, loads, strict=True):
            profile.runcall(load, sampler(index))
    images = PROFILED * (sampler.shots + 1)

    def clock(profile: cProfile.Profile) -> Callable[[Callable], float]:
        seconds = {entry.code: entry.totaltime for entry in profile.getstats()}
        return lambda f: 1e3 * seconds.get(inspect.unwrap(f).__code__, 0.0) / images

    return [clock(profile) for profile in profiles]


def _machine() -> str:
    versions = (f"{n} {importlib.metadata.version(n)}" for n in ("numpy", "grain"))
    return (
        f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"OpenCV {cv2.__version__}, {', '.join(versions)}"
    )


def markdown(result: dict[str, Any]) -> str:
    """Return what `benchmark_data` measured as Markdown tables."""
    all_ours, all_plain = result["stages"]["all"]
    stages = [
        f"{name} | {ours:.3f} | {ours / all_ours:.0%} | {plain:.3f} | "
        f"{plain / all_plain:.0%}"
        for name, (ours, plain) in result["stages"].items()
    ]
    return "\n".join(
        [
            f"Training episodes at {result['side']} pixels from {result['data']}, "
            f"{result['images']} images.",
            f"{result['machine']}.",
            "",
            "One core: in this process, cv2.setNumThreads(0), freed memory kept. Plain "
            "float32 OpenCV makes the same episodes in turn; medians of rounds of "
            f"{ROUND} episodes, and the quartiles of their ratio. Device: the host's "
            "work where the device augments, from images that are decoded already.",
            "",
            *table(
                "shots | episodes/s | images/s | plain: episodes/s | images/s | ratio "
                "| device: episodes/s | images/s",
                map(_one_core_row, result["one_core"]),
            ),
            "",
            f"Batches of {BATCH} by Grain, cv2.setNumThreads(0).",
            "",
            *table(
                "augmenting | shots | workers | episodes/s | images/s | images/s per "
                "worker",
                map(_grain_row, result["grain"]),
            ),
            "",
            f"One core, {result['one_core'][0]['shots']} shot(s), milliseconds per "
            "image. We hand uint8 to the device and normalise there.",
            "",
            *table("stage | ms | share | plain: ms | share", stages),
        ]
    )


def table(header: str, rows: Iterable[str]) -> list[str]:
    """Return the lines of a Markdown table, numbers to the right."""
    rule = " | ".join([":--"] + ["--:"] * header.count("|"))
    return [f"| {row} |" for row in (header, rule, *rows)]


def _one_core_row(row: dict[str, Any]) -> str:
    images, (low, high) = row["shots"] + 1, row["ratio_quartiles"]
    sides = ("episodes_per_s", "plain_episodes_per_s", "raw_episodes_per_s")
    ours, plain, raw = (f"{row[s]:.1f} | {row[s] * images:.0f}" for s in sides)
    ratio = f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
    return f"{row['shots']} | {ours} | {plain} | {ratio} | {raw}"


def _grain_row(row: dict[str, Any]) -> str:
    workers, rate = row["workers"], row["episodes_per_s"]
    images = rate * (row["shots"] + 1)
    return (
        f"{row['augmenting']} | {row['shots']} | {workers or '0 (a thread)'} | "
        f"{rate:.1f} | {images:.0f} | "
        f"{images / max(workers, 1):.0f}"
    )

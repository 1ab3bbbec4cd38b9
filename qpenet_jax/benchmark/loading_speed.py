"""How fast training episodes are loaded, beside the same pipeline in float32.

The float32 pipeline does what most few-shot codes do: float32 from the file on, and
normalisation on the host.
"""

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from qpenet_jax.benchmark.made_up import made_up_photos
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.benchmark.speed_report import Table
from qpenet_jax.benchmark.timing import interleave, quartiles
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.augmentation import Augmentation, augment, draw
from qpenet_jax.data.episodes import (
    AUGMENT_STREAM,
    EpisodeIds,
    EpisodeSampler,
    generator,
)
from qpenet_jax.data.loader import (
    canvas_side,
    load_episode,
    load_raw_episode,
    training_batches,
)
from qpenet_jax.data.sources.decoded import Decoded
from qpenet_jax.data.transforms import binary_mask

BATCH = 4
"""Episodes a batch, as in the paper."""

WARM_UP = 8
"""Batches per worker that aren't timed: more than all buffers hold."""

EPISODES = 40
"""Episodes whose time is split into parts."""

MEAN = 255 * np.array([0.485, 0.456, 0.406], np.float32)
STD = 255 * np.array([0.229, 0.224, 0.225], np.float32)

Load = Callable[[EpisodeIds], Any]


def loading_speed(
    settings: Settings, dataset: SegmentationDataset | None = None
) -> Iterator[Table]:
    """Measures training episodes of a data set, or of made-up photos without one.

    For every number of shots the comparison takes `settings.seconds`, and so does every
    number of workers.

    Raises:
        InputError: no episode can be sampled from the data set.
    """
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        data: Any = dataset or made_up_photos(Path(folder, "photos"))
        classes = tuple(range(1, len(data.classes) + 1))
        samplers = [
            EpisodeSampler(data.counts, classes, k, settings.seed, on_few="drop")
            for k in settings.shots
        ]
        loads = _loads(data, settings, Path(folder, "decoded"))
        yield Table(
            f"Training episodes at {settings.size} pixels from "
            f"{getattr(data, 'version', type(data).__name__)}, {len(data)} images. On "
            "one core, in this process (cv2.setNumThreads(0), freed memory is kept). "
            "The same pipeline in float32, which also normalises, makes the same "
            "episodes in turns; medians of all rounds, and the quartiles of the ratio "
            "in brackets. The last columns are the work of the host where the device "
            "augments, from images that are already decoded.",
            [_compare(sampler, loads, settings.seconds) for sampler in samplers],
        )
        # Before Grain, whose threads go on for a while.
        yield Table(
            "Milliseconds for each image on one core, in episodes of "
            f"{samplers[0].shots} shot(s).",
            _parts(data, samplers[0], settings),
        )
        yield Table(
            f"Batches of {BATCH} episodes from Grain (cv2.setNumThreads(0)); 0 workers "
            "are a thread.",
            [
                {"augments": where}
                | throughput(loads[where], sampler, workers, settings.seconds)
                for where in ("host", "device")
                for sampler in samplers
                for workers in settings.workers
            ],
        )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps OpenCV from using threads of its own: what is measured is one core."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _loads(dataset: Any, settings: Settings, folder: Path) -> dict[str, Load]:
    """Returns functions that load an episode: by the host, in float32, raw."""
    options: dict[str, Any] = {
        "side": settings.size,
        "augmentation": Augmentation(),
        "seed": settings.seed,
    }
    decoded = Decoded(dataset, folder)
    canvas = canvas_side(decoded.sizes, settings.size)
    return {
        "host": functools.partial(load_episode, dataset, **options),
        "float32": functools.partial(
            load_in_parts, dataset, **options, float32=True, seconds={}
        ),
        "device": functools.partial(
            load_raw_episode, decoded, canvas=canvas, **options
        ),
    }


def load_in_parts(
    dataset: SegmentationDataset,
    ids: EpisodeIds,
    side: int,
    augmentation: Augmentation,
    seed: int,
    float32: bool,
    seconds: dict[str, float],
) -> tuple[np.ndarray, UInt8[np.ndarray, "k s s"]]:
    """Returns images and masks of the episode of `load_episode`, query first.

    The time of every part is added to its `seconds`. With `float32` the images are
    [k, s, s, 3] in float32, normalised.
    """

    def timed(part: str, function: Callable[..., Any], *args: Any) -> Any:
        start = perf_counter()
        result = function(*args)
        seconds[part] = seconds.get(part, 0.0) + perf_counter() - start
        return result

    images, masks = [], []
    for slot, item in enumerate((ids.query, *ids.supports)):
        image = timed("read and decode the image", dataset.image, item)
        label = timed("read and decode the label", dataset.label, item)
        mask = timed("mask of the class", binary_mask, label, ids.class_id)
        rng = generator(seed, AUGMENT_STREAM, ids.index, slot)
        draws = draw(rng, augmentation, mask.shape, side)
        if float32:
            image = timed("convert to float32", image.astype, np.float32)
        image, mask = timed("augment", augment, image, mask, side, draws)
        images.append(timed("normalise", normalised, image) if float32 else image)
        masks.append(mask)
    return np.stack(images), np.stack(masks)


def normalised(image: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """Returns an image of 0..255 with ImageNet's mean and standard deviation."""
    return (image - MEAN) / STD


def _compare(
    sampler: EpisodeSampler, loads: Mapping[str, Load], seconds: float
) -> dict[str, Any]:
    """Makes the same episodes in all ways in turns; rates are of the median round."""
    episodes = [map(sampler, itertools.count()) for _ in loads]
    calls = [
        lambda load=load, ids=ids: load(next(ids))
        for load, ids in zip(loads.values(), episodes, strict=True)
    ]
    times = dict(zip(loads, interleave(calls, seconds), strict=True))
    row: dict[str, Any] = {"shots": sampler.shots}
    for name, each in times.items():
        rate = 1 / quartiles(each)[1]
        row[f"{name}: episodes/s"] = rate
        row[f"{name}: images/s"] = rate * (sampler.shots + 1)
    return row | {"host / float32": quartiles(times["float32"] / times["host"])}


def _parts(
    dataset: Any, sampler: EpisodeSampler, settings: Settings
) -> list[dict[str, Any]]:
    """Returns milliseconds per image of each part of both pipelines."""
    found: dict[str, dict[str, float]] = {"host": {}, "float32": {}}
    for name, ids in itertools.product(found, map(sampler, range(EPISODES))):
        options = settings.size, Augmentation(), settings.seed
        load_in_parts(dataset, ids, *options, name == "float32", found[name])
    images = EPISODES * (sampler.shots + 1)
    rows: list[dict[str, Any]] = [{"part": part} for part in found["float32"]]
    for row, (name, seconds) in itertools.product(rows, found.items()):
        each = seconds.get(row["part"], 0.0)
        row[f"{name}, ms"] = 1e3 * each / images
        row[f"{name}, %"] = 100 * each / sum(seconds.values())
    return rows


def throughput(
    load: Load,
    sampler: EpisodeSampler,
    workers: int,
    seconds: float,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Any]:
    """Counts the episodes of a stream from when its workers and buffers run."""
    stream = training_batches(load, sampler, batch_size=BATCH, workers=workers)
    with contextlib.closing(stream) as batches:
        for _ in range(WARM_UP * max(workers, 1)):
            next(batches)
        start, episodes = clock(), 0
        while not episodes or clock() - start < seconds:
            next(batches)
            episodes += BATCH
        rate = episodes / (clock() - start)
    images = rate * (sampler.shots + 1)
    return {
        "shots": sampler.shots,
        "workers": workers,
        "episodes/s": rate,
        "images/s": images,
        "images/s per worker": images / max(workers, 1),
    }

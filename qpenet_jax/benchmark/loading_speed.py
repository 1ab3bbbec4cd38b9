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
from qpenet_jax.benchmark.speed_report import Row, Table
from qpenet_jax.benchmark.timing import measure
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
    with contextlib.ExitStack() as stack:
        # What is measured is one core: no threads of OpenCV's own.
        stack.callback(cv2.setNumThreads, cv2.getNumThreads())
        cv2.setNumThreads(0)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data: Any = dataset or made_up_photos(folder / "photos")
        classes = tuple(range(1, len(data.classes) + 1))
        samplers = [
            EpisodeSampler(data.counts, classes, k, 0, on_few="drop")
            for k in settings.shots
        ]
        options = {"side": settings.size, "augmentation": Augmentation(), "seed": 0}
        decoded = Decoded(data, folder / "decoded")
        canvas = canvas_side(decoded.sizes, settings.size)
        in_parts = functools.partial(load_in_parts, data, **options)
        loads: dict[str, Load] = {
            "float32": functools.partial(in_parts, float32=True, seconds={}),
            "host": functools.partial(load_episode, data, **options),
            "device": functools.partial(
                load_raw_episode, decoded, canvas=canvas, **options
            ),
        }
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
        # Before Grain, whose threads go on for a while.
        yield Table(
            "Milliseconds for each image on one core, in episodes of "
            f"{samplers[0].shots} shot(s).",
            _parts(in_parts, samplers[0]),
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


def compare_loads(
    sampler: EpisodeSampler, loads: Mapping[str, Load], seconds: float
) -> list[Row]:
    """Makes the same episodes in all ways in turns; rates are of the median round."""
    calls = {
        name: map(load, map(sampler, itertools.count())).__next__
        for name, load in loads.items()
    }
    rows = measure(calls, seconds)
    for row in rows:
        row |= _rates(1e3 / row["ms"][1], sampler)
    return [{"shots": sampler.shots} | row for row in rows]


def _rates(episodes: float, sampler: EpisodeSampler) -> Row:
    return {"episodes/s": episodes, "images/s": episodes * (sampler.shots + 1)}


def _parts(load: Callable[..., Any], sampler: EpisodeSampler) -> list[Row]:
    """Returns milliseconds per image of each part of both pipelines."""
    found: dict[str, dict[str, float]] = {"host": {}, "float32": {}}
    for name, ids in itertools.product(found, map(sampler, range(EPISODES))):
        load(ids=ids, float32=name == "float32", seconds=found[name])
    images = EPISODES * (sampler.shots + 1)
    rows: list[Row] = [{"part": part} for part in found["float32"]]
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
) -> Row:
    """Counts the episodes of a stream from when its workers and buffers run."""
    stream = training_batches(load, sampler, batch_size=BATCH, workers=workers)
    with contextlib.closing(stream) as batches:
        for _ in range(WARM_UP * max(workers, 1)):
            next(batches)
        start, episodes = clock(), 0
        while not episodes or clock() - start < seconds:
            next(batches)
            episodes += BATCH
        rates = _rates(episodes / (clock() - start), sampler)
    each = rates["images/s"] / max(workers, 1)
    shape = {"shots": sampler.shots, "workers": workers}
    return shape | rates | {"images/s per worker": each}

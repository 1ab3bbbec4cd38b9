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
        loads: dict[str, Load] = {
            "float32": functools.partial(load_float32, data, **options),
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
            "The parts of both pipelines, for one image on one core. With float32, an "
            "image is converted, augmented in float32 and normalised.",
            parts(data, settings.size, settings.seconds),
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


def load_float32(
    dataset: SegmentationDataset,
    ids: EpisodeIds,
    side: int,
    augmentation: Augmentation,
    seed: int,
) -> tuple[Float32[np.ndarray, "k s s 3"], UInt8[np.ndarray, "k s s"]]:
    """Returns normalised images and masks of the episode of `load_episode`.

    The query is the first.
    """
    images, masks = [], []
    for slot, item in enumerate((ids.query, *ids.supports)):
        image = dataset.image(item).astype(np.float32)
        mask = binary_mask(dataset.label(item), ids.class_id)
        rng = generator(seed, AUGMENT_STREAM, ids.index, slot)
        draws = draw(rng, augmentation, mask.shape, side)
        image, mask = augment(image, mask, side, draws)
        images.append(normalised(image))
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


def parts(dataset: SegmentationDataset, side: int, seconds: float) -> list[Row]:
    """Returns the times of the parts of both pipelines, in turns, for one image."""
    items, rng = itertools.cycle(range(len(dataset))), np.random.default_rng(0)
    image, label = dataset.image(0), dataset.label(0)
    mask = binary_mask(label, 1)
    single, square = image.astype(np.float32), np.zeros((side, side, 3), np.float32)

    def augmented(image: np.ndarray) -> Any:
        return augment(image, mask, side, draw(rng, Augmentation(), mask.shape, side))

    calls: dict[str, Callable[[], Any]] = {
        "read and decode the image": lambda: dataset.image(next(items)),
        "read and decode the label": lambda: dataset.label(next(items)),
        "mask of the class": lambda: binary_mask(label, 1),
        "augment": lambda: augmented(image),
        "augment in float32": lambda: augmented(single),
        "convert to float32": lambda: image.astype(np.float32),
        "normalise": lambda: normalised(square),
    }
    rows = measure(calls, seconds)
    return [{"part": r["variant"], "ms": r["ms"]} for r in rows]


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

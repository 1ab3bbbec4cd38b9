"""Loading of episodes: read, transformed, stacked to batches, also in processes."""

import functools
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

import cv2
import jax
import numpy as np
from absl import flags
from jaxtyping import Int

from qpenet_jax.core.choices import Resize
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE, Episode, SegmentationDataset
from qpenet_jax.data.augmentation import Augmentation, augment, draw, no_change
from qpenet_jax.data.device_augmentation import (
    DeviceDraws,
    RawEpisode,
    device_draws,
    scaled_side,
)
from qpenet_jax.data.episodes import (
    AUGMENT_STREAM,
    EpisodeIds,
    generator,
)
from qpenet_jax.data.images import check_same_size
from qpenet_jax.data.transforms import (
    UNSURE,
    binary_mask,
    fit,
    fit_label,
    padding_apart,
)

PREFETCHED_BATCHES = 2
"""Batches that each worker keeps ready."""

WORKER_DIED = re.compile(r"process was terminated unexpectedly with exit code (-?\d+)")
"""Grain's message about a worker that is gone; a signal's number is negative."""

GUARD = (
    "a script that loads in processes is run again by each of them: put what it does "
    'under `if __name__ == "__main__":`, or take workers=0'
)

LARGEST_CANVAS = 1024
"""Side beyond which images don't enlarge the canvas: a batch of eight takes 34 MB."""

CANVAS_MULTIPLE = 32
"""Canvases are rounded up to it, so that similar data sets share a compilation."""

T = TypeVar("T")


def load_episode(
    dataset: SegmentationDataset,
    ids: EpisodeIds,
    side: int,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    resize: Resize = "pad",
) -> Episode:
    """Reads and transforms the images of an episode; every array is `side` x `side`.

    With an augmentation each image gets a generator of (seed, index, slot) of its
    own, the query being slot 0; without, all are fitted as evaluation does.

    Raises:
        InputError: an image or label can't be used.
    """

    def load(slot: int, item: int):
        image, mask = _read(dataset, item, ids.class_id)
        if augmentation is None:
            return fit(image, side, resize), fit_label(mask, side, resize)
        rng = generator(seed, AUGMENT_STREAM, ids.index, slot)
        return augment(image, mask, side, draw(rng, augmentation, mask.shape, side))

    items = (ids.query, *ids.supports)
    loaded = (load(slot, item) for slot, item in enumerate(items))
    images, masks = (np.stack(each) for each in zip(*loaded, strict=True))
    padding = masks == IGNORE
    masks[masks == UNSURE] = IGNORE
    return Episode(images[0], masks[0], images[1:], masks[1:], padding[0], padding[1:])


def _read(dataset: SegmentationDataset, item: int, class_id: int):
    """Returns an image and its mask of a class, in which UNSURE stands for 255."""
    image, label = dataset.image(item), dataset.label(item)
    check_same_size(label.shape, image.shape[:2], dataset.names[item])
    return image, padding_apart(binary_mask(label, class_id))


def load_raw_episode(
    dataset: SegmentationDataset,
    ids: EpisodeIds,
    canvas: int,
    side: int,
    augmentation: Augmentation,
    seed: int,
) -> RawEpisode:
    """Reads the images of an episode and makes the draws that `load_episode` makes.

    `canvas` is the side of the canvas (`canvas_side`), `side` that of the crop. What is
    larger than the canvas is augmented here, and the draws then change nothing.

    Raises:
        InputError: an image can't be used.
    """
    items = (ids.query, *ids.supports)
    images = np.zeros((len(items), canvas, canvas, 3), np.uint8)
    masks = np.zeros((len(items), canvas, canvas), np.uint8)
    room = max(scaled_side(canvas, augmentation), side)
    draws = []
    for slot, item in enumerate(items):
        image, mask = _read(dataset, item, ids.class_id)
        rng = generator(seed, AUGMENT_STREAM, ids.index, slot)
        drawn = draw(rng, augmentation, mask.shape, side)
        if max(mask.shape) > canvas:
            image, mask = augment(image, mask, side, drawn)
            drawn = no_change(side)
        height, width = mask.shape
        images[slot, :height, :width] = image
        masks[slot, :height, :width] = mask
        draws.append(device_draws(drawn, (height, width), room))
    stacked = DeviceDraws(*map(np.stack, zip(*draws, strict=True)))
    return RawEpisode(images, masks, stacked)


def canvas_side(sizes: Int[np.ndarray, "images 2"], side: int) -> int:
    """Returns the side of the canvas that holds every image, a multiple of 32.

    At most LARGEST_CANVAS, or what holds a crop of `side`.
    """
    longest = min(int(sizes.max()), max(LARGEST_CANVAS, side))
    return -(-longest // CANVAS_MULTIPLE) * CANVAS_MULTIPLE


def training_batches(
    load: Callable[[EpisodeIds], T],
    sampler: Callable[[int], EpisodeIds],
    *,
    batch_size: int,
    start_step: int = 0,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Generator[T, None, None]:
    """Yields the batches from `start_step` on, without end, prefetched by workers.

    `load` returns an episode as a tree of arrays (`load_episode`, `load_raw_episode`);
    a batch is that tree, stacked. Batch t holds episodes t B .. t B + B - 1, whatever
    the number of workers, and process p of P, `shard=(p, P)`, gets the p-th of P equal
    parts. Close the generator (`contextlib.closing`) to end its workers. They are
    spawned: a script that uses them needs the usual `if __name__ == "__main__"`.

    Raises:
        InputError: the batch can't be shared equally; while iterating, an image or
            label that can't be used.
    """
    process, processes = shard
    if batch_size % processes:
        raise InputError(
            f"batch size {batch_size} can't be shared by {processes} processes; "
            "choose a multiple"
        )
    size = batch_size // processes
    batch = functools.partial(
        _load_batch, load, sampler, stride=batch_size, offset=process * size, size=size
    )
    return prefetched(batch, range(start_step, sys.maxsize), workers)


def prefetched(
    load: Callable[[int], T], indices: range, workers: int
) -> Generator[T, None, None]:
    """Yields `load(i)` in order, computed in worker processes, or a thread if 0.

    Close the generator, if it isn't exhausted, to end its workers.

    Raises:
        InputError: what `load` raises, or a worker is gone.
    """
    import grain  # Here: it takes a good part of a second.

    items = grain.MapDataset.range(indices.start, indices.stop).map(load)
    stream = items.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_BATCHES)
    )
    if workers:
        _mark_flags_as_parsed()
        options = grain.MultiprocessingOptions(
            workers, per_worker_buffer_size=PREFETCHED_BATCHES
        )
        stream = stream.mp_prefetch(options, worker_init_fn=_quiet_worker)
    iterator = iter(stream)
    try:
        # A worker's arrays lie in memory that it shares, and Python warns of what still
        # does when the process ends: JAX may keep what it is given as long as that.
        yield from map(_copied, iterator) if workers else iterator
    except InputError as error:  # Grain adds notes of its own to what workers raise.
        raise InputError(str(error)) from None
    except RuntimeError as error:
        died = WORKER_DIED.search(str(error))
        if died is None:
            raise
        raise InputError(_end_of_worker(int(died[1]))) from None
    finally:
        iterator.close()
        if workers:
            gc.collect()  # Grain's last arrays are in cycles: free their shared memory


def _end_of_worker(code: int) -> str:
    if code >= 0:
        return f"a loading process ended by itself (exit code {code}); {GUARD}"
    return (
        f"a loading process was killed (signal {-code}), perhaps for want of memory: "
        "lower config.workers, or free some; the same command goes on"
    )


def _copied(loaded: T) -> T:
    """Returns a tree of arrays with memory of their own."""
    return jax.tree.map(
        lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, loaded
    )


# At module level, as what goes to a worker process is pickled.
def _load_batch(
    load: Callable[[EpisodeIds], T],
    sampler: Callable[[int], EpisodeIds],
    step: int,
    *,
    stride: int,
    offset: int,
    size: int,
) -> T:
    first = step * stride + offset
    episodes = (load(sampler(index)) for index in range(first, first + size))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *episodes)


def _mark_flags_as_parsed() -> None:
    """Lets Grain hand absl's flags to its workers in programs that don't use absl."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _quiet_worker(worker: int, workers: int) -> None:
    """Sets up a worker: without OpenCV's own threads, and deaf to Ctrl-C.

    Ctrl-C goes to the whole process group; the parent decides what to do about it.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent is gone: one killed outright can't do it.

    Linux's own signal for that (prctl) comes when the *thread* ends that has started a
    worker. Grain's does so while it closes, and batches in shared memory were lost.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

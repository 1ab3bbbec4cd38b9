"""Loading of episodes: read, transformed, stacked to batches, also in processes."""

import functools
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import cv2
import jax
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from qpenet_jax.core.choices import Resize
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode, SegmentationDataset
from qpenet_jax.data.augmentation import Augmentation, ImageDraws, augment, draw
from qpenet_jax.data.device_augmentation import (
    RawEpisode,
    device_draws,
    scaled_side,
)
from qpenet_jax.data.episodes import AUGMENT_STREAM, EpisodeIds, generator
from qpenet_jax.data.images import check_same_size
from qpenet_jax.data.transforms import (
    binary_mask,
    episode_of,
    fit,
    fit_label,
    padding_apart,
)

PREFETCHED_BATCHES = 2
"""Batches that each worker keeps ready."""

WORKER_DIED = re.compile(r"process was terminated unexpectedly with exit code (-?\d+)")
"""Grain's message about a worker that is gone; a signal's number is negative."""

WORKER_GONE = (
    "a loading process was killed or ended by itself (exit code {code}, negative for a "
    "signal): lower config.workers or free memory, and the same command goes on; a "
    'script that loads in processes needs `if __name__ == "__main__":` around what it '
    "does, as each of them runs it again"
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
    loaded = []
    for slot, (image, mask) in enumerate(_read(dataset, ids)):
        if augmentation is None:
            loaded.append((fit(image, side, resize), fit_label(mask, side, resize)))
        else:
            rng = generator(seed, AUGMENT_STREAM, ids.index, slot)
            draws = draw(rng, augmentation, mask.shape, side)
            loaded.append(augment(image, mask, side, draws))
    return episode_of(*map(np.stack, zip(*loaded, strict=True)))


def _read(
    dataset: SegmentationDataset, ids: EpisodeIds
) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]]:
    """Yields the images of an episode, the query first, and their masks of its class.

    In these masks UNSURE stands for 255.
    """
    for item in (ids.query, *ids.supports):
        image, label = dataset.image(item), dataset.label(item)
        check_same_size(label.shape, image.shape[:2], dataset.names[item])
        yield image, padding_apart(binary_mask(label, ids.class_id))


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
    slots = 1 + len(ids.supports)
    images = np.zeros((slots, canvas, canvas, 3), np.uint8)
    masks = np.zeros((slots, canvas, canvas), np.uint8)
    room = max(scaled_side(canvas, augmentation), side)
    all_draws = []
    for slot, (image, mask) in enumerate(_read(dataset, ids)):
        rng = generator(seed, AUGMENT_STREAM, ids.index, slot)
        draws = draw(rng, augmentation, mask.shape, side)
        if max(mask.shape) > canvas:
            image, mask = augment(image, mask, side, draws)
            corners = 0 * draws.corners
            draws = ImageDraws((side, side), 0.0, False, False, corners)
        height, width = mask.shape
        images[slot, :height, :width] = image
        masks[slot, :height, :width] = mask
        all_draws.append(device_draws(draws, (height, width), room))
    return RawEpisode(images, masks, _stacked(all_draws))


def _stacked(trees: Iterable[T]) -> T:
    """Returns trees of arrays as one tree, whose arrays have a leading axis more."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *trees)


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
    places = range(process * size, (process + 1) * size)
    batch = functools.partial(_load_batch, load, sampler, batch_size, places)
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
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain hands absl's flags to its workers.
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
        raise InputError(WORKER_GONE.format(code=died[1])) from None
    finally:
        iterator.close()
        if workers:
            gc.collect()  # Grain's last arrays are in cycles: free their shared memory


# At module level, as what goes to a worker process is pickled.
def _load_batch(
    load: Callable[[EpisodeIds], T],
    sampler: Callable[[int], EpisodeIds],
    batch_size: int,
    places: range,
    step: int,
) -> T:
    """Returns the episodes at some places of batch `step`, stacked."""
    return _stacked(load(sampler(step * batch_size + place)) for place in places)


def _copied(loaded: T) -> T:
    """Returns a tree of arrays with memory of their own."""
    return jax.tree.map(
        lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, loaded
    )


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

"""Load episodes: read, transform, stack to batches, in worker processes if wanted."""

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

from qpenet_jax.core.choices import Resize
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE, Episode, SegmentationDataset
from qpenet_jax.data.augmentation import Augmentation, augment, draw
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
"""What Grain tells of a worker that is gone; a signal's number is negative."""

GUARD = (
    "a script that loads in processes is run again by each of them: put what it does "
    'under `if __name__ == "__main__":`, or take workers=0'
)

T = TypeVar("T")


def load_episode(
    dataset: SegmentationDataset,
    ids: EpisodeIds,
    side: int,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    resize: Resize = "pad",
) -> Episode:
    """Reads and transform the images of an episode; every array `side` x `side`.

    With an augmentation each image gets a generator of (seed, index, slot) of its
    own, the query being slot 0; without, all are fitted as evaluation does.

    Raises:
        InputError: an image or label can't be used.
    """

    def load(slot: int, item: int):
        image, label = dataset.image(item), dataset.label(item)
        check_same_size(label.shape, image.shape[:2], dataset.names[item])
        mask = padding_apart(binary_mask(label, ids.class_id))
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


def training_batches(
    load: Callable[[EpisodeIds], T],
    sampler: Callable[[int], EpisodeIds],
    *,
    batch_size: int,
    start_step: int = 0,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Generator[T, None, None]:
    """Yields the batches from `start_step` on, without end, loaded ahead by workers.

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
    if workers and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(GUARD)  # a worker that is still reading the script
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
    """Keeps OpenCV's own threads from competing with the other workers.

    Ctrl-C goes to the whole process group; what to do about it, the parent decides.
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

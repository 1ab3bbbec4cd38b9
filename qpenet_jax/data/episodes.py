"""Episode i is a pure function of (data set, seed, i): drawing, loading, batching.

Random numbers come from the counter-based generator Philox, with the seed in its key
and the episode's index in its counter. So workers, hosts and restarts can't change
what episode i is, and resuming at step t is to start counting there.
"""

import ctypes
import functools
import signal
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import cv2
import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Int

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode, SegmentationDataset
from qpenet_jax.data.transforms import (
    Augmentation,
    Resize,
    augment,
    binary_mask,
    fit,
    fit_label,
)

MIN_PIXELS = 2 * 32 * 32
"""An image counts for a class that covers at least 2048 pixels of its label."""

ORDER, DRAW, AUGMENT = range(3)
"""Independent streams of one seed: order of the queries, episodes, augmentation."""

AHEAD = 2
"""Batches that each worker keeps ready."""

Order = Literal["shuffled", "list", "pairs", "classes"]
Targets = Literal["large", "any"]

T = TypeVar("T")


class EpisodeIds(NamedTuple):
    """Which images make up episode `index`: indices into the data set."""

    index: int
    query: int
    class_id: int
    supports: tuple[int, ...]


def eligible_pairs(
    counts: Int[np.ndarray, "images classes"],
    classes: tuple[int, ...],
    exclude: tuple[int, ...] = (),
    min_pixels: int = MIN_PIXELS,
) -> Bool[np.ndarray, "images chosen"]:
    """Return which images may show which of `classes` (ids; the columns' order).

    A class must cover `min_pixels`, and no pixel of the image may be of a class in
    `exclude`: training leaves out images with novel objects, as the paper's system.
    """
    large = counts[:, np.array(classes, np.int64) - 1] >= max(min_pixels, 1)
    excluded = counts[:, np.array(exclude, np.int64) - 1]
    return large & ~excluded.any(axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class EpisodeSampler:
    """`sampler(i)` draws episode i: a query, one of its classes, K supports of it.

    Every image with an eligible class is query once per epoch, "shuffled" by seed and
    epoch or always in "list" order; its class is uniform among its eligible ones, or
    with `targets="any"` among all those with a pixel in it. Order "pairs" goes through
    the listed (image, class) pairs instead, "classes" draws a class, then a query of
    it. Supports are other images listed for that class, without repeats.

    A class without any image is simply absent. One with 1..K images can't form an
    episode: an error, or with `on_few="drop"` left out together with its images'
    claim to be listed for it.

    Raises:
        InputError: a class with 1..K images, or no image at all.
    """

    counts: Int[np.ndarray, "images classes"]
    classes: tuple[int, ...]
    shots: int
    seed: int
    exclude: tuple[int, ...] = ()
    min_pixels: int = MIN_PIXELS
    on_few: Literal["error", "drop"] = "error"
    order: Order = "shuffled"
    targets: Targets = "large"
    class_names: tuple[str, ...] = ()
    """Names of all classes of the data set, for messages; ids without it."""

    def __post_init__(self):
        """Check now that every episode can be drawn."""
        if self.on_few not in ("error", "drop"):
            raise InputError(f"on_few {self.on_few!r}: choose error or drop")
        if self.shots < 1:
            raise InputError(f"shots {self.shots}: an episode needs 1 support or more")
        if not len(self.images):
            raise InputError(
                f"the list of episodes is empty: no class has {self.shots + 1} images "
                f"with at least {self.min_pixels} pixels of it, as {self.shots}-shot "
                "episodes need; check the id list, the fold, the filter and the shots"
            )

    def __len__(self) -> int:
        """Return the number of listed images: the length of an epoch."""
        return len(self.images)

    def __call__(self, index: int) -> EpisodeIds:
        """Return episode `index`, any integer from 0 on."""
        rng = generator(self.seed, DRAW, index)
        query, column = self._query(index, rng)
        others = self._members[column]
        others = others[others != query]
        supports = rng.choice(others, self.shots, replace=False)
        return EpisodeIds(
            index=index,
            query=query,
            class_id=self.classes[column],
            supports=tuple(supports.tolist()),
        )

    def _query(self, index: int, rng: np.random.Generator) -> tuple[int, int]:
        """Return the query of an episode and the column of its class."""
        if self.order == "pairs":
            query, column = self._listed_pairs[index % len(self._listed_pairs)]
        elif self.order == "classes":
            column = rng.choice(np.flatnonzero(self.pairs.any(axis=0)))
            query = rng.choice(self._members[column])
        else:
            epoch, position = divmod(index, len(self))
            if self.order == "shuffled":
                position = _order(self.seed, epoch, len(self))[position]
            query = self.images[position]
            column = rng.choice(np.flatnonzero(self._targets(query)))
        return int(query), int(column)

    def _targets(self, query: int) -> Bool[np.ndarray, " chosen"]:
        """Return the classes that an image may be query for."""
        if self.targets == "large":
            return self.pairs[query]
        pixels = self.counts[query, np.subtract(self.classes, 1)]
        return (pixels > 0) & self.pairs.any(axis=0)

    @property
    def shown(self) -> tuple[int, ...]:
        """The ids of the classes that some episode shows."""
        columns = np.flatnonzero(self.pairs.any(axis=0))
        return tuple(self.classes[column] for column in columns)

    @functools.cached_property
    def pairs(self) -> Bool[np.ndarray, "images chosen"]:
        """Which image serves which of `classes`, few-image classes settled."""
        pairs = eligible_pairs(self.counts, self.classes, self.exclude, self.min_pixels)
        images = pairs.sum(axis=0)
        few = (images > 0) & (images <= self.shots)
        if few.any() and self.on_few != "drop":
            column = int(np.argmax(few))
            raise InputError(
                f"class {self._name(column)} has {images[column]} image(s) with at "
                f"least {self.min_pixels} pixels of it, but {self.shots}-shot episodes "
                f"need {self.shots + 1}: add images, use fewer shots, or set "
                "on_few='drop' to leave the class out"
            )
        return pairs & ~few

    @functools.cached_property
    def images(self) -> Int[np.ndarray, "listed"]:
        """The listed images: those that may be a query, in the data set's order."""
        return np.flatnonzero(self.pairs.any(axis=1))

    @functools.cached_property
    def _listed_pairs(self) -> Int[np.ndarray, "pairs 2"]:
        return np.argwhere(self.pairs)

    @functools.cached_property
    def _members(self) -> list[Int[np.ndarray, "members"]]:
        return [np.flatnonzero(column) for column in self.pairs.T]

    def _name(self, column: int) -> str:
        class_id = self.classes[column]
        return self.class_names[class_id - 1] if self.class_names else str(class_id)


def load_episode(
    dataset: SegmentationDataset,
    ids: EpisodeIds,
    side: int,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    resize: Resize = "pad",
) -> Episode:
    """Read and transform the images of an episode; every array `side` x `side`.

    With an augmentation each image gets a generator of (seed, index, slot) of its
    own, the query being slot 0; without, all are fitted as evaluation does.

    Raises:
        InputError: an image or label can't be used.
    """

    def load(slot: int, item: int):
        image = dataset.image(item)
        mask = binary_mask(dataset.label(item), ids.class_id)
        if augmentation is None:
            return fit(image, side, resize), fit_label(mask, side, resize)
        rng = generator(seed, AUGMENT, ids.index, slot)
        return augment(image, mask, side, augmentation, rng)

    query_image, query_mask = load(0, ids.query)
    images, masks = zip(
        *(load(slot, item) for slot, item in enumerate(ids.supports, start=1)),
        strict=True,
    )
    return Episode(query_image, query_mask, np.stack(images), np.stack(masks))


def training_batches(
    load: Callable[[EpisodeIds], T],
    sampler: EpisodeSampler,
    *,
    batch_size: int,
    start_step: int = 0,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Generator[T, None, None]:
    """Yield the batches from `start_step` on, without end, loaded ahead by workers.

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
    return ahead(batch, range(start_step, sys.maxsize), workers)


def ahead(
    load: Callable[[int], T], indices: range, workers: int
) -> Generator[T, None, None]:
    """Yield `load(i)` in order, computed in worker processes, or a thread if 0.

    Close the generator, if it isn't exhausted, to end its workers.
    """
    loaded = grain.MapDataset.range(indices.start, indices.stop).map(load)
    stream = loaded.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    )
    if workers:
        _mark_flags_as_parsed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=AHEAD)
        stream = stream.mp_prefetch(options, worker_init_fn=_quiet_worker)
    iterator = iter(stream)
    try:
        yield from iterator
    except InputError as error:  # Grain adds notes of its own to what workers raise.
        raise InputError(str(error)) from None
    finally:
        iterator.close()


# At module level, as what goes to a worker process is pickled.
def _load_batch(
    load: Callable[[EpisodeIds], T],
    sampler: EpisodeSampler,
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
    """Let Grain hand absl's flags to its workers in programs that don't use absl."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def _quiet_worker(worker: int, workers: int) -> None:
    """Keep OpenCV's own threads from competing with the other workers.

    Ctrl-C goes to the whole process group; what to do about it, the parent decides.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        # A parent that is killed outright can't end its workers: let the kernel do it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> Int[np.ndarray, "listed"]:
    return generator(seed, ORDER, epoch).permutation(length)


def generator(seed: int, stream: int, index: int, slot: int = 0) -> np.random.Generator:
    """Return a random generator of its own for every set of arguments.

    Philox counts in the lowest 64 bits of its 256-bit counter; the rest is ours.
    """
    return np.random.Generator(
        np.random.Philox(key=[seed, stream], counter=[0, 0, slot, index])
    )

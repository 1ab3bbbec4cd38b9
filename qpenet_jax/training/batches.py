"""Batches of training episodes: loaded, shared by the devices, augmented.

Data parallel: the devices of all processes share a batch, the rest is replicated.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import cache_folder
from qpenet_jax.core.types import Episode, SegmentationDataset
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.data.device_augmentation import augment_episodes
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler
from qpenet_jax.data.loader import (
    canvas_side,
    load_episode,
    load_raw_episode,
    training_batches,
)
from qpenet_jax.data.sources.decoded import Decoded
from qpenet_jax.models.ops.devices import BATCH_AXIS

DECODED = cache_folder("decoded")
"""Decoded training images, by data set; only what augments on the device needs them."""


def build_batches(
    config: Any,
    dataset: SegmentationDataset,
    sampler: EpisodeSampler,
    start_step: int = 0,
) -> Generator[Any, None, None]:
    """Yields this process's part of the batches from a step on, without end.

    Close the generator to end the processes that load.
    """
    return training_batches(
        training_loader(config, dataset),
        sampler,
        batch_size=config.batch_size,
        start_step=start_step,
        workers=config.workers,
        shard=(cluster.index(), cluster.count()),
    )


def on_devices(config: Any, batch: Any, split: NamedSharding) -> Episode:
    """Returns a loaded batch as the train step takes it, on its devices."""
    batch = global_batch(batch, split)
    if augments_on_device(config):
        return augment_episodes(batch, side=config.side)
    return batch


def augments_on_device(config: Any) -> bool:
    """Returns whether the device augments the training images, not the host."""
    where = config.augment_on
    return where == "device" or (where == "auto" and jax.default_backend() != "cpu")


def training_loader(
    config: Any, dataset: SegmentationDataset
) -> Callable[[EpisodeIds], Any]:
    """Returns the function that loads a training episode.

    Where the device augments, all images are decoded once into a file in DECODED. The
    host still augments images that are too large for the device; a line says how many.
    Raises InputError where the file can't be made.
    """
    augmentation = Augmentation(**config.augmentation)
    options = {"side": config.side, "augmentation": augmentation, "seed": config.seed}
    if not augments_on_device(config):
        return functools.partial(load_episode, dataset, **options)
    decoded = Decoded(dataset, DECODED)
    canvas = canvas_side(decoded.sizes, config.side)
    larger = int((decoded.sizes.max(axis=1) > canvas).sum())
    if larger:
        tqdm.write(
            f"{larger} of {len(decoded)} images are larger than {canvas} pixels: "
            "the host augments them",
            file=sys.stderr,
        )
    return functools.partial(load_raw_episode, decoded, canvas=canvas, **options)


def shardings(
    batch_size: int, accumulate: int = 1
) -> tuple[NamedSharding, NamedSharding]:
    """Returns (replicated, split over the batch) for all processes' devices.

    A step goes through `accumulate` parts of the batch, one after the other. Every
    process splits its share of a part over as many of its devices as divide that share.

    Raises:
        InputError: the processes can't have equal shares of every part.
    """
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    by_process = itertools.groupby(devices, lambda device: device.process_index)
    theirs = [list(own) for _, own in by_process]
    part, rest = divmod(batch_size, len(theirs) * accumulate)
    if rest:
        times = f" {accumulate} times" if accumulate > 1 else ""
        raise InputError(
            f"config.batch_size={batch_size} can't be shared{times} by {len(theirs)} "
            f"processes: choose a multiple of {len(theirs) * accumulate}, or start "
            "fewer processes"
        )
    most = min(len(devices) for devices in theirs)
    used = next(n for n in range(most, 0, -1) if part % n == 0)
    mesh = Mesh(np.ravel([own[:used] for own in theirs]), (BATCH_AXIS,))
    replicated, split = PartitionSpec(), PartitionSpec(BATCH_AXIS)
    return NamedSharding(mesh, replicated), NamedSharding(mesh, split)


def idle_devices(batch_size: int, accumulate: int = 1) -> str:
    """Returns a line about devices that have no part of the batch; empty if all do."""
    total, used = jax.device_count(), shardings(batch_size, accumulate)[1].mesh.size
    if used == total:
        return ""
    return (
        f"config.batch_size={batch_size} is shared by {used} of {total} devices, the "
        f"others idle: all work where it is a multiple of {total * accumulate}"
    )


def global_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Places this process's part of a batch on its devices."""
    place = jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: place(sharding, np.asarray(x)), batch)

"""How an experiment's training images become a batch: on the host or on the device."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from qpenet_jax.core.files import cache_folder
from qpenet_jax.core.types import Episode, SegmentationDataset
from qpenet_jax.data.device_augmentation import augment_episodes
from qpenet_jax.data.episodes import EpisodeIds
from qpenet_jax.data.loader import load_episode
from qpenet_jax.data.raw_episodes import canvas_side, load_raw_episode
from qpenet_jax.data.sources.decoded import Decoded
from qpenet_jax.runs.experiment import Experiment

DECODED = cache_folder("decoded")
"""Decoded training images, by data set; only what augments on the device needs them."""


def augments_on_device(experiment: Experiment) -> bool:
    """Returns whether the device augments the training images, not the host."""
    where = experiment.config.augment_on
    return where == "device" or (where == "auto" and jax.default_backend() != "cpu")


def training_loader(
    experiment: Experiment, dataset: SegmentationDataset
) -> Callable[[EpisodeIds], Any]:
    """Returns what loads a training episode; `augmented` takes a batch of them.

    For the device the images are decoded once into a file in DECODED, and those that
    the host augments all the same are told. Raises InputError where that can't be.
    """
    side = experiment.config.side
    options: dict[str, Any] = {
        "side": side,
        "augmentation": experiment.augmentation,
        "seed": experiment.config.seed,
    }
    if not augments_on_device(experiment):
        return functools.partial(load_episode, dataset, **options)
    decoded = Decoded(dataset, DECODED)
    canvas = canvas_side(decoded.sizes, side)
    larger = int((decoded.sizes.max(axis=1) > canvas).sum())
    if larger:
        tqdm.write(
            f"{larger} of {len(decoded)} images are larger than {canvas} pixels: "
            "the host augments them",
            file=sys.stderr,
        )
    return functools.partial(load_raw_episode, decoded, canvas=canvas, **options)


def augmented(experiment: Experiment, batch: Any) -> Episode:
    """Returns a batch as the train step takes it."""
    if not augments_on_device(experiment):
        return batch
    return augment_episodes(batch, side=experiment.config.side)

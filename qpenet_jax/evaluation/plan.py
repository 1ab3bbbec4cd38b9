"""Which images an evaluation encodes when, so that it keeps what it will need again.

The episodes are known before the first is loaded, so the cache is a plan: nothing is
looked up while it runs, and images that are in the cache aren't even decoded.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from qpenet_jax.data.episodes import EpisodeIds


class Turn(NamedTuple):
    """An episode, the images to encode before it and those to forget after it."""

    ids: EpisodeIds
    load: tuple[int, ...]
    drop: tuple[int, ...]


def grouped(episodes: Sequence[EpisodeIds]) -> list[int]:
    """Returns the episodes' positions in an order in which neighbours share images.

    Episodes of a class draw from the same supports, and those of a query share it.
    """

    def images(position: int) -> tuple[int, int]:
        return episodes[position].class_id, episodes[position].query

    return sorted(range(len(episodes)), key=images)


def plan(episodes: Sequence[EpisodeIds], capacity: int) -> list[Turn]:
    """Returns what to load and to drop around each episode, run in this order.

    Between two episodes `capacity` images stay, those that were used last; during one
    its own are there as well. With 0 every episode loads all of its images.
    """
    kept: dict[int, None] = {}  # in the order of their last use
    turns = []
    for ids in episodes:
        images = tuple(dict.fromkeys((ids.query, *ids.supports)))
        load = tuple(image for image in images if image not in kept)
        for image in images:
            kept.pop(image, None)
            kept[image] = None
        drop = tuple(itertools.islice(kept, max(len(kept) - capacity, 0)))
        for image in drop:
            del kept[image]
        turns.append(Turn(ids, load, drop))
    return turns

"""Episode i is a pure function of (data set, seed, i): which images make it up.

Random numbers come from the counter-based generator Philox, with the seed in its key
and the episode's index in its counter. So workers, hosts and restarts can't change
what episode i is, and resuming at step t is to start counting there.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from qpenet_jax.core.choices import Order, Targets
from qpenet_jax.core.errors import InputError

MIN_PIXELS = 2 * 32 * 32
"""An image counts for a class that covers at least 2048 pixels of its label."""

ORDER_STREAM, DRAW_STREAM, AUGMENT_STREAM = range(3)
"""Independent streams of one seed: order of the queries, episodes, augmentation."""


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
    """Returns which images may show which of `classes` (ids; the columns' order).

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
        """Checks now that every episode can be drawn."""
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
        """Returns the number of listed images: the length of an epoch."""
        return len(self.images)

    def __call__(self, index: int) -> EpisodeIds:
        """Returns episode `index`, any integer from 0 on."""
        rng = generator(self.seed, DRAW_STREAM, index)
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
        """Returns the query of an episode and the column of its class."""
        if self.order == "pairs":
            query, column = self._listed_pairs[index % len(self._listed_pairs)]
        elif self.order == "classes":
            column = rng.choice(np.flatnonzero(self.pairs.any(axis=0)))
            query = rng.choice(self._members[column])
        else:
            epoch, position = divmod(index, len(self))
            if self.order == "shuffled":
                position = _order(self.seed, epoch, len(self))[position]
            query = int(self.images[position])
            column = rng.choice(np.flatnonzero(self._targets(query)))
        return int(query), int(column)

    def _targets(self, query: int) -> Bool[np.ndarray, " chosen"]:
        """Returns the classes that an image may be query for."""
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


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> Int[np.ndarray, "listed"]:
    return generator(seed, ORDER_STREAM, epoch).permutation(length)


def generator(seed: int, stream: int, index: int, slot: int = 0) -> np.random.Generator:
    """Returns a random generator of its own for every set of arguments.

    Philox counts in the lowest 64 bits of its 256-bit counter; the rest is ours.
    """
    return np.random.Generator(
        np.random.Philox(key=[seed, stream], counter=[0, 0, slot, index])
    )

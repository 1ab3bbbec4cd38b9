"""Predictions on the episodes of a protocol, scored at the protocol's size."""

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree, UInt8
from tqdm import tqdm

from qpenet_jax.core import cluster
from qpenet_jax.core.choices import Resize
from qpenet_jax.core.types import Array, SegmentationDataset
from qpenet_jax.data.episode_lists import FrozenEpisodes
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler
from qpenet_jax.data.loader import prefetched
from qpenet_jax.data.transforms import (
    binary_mask,
    fit,
    fit_label,
    padding,
    unpad,
)
from qpenet_jax.evaluation import metrics
from qpenet_jax.evaluation.metrics import Scores
from qpenet_jax.evaluation.predictor import Margin, Predictor
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.models.ops import interpolation_matrix

Samplers = Sequence[EpisodeSampler] | Sequence[FrozenEpisodes]

T = TypeVar("T")

CACHE_BYTES = 2 * 2**30
"""Of encoded images, kept on each device: 290 of ResNet's at 473 pixels, where a class
of PASCAL has about 100."""

AT_ONCE = collections.defaultdict(lambda: 4, cpu=1)
"""Episodes that are predicted together, by the kind of device; what a GPU or TPU gains
by it hasn't been measured."""


def score_episodes(
    predict: Predictor,
    dataset: SegmentationDataset,
    protocol: Protocol,
    samplers: Samplers,
    *,
    workers: int = 0,
    label: str = "evaluating",
    cache_bytes: int = CACHE_BYTES,
    stop_asked: Callable[[], bool] = lambda: False,
    at_once: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Scores:
    """Scores `predict` on the protocol's episodes, one sampler a seed.

    An image is encoded once for all episodes as far as `cache_bytes` allow, which
    changes no bit of a result: 0 encodes the same images one by one, again and again.
    Episodes run ordered by class and query, so that neighbours share images; the rows
    are in the protocol's order. `at_once` of them are predicted together, by default
    as AT_ONCE says. Together they may round otherwise, so that a pixel changes where
    both classes tie. Several processes share the episodes, and in each its `devices`,
    by default all but on a CPU, whose cores one device uses; all processes return all
    rows.

    Raises:
        InputError: an image or label can't be used.
        KeyboardInterrupt: `stop_asked` returns True in any process.
    """
    episodes = [(s.seed, s(i)) for s in samplers for i in range(protocol.episodes)]
    kind = jax.default_backend()
    at_once = at_once or AT_ONCE[kind]
    devices = devices or jax.local_devices()[: 1 if kind == "cpu" else None]
    room = cache_bytes // _image_bytes(predict, protocol)
    capacity = max(room - at_once * (len(episodes[0][1].supports) + 1), 0)
    groups = groups_of([ids for _, ids in episodes], at_once, capacity, len(devices))
    moved = [predict]
    if len(devices) > 1:
        moved = [jax.device_put(predict, device) for device in devices]
    predictors = [CachedPredictor(each, capacity, at_once) for each in moved]
    load = functools.partial(_load, dataset, groups, protocol.side, protocol.resize)
    stream = prefetched(load, range(len(groups)), workers)
    count = sum(len(group.positions) for group in groups)
    silent = not cluster.is_first()
    bar = tqdm(total=count, desc=label, unit="episode", disable=silent)
    rows = np.zeros((len(episodes), len(metrics.SCORE_COLUMNS)), np.int64)
    with contextlib.closing(stream), bar:
        for n, margin, fitted, mask in _margins(predictors, groups, stream):
            seed, ids = episodes[n]
            counts = score(margin, fitted, mask, protocol)
            rows[n] = (seed, ids.index, ids.query, ids.class_id, *counts)
            bar.update()
            if stop_asked():
                break
    if cluster.any_of(stop_asked()):
        raise KeyboardInterrupt("stopped: the same command goes on")
    # Each process has zeros where others worked.
    parts = [np.frombuffer(p, rows.dtype) for p in cluster.gather(rows.tobytes())]
    return Scores(np.sum(parts, axis=0).reshape(rows.shape))


def _margins(
    predictors: Sequence["CachedPredictor"],
    groups: Sequence["Group"],
    stream: Iterable["GroupInputs"],
) -> Iterator[tuple[int, Float[np.ndarray, "s s"], Any, Any]]:
    """Yields of each episode its position, the margin, and the query's two masks.

    All devices compute before the first is waited for.
    """
    started: collections.deque = collections.deque()
    for group, inputs in zip(groups, stream, strict=True):
        margins = predictors[group.device](group, inputs)
        started.append((group.positions, margins, inputs.fitted_masks, inputs.masks))
        if len(started) == len(predictors):
            yield from _each(*started.popleft())
    for waiting in started:
        yield from _each(*waiting)


def _each(positions, margins, fitted_masks, masks):
    """Returns what belongs to each episode, once the device has computed it."""
    return zip(positions, np.asarray(margins), fitted_masks, masks, strict=True)


def _image_bytes(predict: Predictor, protocol: Protocol) -> int:
    """Returns how much memory an encoded image takes."""
    square = (1, protocol.side, protocol.side)
    image = jax.ShapeDtypeStruct((*square, 3), np.uint8)
    beside = jax.ShapeDtypeStruct(square, np.bool_)
    leaves = jax.tree.leaves(jax.eval_shape(predict.encode, image, padding=beside))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


class Group(NamedTuple):
    """Episodes that one device predicts together, by their positions among all.

    `missing` are the images that are to be encoded then, as the cache lacks them.
    """

    device: int
    positions: list[int]
    episodes: list[EpisodeIds]
    missing: list[int]

    @property
    def images(self) -> list[int]:
        """All images of the episodes, each once."""
        all_of_them = ((ids.query, *ids.supports) for ids in self.episodes)
        return list(dict.fromkeys(itertools.chain.from_iterable(all_of_them)))


def groups_of(
    episodes: Sequence[EpisodeIds], at_once: int, capacity: int, devices: int = 1
) -> list[Group]:
    """Returns what the devices of this process predict, group by group.

    Episodes are ordered by class and query, so that neighbours share images. Every
    process takes a part of them, and in it every device; devices take turns.
    """
    order = sorted(
        range(len(episodes)),
        key=lambda n: (episodes[n].class_id, episodes[n].query),
    )
    own = np.array_split(np.array(order), cluster.count())[cluster.index()]
    parts = [
        _groups_of_device(episodes, device, part.tolist(), at_once, capacity)
        for device, part in enumerate(np.array_split(own, devices))
    ]
    turns = itertools.zip_longest(*parts)
    return [group for turn in turns for group in turn if group is not None]


def _groups_of_device(episodes, device, positions, at_once, capacity) -> list[Group]:
    """Returns the groups of one device, of whose cache the numbers alone are kept."""
    cache: dict[int, None] = {}
    groups = []
    for start in range(0, len(positions), at_once):
        some = positions[start : start + at_once]
        group = Group(device, some, [episodes[n] for n in some], [])
        group.missing.extend(image for image in group.images if image not in cache)
        keep_latest(cache, dict.fromkeys(group.images), capacity)
        groups.append(group)
    return groups


def keep_latest(cache: dict[int, T], used: Mapping[int, T], capacity: int) -> None:
    """Adds to an LRU cache what was used just now, and drops what it has no room for.

    The cache is in the order of last use.
    """
    for image in used:
        cache.pop(image, None)
    cache.update(used)
    for image in [*itertools.islice(cache, max(len(cache) - capacity, 0))]:
        del cache[image]


class GroupInputs(NamedTuple):
    """What a group needs from files: the images that are missing, and masks.

    `padding` says where the images' squares hold no photo. `fitted_masks` are the
    queries' as the network's input has them, `masks` at their own sizes.
    """

    images: list[UInt8[np.ndarray, "s s 3"]]
    padding: list[Bool[np.ndarray, "s s"]]
    support_masks: UInt8[np.ndarray, "b k s s"]
    fitted_masks: list[UInt8[np.ndarray, "s s"]]
    masks: list[UInt8[np.ndarray, "h w"]]


# At module level, as what goes to a worker process is pickled.
def _load(
    dataset: SegmentationDataset,
    groups: Sequence[Group],
    side: int,
    resize: Resize,
    position: int,
) -> GroupInputs:
    group = groups[position]

    def mask_of(image: int, ids: EpisodeIds) -> UInt8[np.ndarray, "h w"]:
        return binary_mask(dataset.label(image), ids.class_id)

    masks = [mask_of(ids.query, ids) for ids in group.episodes]
    supports = [
        [fit_label(mask_of(image, ids), side, resize) for image in ids.supports]
        for ids in group.episodes
    ]
    photos = [dataset.image(image) for image in group.missing]
    return GroupInputs(
        images=[fit(photo, side, resize) for photo in photos],
        padding=[
            padding(photo.shape[0], photo.shape[1], side, resize) for photo in photos
        ],
        support_masks=np.array(supports),
        fitted_masks=[fit_label(mask, side, resize) for mask in masks],
        masks=masks,
    )


class CachedPredictor:
    """A predictor on one device, with the images that it has encoded last."""

    def __init__(self, predict: Predictor, capacity: int, at_once: int):
        self.predict, self.capacity, self.at_once = predict, capacity, at_once
        self._cache: dict[int, PyTree[Array]] = {}

    def __call__(self, group: Group, inputs: GroupInputs) -> Margin:
        """Returns the margins of a group, which the device may still compute."""
        encoded = self._cache | self._encoded(group.missing, inputs)
        used = {image: encoded[image] for image in group.images}
        supports = tuple(
            _joined([used[image] for image in images])
            for images in zip(*(ids.supports for ids in group.episodes), strict=True)
        )
        query = _joined([used[ids.query] for ids in group.episodes])
        keep_latest(self._cache, used, self.capacity)
        return self.predict.decode(supports, inputs.support_masks, query)

    def _encoded(self, images: Sequence[int], inputs: GroupInputs) -> dict[int, Any]:
        """Returns images, encoded in batches of `at_once`, whatever their own number.

        Every other size would be compiled anew.
        """
        encoded, count = {}, self.at_once
        for start in range(0, len(images), count):
            part = slice(start, start + count)
            pixels, padding = (
                np.stack([*each[part], *each[-1:] * (count - len(each[part]))])
                for each in (inputs.images, inputs.padding)
            )
            batch = self.predict.encode(pixels, padding=padding)
            each = [batch] if count == 1 else _apart(batch, count)
            # Without what filled the batch.
            encoded |= zip(images[part], each, strict=False)
        return encoded


@functools.partial(jax.jit, static_argnums=1)
def _apart(tree, count):
    def one(i):
        return jax.tree.map(lambda leaf: leaf[i : i + 1], tree)

    return [one(i) for i in range(count)]


def _joined(trees: Sequence[PyTree[Array]]) -> PyTree[Array]:
    return trees[0] if len(trees) == 1 else _concatenated(*trees)


@jax.jit
def _concatenated(*trees):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def score(
    margin: Float[np.ndarray, "s s"],
    fitted_mask: UInt8[np.ndarray, "s s"],
    mask: UInt8[np.ndarray, "h w"],
    protocol: Protocol,
) -> tuple[int, int, int, int]:
    """Returns the pixel counts of one episode at the protocol's size."""
    if protocol.scoring == "input":
        return metrics.count_pixels(margin > 0, fitted_mask)
    height, width = mask.shape
    if protocol.scoring == "exact" or protocol.resize == "squash":
        found = unpad(margin, height, width, protocol.resize) > 0
        return metrics.count_pixels(found, mask)
    stretch = interpolation_matrix(margin.shape[0], max(height, width))
    return metrics.count_pixels(stretch[:height] @ margin @ stretch[:width].T > 0, mask)

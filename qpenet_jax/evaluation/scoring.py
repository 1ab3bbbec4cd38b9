"""Predictions on the episodes of a protocol, scored at the protocol's size."""

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
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

CACHE_BYTES = 2 * 2**30
"""Of encoded images, kept on each device: 290 of ResNet's at 473 pixels, where a class
of PASCAL has about 100."""


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
    devices: Sequence[Any] | None = None,
) -> Scores:
    """Scores `predict` on the protocol's episodes, one sampler a seed.

    An image is encoded once for all episodes as far as `cache_bytes` allow, which
    changes no bit of a result: 0 encodes the same images again and again. Episodes run
    ordered by class and query, so that neighbours share images; the rows are in the
    protocol's order. Several processes share the episodes, and in each its `devices`,
    by default all but on a CPU, whose cores one device uses; all processes return all
    rows.

    Raises:
        InputError: an image or label can't be used.
        KeyboardInterrupt: `stop_asked` returns True in any process.
    """
    episodes = [(s.seed, s(i)) for s in samplers for i in range(protocol.episodes)]
    on_cpu = jax.default_backend() == "cpu"
    devices = devices or jax.local_devices()[: 1 if on_cpu else None]
    room = cache_bytes // _image_bytes(predict, protocol)
    capacity = max(room - (len(episodes[0][1].supports) + 1), 0)
    plan = plan_episodes([ids for _, ids in episodes], capacity, len(devices))
    moved = [predict]
    if len(devices) > 1:
        moved = [jax.device_put(predict, device) for device in devices]
    predictors = [functools.partial(_predict, each, {}) for each in moved]
    load = functools.partial(_load, dataset, plan, protocol.side, protocol.resize)
    stream = prefetched(load, range(len(plan)), workers)
    silent = not cluster.is_first()
    bar = tqdm(total=len(plan), desc=label, unit="episode", disable=silent)
    rows = np.zeros((len(episodes), len(metrics.SCORE_COLUMNS)), np.int64)
    with contextlib.closing(stream), bar:
        for n, inputs, margin in _margins(predictors, plan, stream):
            seed, ids = episodes[n]
            found = np.asarray(margin)[0]
            counts = score(found, inputs.fitted_mask, inputs.mask, protocol)
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
    predictors: Sequence[Callable[..., Margin]],
    plan: Sequence["PlannedEpisode"],
    stream: Iterable["EpisodeInputs"],
) -> Iterator[tuple[int, "EpisodeInputs", Margin]]:
    """Yields the position of each episode, its inputs and its margin.

    All devices compute before the first is waited for.
    """
    started: collections.deque = collections.deque()
    for planned, inputs in zip(plan, stream, strict=True):
        margin = predictors[planned.device](planned, inputs)
        started.append((planned.position, inputs, margin))
        if len(started) == len(predictors):
            yield started.popleft()
    yield from started


def _image_bytes(predict: Predictor, protocol: Protocol) -> int:
    """Returns how much memory an encoded image takes."""
    square = (1, protocol.side, protocol.side)
    image = jax.ShapeDtypeStruct((*square, 3), np.uint8)
    beside = jax.ShapeDtypeStruct(square, np.bool_)
    leaves = jax.tree.leaves(jax.eval_shape(predict.encode, image, padding=beside))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


class PlannedEpisode(NamedTuple):
    """An episode, its position among all, and the device that predicts it.

    `missing` are the images that are to be encoded then, as the cache lacks them;
    `dropped` those that it has no room for afterwards.
    """

    device: int
    position: int
    ids: EpisodeIds
    missing: list[int]
    dropped: list[int]


def plan_episodes(
    episodes: Sequence[EpisodeIds], capacity: int, devices: int = 1
) -> list[PlannedEpisode]:
    """Returns what the devices of this process predict, in this order.

    Episodes are ordered by class and query, so that neighbours share images. Every
    process takes a part of them, and in it every device, which caches `capacity`
    images; devices take turns.
    """
    order = sorted(
        range(len(episodes)),
        key=lambda n: (episodes[n].class_id, episodes[n].query),
    )
    own = np.array_split(np.array(order), cluster.count())[cluster.index()]
    parts = []
    for device, positions in enumerate(np.array_split(own, devices)):
        cache: collections.OrderedDict[int, None] = collections.OrderedDict()
        part = []
        for n in positions.tolist():
            images = dict.fromkeys((episodes[n].query, *episodes[n].supports))
            missing = [image for image in images if image not in cache]
            for image in images:  # in the order of last use
                cache[image] = None
                cache.move_to_end(image)
            beyond = range(len(cache) - capacity)
            dropped = [cache.popitem(last=False)[0] for _ in beyond]
            part.append(PlannedEpisode(device, n, episodes[n], missing, dropped))
        parts.append(part)
    turns = itertools.zip_longest(*parts)
    return [planned for turn in turns for planned in turn if planned is not None]


class EpisodeInputs(NamedTuple):
    """What an episode needs from files: the images that are missing, and masks.

    `padding` says where the images' squares hold no photo. `fitted_mask` is the
    query's as the network's input has it, `mask` at its own size.
    """

    images: list[UInt8[np.ndarray, "s s 3"]]
    padding: list[Bool[np.ndarray, "s s"]]
    support_masks: UInt8[np.ndarray, "1 k s s"]
    fitted_mask: UInt8[np.ndarray, "s s"]
    mask: UInt8[np.ndarray, "h w"]


# At module level, as what goes to a worker process is pickled.
def _load(
    dataset: SegmentationDataset,
    plan: Sequence[PlannedEpisode],
    side: int,
    resize: Resize,
    place: int,
) -> EpisodeInputs:
    ids, missing = plan[place].ids, plan[place].missing
    mask, *of_supports = (
        binary_mask(dataset.label(image), ids.class_id)
        for image in (ids.query, *ids.supports)
    )
    photos = [dataset.image(image) for image in missing]
    return EpisodeInputs(
        images=[fit(photo, side, resize) for photo in photos],
        padding=[
            padding(photo.shape[0], photo.shape[1], side, resize) for photo in photos
        ],
        support_masks=np.array([[fit_label(m, side, resize) for m in of_supports]]),
        fitted_mask=fit_label(mask, side, resize),
        mask=mask,
    )


def _predict(
    predict: Predictor,
    cache: dict[int, PyTree[Array]],
    planned: PlannedEpisode,
    inputs: EpisodeInputs,
) -> Margin:
    """Returns the margin of an episode, which the device may still compute.

    `cache` holds the images that the device has encoded last, by their number.
    """
    new = zip(planned.missing, inputs.images, inputs.padding, strict=True)
    for image, pixels, beside in new:
        cache[image] = predict.encode(pixels[None], padding=beside[None])
    query, *supports = (cache[i] for i in (planned.ids.query, *planned.ids.supports))
    for image in planned.dropped:
        del cache[image]
    return predict.decode(tuple(supports), inputs.support_masks, query)


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

"""Score predictions on the episodes of a protocol, at the protocol's size."""

import contextlib
import functools
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.episode_lists import FrozenEpisodes
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler
from qpenet_jax.data.loader import ahead
from qpenet_jax.data.transforms import (
    Resize,
    binary_mask,
    fit,
    fit_label,
    padding,
    unpad,
)
from qpenet_jax.evaluation import metrics
from qpenet_jax.evaluation.metrics import Scores
from qpenet_jax.evaluation.plan import Turn, grouped, plan
from qpenet_jax.evaluation.predictor import Predictor
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.models.ops import interpolation_matrix

Samplers = Sequence[EpisodeSampler] | Sequence[FrozenEpisodes]

CACHE_BYTES = 2 * 2**30
"""Of encoded images, kept on the device: 290 of ResNet's at 473 pixels, where a class
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
) -> Scores:
    """Score `predict` on the protocol's episodes, one sampler a seed.

    An image is encoded once for all episodes as far as `cache_bytes` allow, which
    changes no bit of a result: 0 encodes the same images one by one, again and again.
    Episodes run grouped by class and query; the rows are in the protocol's order.

    Raises:
        InputError: an image or label can't be used.
    """
    drawn = [(s.seed, s(i)) for s in samplers for i in range(protocol.episodes)]
    order = grouped([ids for _, ids in drawn])
    episodes = [drawn[n][1] for n in order]
    turns = plan(episodes, _capacity(predict, protocol, episodes[0], cache_bytes))
    rows = np.zeros((len(drawn), len(metrics.SCORE_COLUMNS)), np.int64)
    stream = _loaded(dataset, turns, protocol, workers)
    bar = tqdm(total=len(drawn), desc=label, unit="episode")
    with contextlib.closing(stream), bar:
        for n, (margin, inputs) in zip(
            order, _margins(predict, turns, stream), strict=True
        ):
            counts = score(margin, inputs.fitted_mask, inputs.mask, protocol)
            seed, ids = drawn[n]
            rows[n] = (seed, ids.index, ids.query, ids.class_id, *counts)
            bar.update()
    return Scores(rows)


def _capacity(
    predict: Predictor, protocol: Protocol, ids: EpisodeIds, cache_bytes: int
) -> int:
    """Return how many images fit beside those of the episode that is running."""
    shape = (1, protocol.side, protocol.side, 3)
    image = jax.ShapeDtypeStruct(shape, np.uint8)
    leaves = jax.tree.leaves(jax.eval_shape(predict.encode, image))
    image_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return max(cache_bytes // image_bytes - len(ids.supports) - 1, 0)


class Inputs(NamedTuple):
    """What an episode needs from files: the images that aren't encoded yet, masks.

    `padding` says where the images' squares hold no photo.
    `fitted_mask` is the query's as the network's input has it, `mask` at its own size.
    """

    images: list[UInt8[np.ndarray, "s s 3"]]
    padding: list[Bool[np.ndarray, "s s"]]
    support_masks: UInt8[np.ndarray, "k s s"]
    fitted_mask: UInt8[np.ndarray, "s s"]
    mask: UInt8[np.ndarray, "h w"]


def _margins(
    predict: Predictor, turns: Sequence[Turn], stream: Iterable[Inputs]
) -> Generator[tuple[Float[np.ndarray, "s s"], Inputs], None, None]:
    """Yield the foreground's lead in every turn's episode; keep encoded images."""
    kept = {}
    for (ids, load, drop), inputs in zip(turns, stream, strict=True):
        for image, pixels, padded in zip(
            load, inputs.images, inputs.padding, strict=True
        ):
            kept[image] = predict.encode(pixels[None], padding=padded[None])
        supports = tuple(kept[image] for image in ids.supports)
        margin = predict.decode(supports, inputs.support_masks[None], kept[ids.query])
        for image in drop:
            del kept[image]
        yield np.asarray(margin)[0], inputs


def _loaded(
    dataset: SegmentationDataset,
    turns: Sequence[Turn],
    protocol: Protocol,
    workers: int,
) -> Generator[Inputs, None, None]:
    """Yield the inputs of every turn, loaded ahead by workers, or a thread if 0."""
    side, resize = protocol.side, protocol.resize
    load = functools.partial(_load, dataset, turns, side, resize)
    return ahead(load, range(len(turns)), workers)


# At module level, as what goes to a worker process is pickled.
def _load(
    dataset: SegmentationDataset,
    turns: Sequence[Turn],
    side: int,
    resize: Resize,
    position: int,
) -> Inputs:
    ids, images, _ = turns[position]

    def mask_of(image: int) -> UInt8[np.ndarray, "h w"]:
        return binary_mask(dataset.label(image), ids.class_id)

    mask = mask_of(ids.query)
    masks = [fit_label(mask_of(image), side, resize) for image in ids.supports]
    photos = [dataset.image(image) for image in images]
    return Inputs(
        images=[fit(photo, side, resize) for photo in photos],
        padding=[
            padding(photo.shape[0], photo.shape[1], side, resize) for photo in photos
        ],
        support_masks=np.stack(masks),
        fitted_mask=fit_label(mask, side, resize),
        mask=mask,
    )


def score(
    margin: Float[np.ndarray, "s s"],
    fitted_mask: UInt8[np.ndarray, "s s"],
    mask: UInt8[np.ndarray, "h w"],
    protocol: Protocol,
) -> tuple[int, int, int, int]:
    """Return the pixel counts of one episode at the protocol's size."""
    if protocol.scoring == "input":
        return metrics.count_pixels(margin > 0, fitted_mask)
    height, width = mask.shape
    if protocol.scoring == "exact" or protocol.resize == "squash":
        found = unpad(margin, height, width, protocol.resize) > 0
        return metrics.count_pixels(found, mask)
    stretch = interpolation_matrix(margin.shape[0], max(height, width))
    return metrics.count_pixels(stretch[:height] @ margin @ stretch[:width].T > 0, mask)

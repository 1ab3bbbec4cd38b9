"""Score predictions on the episodes of a protocol, at the protocol's size."""

import contextlib
import functools
import itertools
from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree, UInt8
from tqdm import tqdm

from qpenet_jax.core.types import Array, SegmentationDataset
from qpenet_jax.data.episode_lists import FrozenEpisodes
from qpenet_jax.data.episodes import EpisodeSampler
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
    at_once: int | None = None,
) -> Scores:
    """Score `predict` on the protocol's episodes, one sampler a seed.

    An image is encoded once for all episodes as far as `cache_bytes` allow, which
    changes no bit of a result: 0 encodes the same images one by one, again and again.
    Episodes run grouped by class and query; the rows are in the protocol's order.
    `at_once` of them are predicted together, by default one on a CPU, else AT_ONCE.
    Together they may round otherwise, so that a pixel changes where both classes tie.

    Raises:
        InputError: an image or label can't be used.
    """
    drawn = [(s.seed, s(i)) for s in samplers for i in range(protocol.episodes)]
    order = grouped([ids for _, ids in drawn])
    episodes = [drawn[n][1] for n in order]
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else AT_ONCE
    room = cache_bytes // _image_bytes(predict, protocol)
    running = at_once * (len(episodes[0].supports) + 1)
    turns = plan(episodes, max(room - running, 0))
    rows = np.zeros((len(drawn), len(metrics.SCORE_COLUMNS)), np.int64)
    stream = _loaded(dataset, turns, protocol, workers)
    bar = tqdm(total=len(drawn), desc=label, unit="episode")
    with contextlib.closing(stream), bar:
        for n, (margin, inputs) in zip(
            order, _margins(predict, turns, stream, at_once), strict=True
        ):
            counts = score(margin, inputs.fitted_mask, inputs.mask, protocol)
            seed, ids = drawn[n]
            rows[n] = (seed, ids.index, ids.query, ids.class_id, *counts)
            bar.update()
    return Scores(rows)


AT_ONCE = 4
"""Episodes that a GPU or TPU predicts together; its gain hasn't been measured."""


def _image_bytes(predict: Predictor, protocol: Protocol) -> int:
    """Return how much memory an encoded image takes."""
    shape = (1, protocol.side, protocol.side, 3)
    image = jax.ShapeDtypeStruct(shape, np.uint8)
    leaves = jax.tree.leaves(jax.eval_shape(predict.encode, image))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


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
    predict: Predictor, turns: Sequence[Turn], stream: Iterable[Inputs], at_once: int
) -> Generator[tuple[Float[np.ndarray, "s s"], Inputs], None, None]:
    """Yield the foreground's lead in every turn's episode; keep encoded images."""
    kept = {}
    pairs = zip(turns, stream, strict=True)
    while group := list(itertools.islice(pairs, at_once)):
        new = _unseen(group, kept)
        for start in range(0, len(new), at_once):
            some = dict(itertools.islice(new.items(), start, start + at_once))
            kept |= _encoded(predict, some, at_once)
        ids = [turn.ids for turn, _ in group]
        supports = tuple(
            _joined([kept[image] for image in images])
            for images in zip(*(episode.supports for episode in ids), strict=True)
        )
        masks = np.stack([inputs.support_masks for _, inputs in group])
        query = _joined([kept[episode.query] for episode in ids])
        margins = np.asarray(predict.decode(supports, masks, query))
        for image in _forgotten([turn for turn, _ in group]):
            del kept[image]
        yield from zip(margins, [inputs for _, inputs in group], strict=True)


def _unseen(
    group: Iterable[tuple[Turn, Inputs]], kept: Container[int]
) -> dict[int, tuple[Any, Any]]:
    """Return image and padding of what the turns load and isn't kept, each once."""
    return {
        image: (pixels, padded)
        for turn, inputs in group
        for image, pixels, padded in zip(
            turn.load, inputs.images, inputs.padding, strict=True
        )
        if image not in kept
    }


def _forgotten(turns: Iterable[Turn]) -> set[int]:
    """Return what is dropped in some turns and not loaded again in later ones."""
    dropped: set[int] = set()
    for turn in turns:
        dropped = dropped.difference(turn.load).union(turn.drop)
    return dropped


def _encoded(
    predict: Predictor, images: Mapping[int, tuple[Any, Any]], count: int
) -> dict[int, PyTree[Array]]:
    """Return images, encoded in one batch of `count`, whatever their own number.

    Every other size would be compiled anew.
    """
    pairs = [*images.values()]
    pairs += pairs[-1:] * (count - len(pairs))
    pixels, padding = (np.stack(each) for each in zip(*pairs, strict=True))
    encoded = predict.encode(pixels, padding=padding)
    each = [encoded] if count == 1 else _apart(encoded, count)
    return dict(zip(images, each, strict=False))  # without what filled the batch


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

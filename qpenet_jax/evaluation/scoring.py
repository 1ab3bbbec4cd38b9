"""Score predictions on the episodes of a protocol, at the protocol's size."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree, UInt8
from tqdm import tqdm

from qpenet_jax.core import cluster
from qpenet_jax.core.types import Array, SegmentationDataset
from qpenet_jax.data.episode_lists import FrozenEpisodes
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler
from qpenet_jax.data.transforms import unpad
from qpenet_jax.evaluation import metrics
from qpenet_jax.evaluation.inputs import Inputs, loaded
from qpenet_jax.evaluation.metrics import Scores
from qpenet_jax.evaluation.plan import Turn, grouped, plan
from qpenet_jax.evaluation.predictor import Margin, Predictor
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.models.ops import interpolation_matrix

Samplers = Sequence[EpisodeSampler] | Sequence[FrozenEpisodes]

T = TypeVar("T")

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
    at_once: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Scores:
    """Scores `predict` on the protocol's episodes, one sampler a seed.

    An image is encoded once for all episodes as far as `cache_bytes` allow, which
    changes no bit of a result: 0 encodes the same images one by one, again and again.
    Episodes run grouped by class and query; the rows are in the protocol's order.
    `at_once` of them are predicted together, by default one on a CPU, else AT_ONCE.
    Together they may round otherwise, so that a pixel changes where both classes tie.
    Several processes share the episodes, and in each its `devices`, by default all but
    on a CPU, whose cores one device uses; all processes return all rows.

    Raises:
        InputError: an image or label can't be used.
        KeyboardInterrupt: `stop_asked` says so, in any process.
    """
    drawn = [(s.seed, s(i)) for s in samplers for i in range(protocol.episodes)]
    order = grouped([ids for _, ids in drawn])
    episodes = [drawn[n][1] for n in order]
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else AT_ONCE
    room = cache_bytes // _image_bytes(predict, protocol)
    capacity = max(room - at_once * (len(episodes[0].supports) + 1), 0)
    if devices is None:
        all_of_them = jax.default_backend() != "cpu"
        devices = jax.local_devices()[: None if all_of_them else 1]
    shares = _shares(predict, drawn, order, capacity, devices)
    rows = np.zeros((len(drawn), len(metrics.SCORE_COLUMNS)), np.int64)
    turns = _in_turn([share.turns for share in shares], at_once)
    positions = _in_turn([share.positions for share in shares], at_once)
    stream = loaded(dataset, turns, protocol, workers)
    silent = not cluster.is_first()
    bar = tqdm(total=len(turns), desc=label, unit="episode", disable=silent)
    with contextlib.closing(stream), bar:
        for n, (margin, inputs) in zip(
            positions, _margins(shares, stream, at_once), strict=True
        ):
            counts = score(margin, inputs.fitted_mask, inputs.mask, protocol)
            seed, ids = drawn[n]
            rows[n] = (seed, ids.index, ids.query, ids.class_id, *counts)
            bar.update()
            if stop_asked():
                break
    if cluster.any_of(stop_asked()):
        raise KeyboardInterrupt("stopped: the same command goes on")
    return Scores(_of_all_processes(rows))


def _of_all_processes(rows: Int[np.ndarray, "n c"]) -> Int[np.ndarray, "n c"]:
    """Returns the rows of all processes, each of which has zeros where others worked."""
    parts = cluster.gather(rows.tobytes())
    return np.sum([np.frombuffer(part, rows.dtype) for part in parts], 0).reshape(
        rows.shape
    )


AT_ONCE = 4
"""Episodes that a GPU or TPU predicts together; its gain hasn't been measured."""


def _image_bytes(predict: Predictor, protocol: Protocol) -> int:
    """Returns how much memory an encoded image takes."""
    shape = (1, protocol.side, protocol.side, 3)
    image = jax.ShapeDtypeStruct(shape, np.uint8)
    leaves = jax.tree.leaves(jax.eval_shape(predict.encode, image))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


class Share(NamedTuple):
    """The episodes of one device: their positions among those that were drawn."""

    predict: Predictor
    positions: list[int]
    turns: list[Turn]


def _shares(
    predict: Predictor,
    drawn: Sequence[tuple[int, EpisodeIds]],
    order: Sequence[int],
    capacity: int,
    devices: Sequence[Any],
) -> list[Share]:
    """Returns what this process' devices predict; neighbours in the order stay such."""
    ours = np.array_split(np.array(order), cluster.count())[cluster.index()]
    parts = [part.tolist() for part in np.array_split(ours, len(devices))]
    return [
        Share(
            predict if len(devices) == 1 else jax.device_put(predict, device),
            part,
            plan([drawn[n][1] for n in part], capacity),
        )
        for device, part in zip(devices, parts, strict=True)
    ]


def _in_turn(parts: Sequence[Sequence[T]], size: int) -> list[T]:
    """Returns the elements of all parts, so many of each in turn."""
    longest = max(map(len, parts))
    return [
        element
        for start in range(0, longest, size)
        for part in parts
        for element in part[start : start + size]
    ]


def _margins(
    shares: Sequence[Share], stream: Iterable[Inputs], at_once: int
) -> Generator[tuple[Float[np.ndarray, "s s"], Inputs], None, None]:
    """Yields the margin in every turn's episode, in turn as `_in_turn` says.

    Encoded images are kept. All devices begin before the first is waited for.
    """
    stream, caches = iter(stream), [{} for _ in shares]
    longest = max(len(share.turns) for share in shares)
    for start in range(0, longest, at_once):
        begun = []
        for share, kept in zip(shares, caches, strict=True):
            turns = share.turns[start : start + at_once]
            # In this order: it takes no more from the stream than there are turns.
            if group := [*zip(turns, stream, strict=False)]:
                begun.append((_begun(share.predict, group, kept, at_once), group))
        for margins, group in begun:
            inputs = [inputs for _, inputs in group]
            yield from zip(np.asarray(margins), inputs, strict=True)


def _begun(
    predict: Predictor,
    group: Sequence[tuple[Turn, Inputs]],
    kept: dict[int, PyTree[Array]],
    at_once: int,
) -> Margin:
    """Returns the margins of some turns, which the device may still compute."""
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
    margin = predict.decode(supports, masks, query)
    for image in _forgotten([turn for turn, _ in group]):
        del kept[image]
    return margin


def _unseen(
    group: Iterable[tuple[Turn, Inputs]], kept: Container[int]
) -> dict[int, tuple[Any, Any]]:
    """Returns image and padding of what the turns load and isn't kept, each once."""
    return {
        image: (pixels, padded)
        for turn, inputs in group
        for image, pixels, padded in zip(
            turn.load, inputs.images, inputs.padding, strict=True
        )
        if image not in kept
    }


def _forgotten(turns: Iterable[Turn]) -> set[int]:
    """Returns what is dropped in some turns and not loaded again in later ones."""
    dropped: set[int] = set()
    for turn in turns:
        dropped = dropped.difference(turn.load).union(turn.drop)
    return dropped


def _encoded(
    predict: Predictor, images: Mapping[int, tuple[Any, Any]], count: int
) -> dict[int, PyTree[Array]]:
    """Returns images, encoded in one batch of `count`, whatever their own number.

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

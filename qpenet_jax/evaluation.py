"""Score predictions on the episodes of a protocol, at the protocol's size."""

from collections.abc import Callable, Sequence

import cv2
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8
from tqdm import tqdm

from qpenet_jax import metrics
from qpenet_jax.episode_lists import FrozenEpisodes
from qpenet_jax.episodes import EpisodeSampler, evaluation_episodes
from qpenet_jax.metrics import Scores
from qpenet_jax.models.backbone import Backbone
from qpenet_jax.models.ops import interpolation_matrix
from qpenet_jax.protocols import Protocol
from qpenet_jax.training import episode_features
from qpenet_jax.transforms import Resize, content_size
from qpenet_jax.typing import Episode, SegmentationDataset

Samplers = Sequence[EpisodeSampler] | Sequence[FrozenEpisodes]


def make_eval_step(
    forward: Callable[..., tuple[Float[Array, "b H W 2"], dict[str, Array]]],
    backbone: Backbone,
) -> Callable[[PyTree[Array], PyTree[Array], Episode], Float[Array, "b H W"]]:
    """Return `eval_step(params, weights, batch)`, jitted: foreground's lead in logits.

    `forward(params, support_features, support_masks, query_features)` is QPENet's
    apply or the training-free baseline; positive means foreground.
    """

    def eval_step(params, weights, batch):
        support_maps, query_maps = episode_features(backbone, weights, batch)
        logits, _ = forward(params, support_maps, batch.support_masks, query_maps)
        return logits[..., 1] - logits[..., 0]

    return jax.jit(eval_step)


def evaluate(
    predict: Callable[[Episode], Float[Array, "b H W"]],
    dataset: SegmentationDataset,
    protocol: Protocol,
    samplers: Samplers,
    *,
    workers: int = 0,
    label: str = "evaluating",
) -> Scores:
    """Score `predict` on the protocol's episodes, one sampler a seed."""
    rows = []
    bar = tqdm(total=protocol.episodes * len(samplers), desc=label, unit="episode")
    with bar:
        for sampler in samplers:
            stream = evaluation_episodes(
                dataset,
                sampler,
                protocol.episodes,
                protocol.side,
                workers,
                protocol.resize,
            )
            for ids, episode, mask in stream:
                margin = predict(Episode(*(x[None] for x in episode)))[0]
                counts = score(np.asarray(margin), episode.query_mask, mask, protocol)
                row = (sampler.seed, ids.index, ids.query, ids.class_id, *counts)
                rows.append(row)
                bar.update()
    return Scores(np.array(rows, np.int64))


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


def unpad(
    margin: Float[np.ndarray, "s s"], height: int, width: int, resize: Resize = "pad"
) -> Float[np.ndarray, "h w"]:
    """Cut the image's content out of the square and resize it to the image."""
    rows, cols = content_size(height, width, margin.shape[0], resize)
    content = np.ascontiguousarray(margin[:rows, :cols])
    return cv2.resize(content, (width, height), interpolation=cv2.INTER_LINEAR)

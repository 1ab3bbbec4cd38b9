"""Class IoU, mIoU and FB-IoU from per-episode pixel counts, with intervals."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from qpenet_jax.typing import IGNORE

COLUMNS = (
    "seed",
    "index",
    "query",
    "class_id",
    "background_intersection",
    "background_union",
    "foreground_intersection",
    "foreground_union",
)


def count_pixels(
    prediction: Bool[np.ndarray, "h w"], mask: Int[np.ndarray, "h w"]
) -> tuple[int, int, int, int]:
    """Return intersection and union of background, then of foreground; 255 left out."""
    valid = mask != IGNORE
    truth, found = mask[valid] == 1, prediction[valid]
    both, either = int((truth & found).sum()), int((truth | found).sum())
    return truth.size - either, truth.size - both, both, either


@dataclasses.dataclass(frozen=True)
class Scores:
    """One row of pixel counts an episode, in the order of COLUMNS."""

    rows: Int[np.ndarray, "episodes 8"]

    def column(self, name: str) -> Int[np.ndarray, " episodes"]:
        """Return one column by name."""
        return self.rows[:, COLUMNS.index(name)]

    def save(self, path: Path) -> None:
        """Write the rows as CSV with a header."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(self.rows.tolist())


def load_scores(path: Path) -> Scores:
    """Read what `Scores.save` wrote."""
    rows = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64, ndmin=2)
    return Scores(rows)


def class_iou(
    scores: Scores,
    classes: Sequence[int],
    weights: Float[np.ndarray, " episodes"] | None = None,
) -> Float[np.ndarray, " classes"]:
    """Return IoU per class: summed intersections over summed unions, 0..1.

    Summed over the episodes of a seed, then averaged over the seeds. A class that was
    never drawn counts 0; both are the field's custom. `weights` says how often each
    episode counts (bootstrap).
    """
    table = _iou_by_seed(scores, classes, weights)
    return table.mean(axis=0)


def seed_iou(
    scores: Scores, classes: Sequence[int]
) -> dict[int, Float[np.ndarray, " classes"]]:
    """Return IoU per class for each seed on its own."""
    seeds = np.unique(scores.column("seed"))
    return dict(zip(seeds.tolist(), _iou_by_seed(scores, classes), strict=True))


def _iou_by_seed(scores, classes, weights=None):
    seeds, seed = np.unique(scores.column("seed"), return_inverse=True)
    width = max(*classes, scores.column("class_id").max()) + 1
    cell = seed * width + scores.column("class_id")

    def total(name):
        pixels = scores.column(name).astype(float)
        pixels = pixels if weights is None else pixels * weights
        sums = np.bincount(cell, weights=pixels, minlength=len(seeds) * width)
        return sums.reshape(len(seeds), width)[:, list(classes)]

    union = total("foreground_union")
    return total("foreground_intersection") / np.where(union > 0, union, 1)


def mean_iou(
    scores: Scores,
    classes: Sequence[int],
    weights: Float[np.ndarray, " episodes"] | None = None,
) -> float:
    """Return mIoU, the mean of `class_iou` over the classes, in 0..1."""
    return float(class_iou(scores, classes, weights).mean())


def fb_iou(scores: Scores) -> float:
    """Return the mean of foreground and background IoU over all episodes, in 0..1."""
    sums = scores.rows[:, 4:].sum(axis=0)
    return float((sums[0] / max(sums[1], 1) + sums[2] / max(sums[3], 1)) / 2)


def bootstrap(
    statistic, scores: Scores, *, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of `statistic(weights)` by Rubin's Bayesian bootstrap.

    Query images are weighted, not episodes: episodes of one query are not independent,
    and counting them so would make the interval too narrow. The weights are exponential
    and so never 0: drawing images with replacement would often lose all of a class that
    has only a few, which would then count as IoU 0.
    """
    _, image = np.unique(scores.column("query"), return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = rng.exponential(size=(samples, image.max() + 1))
    values = [statistic(draw[image]) for draw in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def interval(scores: Scores, classes: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of mIoU."""
    return bootstrap(lambda w: mean_iou(scores, classes, w), scores)


def paired_difference(
    ours: Scores, theirs: Scores, classes: Sequence[int]
) -> tuple[float, float, float]:
    """Return the mIoU difference on common episodes and its 95 % interval.

    Raises ValueError if the two were not scored on the same episodes.
    """
    if not np.array_equal(ours.rows[:, :4], theirs.rows[:, :4]):
        raise ValueError("the two results were not scored on the same episodes")

    def difference(weights):
        a, b = (mean_iou(s, classes, weights) for s in (ours, theirs))
        return a - b

    return difference(None), *bootstrap(difference, ours)

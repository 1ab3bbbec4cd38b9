"""Class IoU, mIoU and FB-IoU from per-episode pixel counts, with intervals."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.types import IGNORE

SCORE_COLUMNS = (
    "seed",
    "index",
    "query",
    "class_id",
    "background_intersection",
    "background_union",
    "foreground_intersection",
    "foreground_union",
)
KEYS = 4
"""How many of the first columns say which episode it is; pixel counts follow."""

SAMPLES = 2000
"""Bootstrap samples: the ends of the 95 % interval rest on 50 of them each."""


def count_pixels(
    prediction: Bool[np.ndarray, "h w"], mask: Integer[np.ndarray, "h w"]
) -> tuple[int, int, int, int]:
    """Returns intersection and union of background, then of foreground, without 255."""
    valid = mask != IGNORE
    truth, found = mask[valid] == 1, prediction[valid]
    both, either = int((truth & found).sum()), int((truth | found).sum())
    return truth.size - either, truth.size - both, both, either


@dataclasses.dataclass(frozen=True)
class Scores:
    """One row of pixel counts an episode, in the order of SCORE_COLUMNS."""

    rows: Int[np.ndarray, "episodes 8"]

    def column(self, name: str) -> Int[np.ndarray, " episodes"]:
        """Returns one column by name."""
        return self.rows[:, SCORE_COLUMNS.index(name)]

    def save(self, path: Path) -> None:
        """Writes the rows as CSV with a header."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([SCORE_COLUMNS, *self.rows.tolist()])
        write_whole(path, text.getvalue())


def load_scores(path: Path) -> Scores:
    """Reads what `Scores.save` wrote.

    Raises:
        InputError: no such file, no episode in it, or not such a file.
    """
    try:
        with path.open(newline="") as file:
            header, *lines = csv.reader(file)
        rows = np.array([[int(cell) for cell in line] for line in lines], np.int64)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; `qpenet evaluate` writes one beside results.json"
        ) from None
    except (ValueError, OverflowError, csv.Error):
        header, rows = [], np.empty(0)
    if tuple(header) != SCORE_COLUMNS or rows.shape[1:] != (len(SCORE_COLUMNS),):
        raise InputError(
            f"{path}: not a whole file of episode scores (expected the columns "
            f"{','.join(SCORE_COLUMNS)} in whole numbers); evaluate again"
        )
    return Scores(rows)


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def percent(self) -> list[float]:
        """Returns value, low and high in percent with two decimals, as in files."""
        return [round(100 * x, 2) for x in self]


class Estimates(NamedTuple):
    """IoU of each class, mIoU and FB-IoU in 0..1, or differences of them."""

    per_class: tuple[Interval, ...]
    miou: Interval
    fb_iou: Interval


def mean_iou(scores: Scores, classes: Sequence[int]) -> float:
    """Returns mIoU, the mean IoU of the classes, in 0..1; see `estimate`."""
    measures, images = _measures(scores, classes)
    return float(measures(np.ones((1, images)))[0, -2])


def seed_mean_iou(scores: Scores, classes: Sequence[int]) -> dict[int, float]:
    """Returns mIoU for each seed on its own, 0..1."""
    seed = scores.column("seed")
    return {
        int(s): mean_iou(Scores(scores.rows[seed == s]), classes)
        for s in np.unique(seed)
    }


def estimate(scores: Scores, classes: Sequence[int]) -> Estimates:
    """Returns all IoUs, 0..1, with 95 % intervals by Rubin's Bayesian bootstrap.

    The IoU of a class is its summed intersections over its summed unions. They are
    summed over the episodes of a seed, then averaged over the seeds; a class without an
    episode of a seed counts 0 for this seed. Both are the field's custom. FB-IoU is the
    mean of foreground and background IoU, each over all episodes, whatever their class.

    Query images are weighted, not episodes: episodes of one query are not independent,
    and counting them so would make the interval too narrow. The weights are exponential
    and so never 0: drawing images with replacement would often lose all of a class that
    has only a few, which would then count as IoU 0.

    Source: Rubin, The Bayesian Bootstrap, Annals of Statistics 1981.
    """
    return _bootstrap(*_measures(scores, classes))


def estimate_difference(
    first: Scores, second: Scores, classes: Sequence[int]
) -> Estimates:
    """Returns first - second on their common episodes, -1..1, with 95 % intervals.

    Each bootstrap sample weights the images of both alike, so what makes an episode
    hard for both cancels.

    Raises:
        InputError: no episode is common.
    """
    first, second = common_episodes(first, second)
    of_first, images = _measures(first, classes)
    of_second, _ = _measures(second, classes)
    return _bootstrap(lambda w: of_first(w) - of_second(w), images)


def common_episodes(first: Scores, second: Scores) -> tuple[Scores, Scores]:
    """Returns both restricted to episodes equal in seed, index, query and class.

    Raises:
        InputError: there are none.
    """
    key = np.dtype([(name, np.int64) for name in SCORE_COLUMNS[:KEYS]])
    keys = [
        np.ascontiguousarray(s.rows[:, :KEYS], np.int64).view(key).ravel()
        for s in (first, second)
    ]
    common, *places = np.intersect1d(keys[0], keys[1], return_indices=True)
    if not len(common):
        raise InputError(
            "the two results have no episode in common (same seed, index, query and "
            "class): evaluate both by one protocol"
        )
    return Scores(first.rows[places[0]]), Scores(second.rows[places[1]])


Measures = Callable[
    [Float[np.ndarray, "samples images"]], Float[np.ndarray, "samples measures"]
]
"""From weights of the query images to IoU of each class, mIoU, FB-IoU."""


def _measures(scores: Scores, classes: Sequence[int]) -> tuple[Measures, int]:
    """Sums the counts of each image; returns the measures and the number of images."""
    from scipy import sparse  # Here: whoever only predicts does without it.

    queries, image = np.unique(scores.column("query"), return_inverse=True)
    seeds, seed = np.unique(scores.column("seed"), return_inverse=True)
    member, position = np.nonzero(scores.column("class_id")[:, None] == list(classes))
    cell = seed[member] * len(classes) + position
    cells = len(seeds) * len(classes)

    def per_image(name):
        entries = scores.column(name)[member], (image[member], cell)
        return sparse.csr_array(entries, shape=(len(queries), cells), dtype=float)

    intersection = per_image("foreground_intersection")
    union = per_image("foreground_union")
    overall = np.zeros((len(queries), len(seeds), len(SCORE_COLUMNS) - KEYS))
    np.add.at(overall, (image, seed), scores.rows[:, KEYS:])
    overall = overall.reshape(len(queries), -1)

    def measures(weights):
        iou = _ratio(weights @ intersection, weights @ union)
        iou = iou.reshape(len(weights), len(seeds), len(classes)).mean(axis=1)
        sums = weights @ overall  # of background and foreground in turn, per seed
        fb = _ratio(sums[:, ::2], sums[:, 1::2])
        return np.column_stack([iou, iou.mean(axis=1), fb.mean(axis=1)])

    return measures, len(queries)


def _ratio(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """Returns IoU, and 0 where there is no union: a class without an episode."""
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _bootstrap(measures: Measures, images: int) -> Estimates:
    """Returns the measures at equal weights, with intervals over random weights."""
    rng = np.random.default_rng(0)
    values = measures(rng.exponential(size=(SAMPLES, images)))
    ends = np.percentile(values, [2.5, 97.5], axis=0)
    columns = np.column_stack([measures(np.ones((1, images)))[0], *ends]).tolist()
    *per_class, miou, fb_iou = (Interval(*column) for column in columns)
    return Estimates(tuple(per_class), miou, fb_iou)

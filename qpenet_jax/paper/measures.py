"""From finished runs to mIoU and FB-IoU with their 95 % intervals.

First what the runs of a table left behind in their folders, then what it gives.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qpenet_jax.config import selections
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation import metrics
from qpenet_jax.evaluation.compare import episode_scores
from qpenet_jax.evaluation.metrics import Scores
from qpenet_jax.evaluation.report import RESULTS
from qpenet_jax.paper.plan import PlannedRun
from qpenet_jax.runs.build import complete, identity
from qpenet_jax.runs.folder import INPUTS_FILE, read_config

COST = "cost.json"
"""Seconds that a run took, over all its attempts, and the machine."""

APART = 10**9
"""Larger than any seed or image number, so that those of two training seeds differ."""

Measured = dict[str, Any]
"""A value in percent as JSON: "ours", "interval" (low, high), "std", "by_seed"."""


class Found(NamedTuple):
    """What one evaluation of a run left behind."""

    scores: Scores
    classes: dict[str, list[int]]  # ids by measure: all, and the config's focus
    facts: dict[str, Any]  # the protocol, and hashes of the inputs


# What runs left behind.


def is_done(run: PlannedRun) -> bool:
    """Returns whether a run is trained and scored with all its numbers of shots."""
    return all(results_file(run, shots) for shots in run.shots)


def results_file(run: PlannedRun, shots: int) -> Path | None:
    """Returns the results.json of this very config, if it is there."""
    first = run.folder / RESULTS
    if not first.exists() or not has_config_of(run):
        return None
    step, config = _json(first)["step"], run.config
    if selections(run.config)[0] == "last" and config.steps not in (0, step):
        return None
    if shots == run.shots[0]:
        return first
    found = sorted(run.folder.glob(f"{shots}shot/*/{RESULTS}"))
    return next((file for file in found if _json(file)["step"] == step), None)


def has_config_of(run: PlannedRun) -> bool:
    """Returns whether the run's folder holds a run of the same config."""
    try:
        before = complete(read_config(run.folder))
    except InputError:
        return False
    return identity(before) == identity(run.config)


def scores_line(run: PlannedRun) -> str:
    """Returns the scores of a finished run for one line of text."""
    results = _json(run.folder / RESULTS)
    return f"mIoU {results['miou']:.1f}, FB-IoU {results['fb_iou']:.1f}"


def by_variant(runs: Sequence[PlannedRun]) -> dict[str, list[Found]]:
    """Returns the results of finished runs: by variant, one for every seed."""
    found: dict[str, list[Found]] = {}
    for run in runs:
        of_variant = found.setdefault(run.config.variant, [])
        of_variant.append(_read(run, run.shots[0]))
    return found


def by_fold(
    runs: Sequence[PlannedRun],
) -> dict[int, dict[str, dict[int, list[Found]]]]:
    """Returns the results by shots, backbone and fold, one for every seed."""
    found: dict[int, dict[str, dict[int, list[Found]]]] = {}
    for run in runs:
        config = run.config
        for shots in run.shots:
            folds = found.setdefault(shots, {}).setdefault(config.backbone.name, {})
            folds.setdefault(config.dataset.fold, []).append(_read(run, shots))
    return found


def _read(run: PlannedRun, shots: int) -> Found:
    path = results_file(run, shots)
    assert path  # only finished runs are read
    results = _json(path)
    try:
        scores = episode_scores(path, results)
    except InputError as error:
        problem = str(error).partition(";")[0]
        raise InputError(
            f"{problem}; delete {path} and give the same command again"
        ) from None
    facts = results["protocol"] | _json(run.folder / INPUTS_FILE)
    return Found(scores, _classes(results), facts)


def _classes(results: dict[str, Any]) -> dict[str, list[int]]:
    """Returns the ids of the classes in every mean: all, and the config's focus."""
    ids, names = results["class_ids"], results["protocol"]["classes"]
    classes = {"mIoU": ids}
    if focus := results.get("focus", {}).get("classes"):
        chosen = [ids[names.index(name)] for name in focus]
        classes[f"mIoU of {', '.join(focus)}"] = chosen
    return classes


def training_facts(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Returns what the page says of the trainings: number, steps, time and machines."""
    files = [run.folder / COST for run in runs]
    costs = [_json(file) for file in files if file.exists()]
    return {
        "runs": len(runs),
        "steps": sorted({run.steps for run in runs}),
        "seconds": [cost["seconds"] for cost in costs],
        "machines": sorted({cost["machine"] for cost in costs}),
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# What it gives.


def pooled(found: Sequence[Found]) -> Scores:
    """Returns the episodes of several training seeds as if they were of more seeds.

    All metrics then average over the training seeds. Query 17 is the same image for all
    of them, unless the images are generated and therefore differ.
    """
    versions = [one.facts["version"] for one in found]
    seed, query = (metrics.SCORE_COLUMNS.index(name) for name in ("seed", "query"))
    parts = [one.scores.rows.copy() for one in found]
    for k, rows in enumerate(parts):
        rows[:, seed] += k * APART
        rows[:, query] += versions.index(versions[k]) * APART
    return Scores(np.concatenate(parts))


def measured(found: Sequence[Found]) -> dict[str, Measured]:
    """Returns mIoU, the mIoU of the config's focus, and FB-IoU, in percent.

    Each with its mean over the training seeds, the 95 % interval over query images, the
    value of every seed and their standard deviation. One `Found` a training seed.
    """
    scores = pooled(found)
    estimates = {
        name: metrics.estimate(scores, ids) for name, ids in found[0].classes.items()
    }
    return _with_seeds(estimates, [_points(one) for one in found])


def measured_difference(
    ours: Sequence[Found], theirs: Sequence[Found]
) -> dict[str, Measured]:
    """Returns ours - theirs of all that `measured` returns, paired by episode and seed.

    Raises InputError if they have no episode in common.
    """
    pools = pooled(ours), pooled(theirs)
    estimates = {
        name: metrics.estimate_difference(*pools, ids)
        for name, ids in ours[0].classes.items()
    }
    pairs = zip(map(_points, ours), map(_points, theirs), strict=True)
    by_seed = [{name: a[name] - b[name] for name in a} for a, b in pairs]
    return _with_seeds(estimates, by_seed)


def _with_seeds(
    estimates: Mapping[str, metrics.Estimates], by_seed: Sequence[Mapping[str, float]]
) -> dict[str, Measured]:
    intervals = {name: one.miou for name, one in estimates.items()}
    intervals["FB-IoU"] = estimates["mIoU"].fb_iou
    return {
        name: _rounded(
            100 * np.array(interval), [100 * values[name] for values in by_seed]
        )
        for name, interval in intervals.items()
    }


def _points(found: Found) -> dict[str, float]:
    """Returns the measures of one training seed, 0..1."""
    mious = {n: metrics.mean_iou(found.scores, ids) for n, ids in found.classes.items()}
    return mious | {"FB-IoU": metrics.fb_iou(found.scores)}


def mean_over_folds(folds: Sequence[Measured]) -> Measured:
    """Returns the mean of the folds; its interval takes the folds for independent."""
    values = np.array([fold["ours"] for fold in folds])
    low, high = np.transpose([fold["interval"] for fold in folds])
    value, count = values.mean(), len(folds)
    below, above = math.dist(values, low) / count, math.dist(values, high) / count
    by_seed = np.mean([fold["by_seed"] for fold in folds], axis=0)
    return _rounded([value, value - below, value + above], by_seed)


def _rounded(interval, by_seed) -> Measured:
    value, *ends = (round(float(x), 2) for x in interval)
    std = round(float(np.std(by_seed, ddof=1)), 2) if len(by_seed) > 1 else None
    by_seed = [round(float(x), 2) for x in by_seed]
    return {"ours": value, "interval": ends, "std": std, "by_seed": by_seed}


def verdict(paper: float, interval: Sequence[float], by_seed: Sequence[float]) -> str:
    """Returns whether our difference has the sign of the paper's.

    "holds" or "contrary"; "undecided" if the interval (low, high) over query images
    contains 0, or if the training seeds do not agree on the sign: the interval knows
    nothing of other training runs.
    """
    low, high = interval
    if low <= 0 <= high or min(by_seed) <= 0 <= max(by_seed):
        return "undecided"
    return "holds" if (low > 0) == (paper > 0) else "contrary"

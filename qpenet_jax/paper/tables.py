"""The paper's tables in its layout: our values with their intervals beside its own.

First what finished runs measured, then the content of a table, as its JSON file holds
it, then the Markdown page.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qpenet_jax.core import markdown
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation import metrics
from qpenet_jax.evaluation.compare import episode_scores
from qpenet_jax.evaluation.metrics import Scores
from qpenet_jax.evaluation.report import RESULTS, with_interval
from qpenet_jax.paper.plan import VARIANT_RESULTS, Plan, PlannedRun, paper_results
from qpenet_jax.runs.folder import INPUTS_FILE, read_json

OF_VARIANTS = (
    "The paper's values: PASCAL-5i, mean of the folds, ResNet-50, 1 shot. A mean over "
    "some classes is compared with its mIoU. Undecided: our interval contains 0, or "
    "the seeds differ in sign."
)
OF_FOLDS = (
    "The weights were trained with 1 shot. mIoU and FB-IoU: over the folds shown (the "
    "paper's: over all four); their intervals take the folds for independent."
)

ORDER = "## Does the paper's order hold? Paired differences on the same episodes"

OF_SEED = {"version", "text", "training images", "validation images"}
"""What may differ between training seeds: generated images depend on the seed."""

OF_FOLD = {"fold", "classes", "text", "backbone weights"}
"""What may differ between backbones and folds."""

APART = 10**9
"""Larger than any seed or image number, so that those of two training seeds differ."""

Measured = dict[str, Any]
"""A value in percent as JSON: "ours", "interval" (low, high), "std", "by_seed"."""


class Found(NamedTuple):
    """What one evaluation of a run left behind.

    `means` holds mIoU, the mIoU of the config's subset, and FB-IoU, in percent;
    `classes` the ids behind each mIoU; `facts` the protocol and hashes of the inputs.
    """

    scores: Scores
    means: dict[str, float]
    classes: dict[str, list[int]]
    facts: dict[str, Any]


def found_in(run: PlannedRun, shots: int) -> Found:
    """Reads what a finished run scored with as many shots.

    Raises:
        InputError: the file of its episodes is missing, or another evaluation's.
    """
    path = run.results_file(shots)
    assert path  # only finished runs are read
    results = read_json(path)
    try:
        scores = episode_scores(path, results)
    except InputError as error:
        again = f"or delete {path} and give the same command again"
        raise InputError(f"{error}, {again}") from None
    ids, protocol = results["class_ids"], results["protocol"]
    means, classes = {"mIoU": results["miou"]}, {"mIoU": ids}
    if subset := results.get("subset"):
        name = f"mIoU of {', '.join(subset['classes'])}"
        means[name] = subset["miou"]
        classes[name] = [ids[protocol["classes"].index(c)] for c in subset["classes"]]
    means["FB-IoU"] = results["fb_iou"]
    facts = protocol | read_json(run.folder / INPUTS_FILE)
    return Found(scores, means, classes, facts)


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


def measured(
    found: Sequence[Found], others: Sequence[Found] = ()
) -> dict[str, Measured]:
    """Returns the measures of a row, one `Found` a training seed.

    With `others`, found - others, paired by episode and seed. Each with its mean over
    the seeds, the 95 % interval over query images, every seed's value and their
    standard deviation.

    Raises:
        InputError: found and others have no episode in common.
    """
    pool, other = pooled(found), pooled(others) if others else None
    estimates = [
        metrics.estimate_difference(pool, other, ids)
        if other
        else metrics.estimate(pool, ids)
        for ids in found[0].classes.values()
    ]
    intervals = [*(one.miou for one in estimates), estimates[0].fb_iou]
    means = np.array([[*one.means.values()] for one in found])
    if others:
        means -= [[*one.means.values()] for one in others]
    return {
        name: _rounded(100 * np.array(interval), by_seed)
        for name, interval, by_seed in zip(
            found[0].means, intervals, means.T, strict=True
        )
    }


def mean_over_folds(folds: Sequence[Measured]) -> Measured:
    """Returns the mean of the folds; its interval takes the folds for independent."""
    values = np.array([fold["ours"] for fold in folds])
    ends = np.transpose([fold["interval"] for fold in folds])
    below, above = (math.dist(values, end) / len(folds) for end in ends)
    value, by_seed = values.mean(), np.mean([fold["by_seed"] for fold in folds], axis=0)
    return _rounded([value, value - below, value + above], by_seed)


def _rounded(interval, by_seed) -> Measured:
    value, *ends = np.round(interval, 2).tolist()
    std = round(float(np.std(by_seed, ddof=1)), 2) if len(by_seed) > 1 else None
    by_seed = np.round(by_seed, 2).tolist()
    return {"ours": value, "interval": ends, "std": std, "by_seed": by_seed}


def verdict(paper: float, interval: Sequence[float], by_seed: Sequence[float]) -> str:
    """Returns whether our difference has the sign of the paper's.

    "holds" or "contrary"; "undecided" if the interval (low, high) over query images
    contains 0, or if the training seeds do not agree on the sign: the interval knows
    nothing of other training runs.
    """
    signed = np.sign(paper) * np.array([*interval, *by_seed])
    if (signed > 0).all():
        return "holds"
    return "contrary" if (signed < 0).all() else "undecided"


# The content.


def table_content(plan: Plan, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Returns what the table's JSON file holds; all runs are finished.

    Its "sections", one for each number of shots, have rows of measures by column, and
    in Tables III to V the differences between rows.

    Raises:
        InputError: the rows, or the seeds, were not trained and scored alike.
    """
    devices = {read_json(run.folder / RESULTS).get("device") for run in runs}
    return {
        "table": plan.table,
        "command": plan.command,
        "seeds": plan.training_seeds,
        "runs": len(runs),
        "steps": sorted({run.steps for run in runs}),
        "devices": sorted(filter(None, devices)),
        "sections": {shots: _section(plan, runs, shots) for shots in runs[0].shots},
    }


def _section(plan: Plan, runs: Sequence[PlannedRun], shots: int) -> dict[str, Any]:
    rows: dict[str, dict[int, list[Found]]] = {}
    found = [found_in(run, shots) for run in runs]
    for run, one in zip(runs, found, strict=True):
        folds = rows.setdefault(run.row, {})
        folds.setdefault(run.config.dataset.fold, []).append(one)
    _check_alike(runs, found)
    return {
        "protocol": found[0].facts["text"],
        "rows": {row: _row(plan, shots, row, folds) for row, folds in rows.items()},
        "differences": _differences(plan, rows) if plan.of_variants else {},
    }


def _check_alike(runs: Sequence[PlannedRun], found: Sequence[Found]) -> None:
    """Refuses runs of other protocols or inputs than those before them."""
    before: dict[Any, Any] = {}
    for run, one in zip(runs, found, strict=True):
        trained = run.config
        place = trained.backbone.name, trained.dataset.fold
        for name, value in one.facts.items():
            key = name, name in OF_SEED and trained.seed, name in OF_FOLD and place
            if before.setdefault(key, value) != value:
                raise InputError(
                    f"{run.folder} and the runs before it were not trained and scored "
                    f"alike ({name} differs): choose a new --workdir"
                )


def _row(
    plan: Plan, shots: int, row: str, folds: Mapping[int, Sequence[Found]]
) -> dict[str, Measured]:
    """Returns the mean over the folds, in Tables I and II after each fold's mIoU."""
    of_folds = {fold: measured(found) for fold, found in folds.items()}
    columns: dict[str, Measured] = {}
    if not plan.of_variants:
        columns = {f"Fold-{fold}": of["mIoU"] for fold, of in of_folds.items()}
    for name in next(iter(of_folds.values())):
        columns[name] = mean_over_folds([of[name] for of in of_folds.values()])
    for name, value in paper_results(plan.table, shots, row).items():
        if name in columns:
            columns[name]["paper"] = value
    return columns


def _differences(
    plan: Plan, found: Mapping[str, Mapping[int, Sequence[Found]]]
) -> dict[str, dict[str, Measured]]:
    """Returns a - b by "a - b", with the paper's difference and a verdict on ours.

    Of every row to `full`, then of every row to the one above it.
    """
    rows = [name for name in found if name != "full"]
    pairs = [(name, "full") for name in rows if "full" in found]
    pairs += zip(rows[1:], rows[:-1], strict=True)
    differences = {}
    for pair in pairs:
        first, second = (next(iter(found[row].values())) for row in pair)
        papers = [paper_results(plan.table, 1, row) for row in pair]
        differences[" - ".join(pair)] = row = measured(first, second)
        for name, value in row.items():
            a, b = (paper.get(name, paper["mIoU"]) for paper in papers)
            paper = value["paper"] = round(a - b, 1)
            value["order"] = verdict(paper, value["interval"], value["by_seed"])
    return differences


# The page.


def page(content: Mapping[str, Any]) -> str:
    """Returns a table as a Markdown page, with its protocol and command."""
    table, seeds = content["table"], content["seeds"]
    numeral = ("I", "II", "III", "IV", "V")[int(table[-1]) - 1]
    parts = [f"# Table {numeral}, reproduced"]
    for shots, section in content["sections"].items():
        parts += [
            f"## {shots}-shot",
            _rows_table(table, section["rows"]),
            f"Protocol: {section['protocol']}. Other folds differ in their classes; "
            "all rows of one fold and training seed were scored on the same episodes.",
        ]
        if section["differences"]:
            parts += [ORDER, _orders_table(section["differences"])]
    steps = ", ".join(map(str, content["steps"]))
    parts += [
        OF_VARIANTS if table in VARIANT_RESULTS else OF_FOLDS,
        f"Means over {len(seeds)} training seed(s) ({', '.join(map(str, seeds))}). In "
        "brackets: 95 % intervals over query images (Bayesian bootstrap), which say "
        "nothing about other training runs. ±: standard deviation over the seeds.",
        f"Trained: {content['runs']} runs of {steps} steps, with the same settings for "
        f"every row, on {', '.join(content['devices'])}.",
        f"Command: `{content['command']}`",
    ]
    return "\n\n".join(parts) + "\n"


def _rows_table(table: str, rows: Mapping[str, Mapping[str, Measured]]) -> str:
    ticks = {name: row[-1] for name, row in VARIANT_RESULTS.get(table, {}).items()}
    parts = list(dict.fromkeys(itertools.chain(*ticks.values())))
    papers = {
        c for row in rows.values() for c, value in row.items() if "paper" in value
    }
    header, body = ["row", *parts], []
    for column in next(iter(rows.values())):
        header += [column, "paper"] if column in papers else [column]
    for name, row in rows.items():
        cells = [name, *("✓" if part in ticks[name] else "" for part in parts)]
        for column, value in row.items():
            cells.append(_cell(value))
            cells += [str(value.get("paper", ""))] if column in papers else []
        body.append(cells)
    return markdown.table(header, body)


def _orders_table(differences: Mapping[str, Mapping[str, Measured]]) -> str:
    body = [
        [
            *(pair, measure, f"{value['paper']:+.1f}", _cell(value, "+")),
            ", ".join(f"{one:+.1f}" for one in value["by_seed"]),
            value["order"],
        ]
        for pair, row in differences.items()
        for measure, value in row.items()
    ]
    header = ("rows", "measure", "paper", "ours", "by seed", "order")
    return markdown.table(header, body)


def _cell(value: Measured, sign: str = "") -> str:
    std = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return with_interval(value["ours"], value["interval"], sign) + std

"""The paper's tables in its layout: our figures with their intervals beside its own.

`reproduce.py` trains and reads; here results become figures, and figures a page.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation import metrics
from qpenet_jax.evaluation.metrics import Scores
from qpenet_jax.evaluation.report import markdown
from qpenet_jax.models.qpenet import VARIANTS, QPENet

NUMERALS = ("I", "II", "III", "IV", "V")
TABLES = {f"table{i}": f"Table {roman}" for i, roman in enumerate(NUMERALS, 1)}

# What a row of the ablations has, by column.
TICKS: Mapping[str, Mapping[str, Callable[[QPENet], bool]]] = {
    "table3": {
        "FGPE": lambda net: net.fgpe,
        "BGPE": lambda net: net.bgpe,
        "FFA": lambda net: net.decoder == "ffa",
    },
    "table4": {
        "P_pre": lambda net: "pre" in net.prototypes,
        "P_main": lambda net: "main" in net.prototypes,
        "P_aux": lambda net: "aux" in net.prototypes,
    },
    "table5": {
        "activation maps": lambda net: net.activation_maps,
        "SGM": lambda net: net.sgm,
    },
}

# QPENet's own rows of Tables I and II, by shots and backbone.
COLUMNS = ("Fold-0", "Fold-1", "Fold-2", "Fold-3", "Mean", "FB-IoU")
PAPER = {
    "table1": {
        (1, "resnet50"): (65.2, 71.9, 64.1, 59.5, 65.2, 76.7),
        (5, "resnet50"): (68.4, 74.0, 67.4, 65.2, 68.8, 80.0),
        (1, "resnet101"): (67.0, 73.2, 63.7, 60.1, 66.0, 77.1),
        (5, "resnet101"): (69.8, 75.5, 66.8, 66.3, 69.6, 81.1),
    },
    "table2": {
        (1, "resnet50"): (41.5, 47.3, 40.9, 39.4, 42.3, 67.4),
        (5, "resnet50"): (47.3, 52.4, 44.3, 44.9, 47.2, 69.5),
        (1, "resnet101"): (39.8, 45.4, 40.5, 40.0, 41.4, 67.8),
        (5, "resnet101"): (47.2, 54.9, 43.4, 45.4, 47.7, 70.6),
    },
}

APART = 10**9
"""More than any seed or image number: keeps those of two training seeds apart."""

OWN = {"version", "text", "training images", "validation images"}
"""What may differ between training seeds: generated images depend on the seed."""


class Found(NamedTuple):
    """What one evaluation of a run left behind."""

    scores: Scores
    classes: dict[str, list[int]]  # ids by measure: all, and the config's focus
    facts: dict[str, Any]  # the protocol, and hashes of the inputs


def page(table: str, content: Mapping[str, Any]) -> str:
    """Return a table as a Markdown page, with its protocol, cost and command."""
    rows = (_ablation_page if table in TICKS else _folds_page)(table, content)
    parts = [f"# {TABLES[table]}, reproduced", *rows, *_cost(content)]
    return "\n\n".join(parts) + "\n"


def pooled(found: Sequence[Found]) -> Scores:
    """Return the episodes of several training seeds as those of more seeds.

    So all metrics average over them. Query 17 is the same image with all training
    seeds, unless the images are generated and so differ.
    """
    versions = [one.facts["version"] for one in found]
    seed, query = (metrics.COLUMNS.index(name) for name in ("seed", "query"))
    parts = [one.scores.rows.copy() for one in found]
    for k, rows in enumerate(parts):
        rows[:, seed] += k * APART
        rows[:, query] += versions.index(versions[k]) * APART
    return Scores(np.concatenate(parts))


def verdict(paper: float, interval: Sequence[float], by_seed: Sequence[float]) -> str:
    """Return what ours says about the sign of the paper's difference.

    Undecided where the interval (low, high) over query images contains 0, or where the
    training seeds don't agree on the sign, of which the interval knows nothing.
    """
    low, high = interval
    if low <= 0 <= high or min(by_seed) <= 0 <= max(by_seed):
        return "undecided"
    return "holds" if (low > 0) == (paper > 0) else "contrary"


def figures(
    ours: Sequence[Found], theirs: Sequence[Found] = ()
) -> dict[str, dict[str, Any]]:
    """Return mIoU, that of the config's focus, and FB-IoU, or ours - theirs of them.

    In percent: the mean over training seeds, its 95 % interval over query images, the
    value with each seed and their standard deviation.
    """
    found = {}
    for name, ids in ours[0].classes.items():
        if theirs:
            pools = pooled(ours), pooled(theirs)
            found[name] = metrics.estimate_difference(*pools, ids)
        else:
            found[name] = metrics.estimate(pooled(ours), ids)
    intervals = {name: one.miou for name, one in found.items()}
    intervals["FB-IoU"] = found["mIoU"].fb_iou
    by_seed = [_points(one) for one in ours]
    for values, one in zip(by_seed, theirs, strict=False):  # or there are none
        values |= {name: values[name] - v for name, v in _points(one).items()}
    return {
        name: _figure(100 * np.array(interval), [100 * v[name] for v in by_seed])
        for name, interval in intervals.items()
    }


def _points(found: Found) -> dict[str, float]:
    mious = {n: metrics.mean_iou(found.scores, ids) for n, ids in found.classes.items()}
    return mious | {"FB-IoU": metrics.fb_iou(found.scores)}


def mean_over_folds(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of figures; its interval takes the folds for independent."""
    values = np.array([fold["ours"] for fold in folds])
    low, high = np.transpose([fold["interval"] for fold in folds])
    value, count = values.mean(), len(folds)
    below, above = math.dist(values, low) / count, math.dist(values, high) / count
    by_seed = np.mean([fold["by_seed"] for fold in folds], axis=0)
    return _figure([value, value - below, value + above], by_seed)


def _figure(interval, by_seed) -> dict[str, Any]:
    value, *ends = (round(float(x), 2) for x in interval)
    std = round(float(np.std(by_seed, ddof=1)), 2) if len(by_seed) > 1 else None
    by_seed = [round(float(x), 2) for x in by_seed]
    return {"ours": value, "interval": ends, "std": std, "by_seed": by_seed}


def _cell(figure: Mapping[str, Any], sign: str = "") -> str:
    shown = (f"{x:{sign}.1f}" for x in (figure["ours"], *figure["interval"]))
    std = "" if figure["std"] is None else f" ± {figure['std']:.1f}"
    return "{} [{}, {}]".format(*shown) + std


# Tables III to V.


def ablation(found: Mapping[str, Sequence[Found]]) -> dict[str, Any]:
    """Return what Tables III to V show: rows by variant, and their differences.

    `found` holds one result a training seed. Raises InputError where the rows, or the
    seeds, weren't trained and scored alike.
    """
    for of_seed in zip(*found.values(), strict=True):
        _agree(of_seed, set(), "the rows of a training seed")
    any_row = next(iter(found.values()))
    _agree(any_row, OWN, "the training seeds")
    others = [name for name in found if name != "full"]
    pairs = [(name, "full") for name in others if "full" in found]
    pairs += zip(others[1:], others[:-1], strict=True)
    return {
        "protocol": any_row[0].facts["text"],
        "same_images": len({one.facts["version"] for one in any_row}) == 1,
        "rows": {name: _beside_paper(name, of) for name, of in found.items()},
        "differences": {f"{a} - {b}": _ordering(a, b, found) for a, b in pairs},
    }


def _beside_paper(variant: str, found: Sequence[Found]) -> dict[str, Any]:
    row = figures(found)
    for name in ("mIoU", "FB-IoU"):  # of no other the paper tells
        row[name]["paper"] = _paper(variant, name)
    return row


def _ordering(a: str, b: str, found: Mapping[str, Sequence[Found]]) -> dict[str, Any]:
    """Return the figures of a - b, each with the paper's and our verdict on it."""
    row = figures(found[a], found[b])
    for name, figure in row.items():
        figure["paper"] = round(_paper(a, name) - _paper(b, name), 1)
        figure["order"] = verdict(
            figure["paper"], figure["interval"], figure["by_seed"]
        )
    return row


def _paper(variant: str, measure: str) -> float:
    row = VARIANTS[variant]
    return row.fb_iou if measure == "FB-IoU" else row.miou


def _ablation_page(table: str, content: Mapping[str, Any]) -> list[str]:
    header, body = ["row", *TICKS[table]], []
    for name, row in content["rows"].items():
        net = QPENet(**VARIANTS[name].fields)
        body.append([name, *("✓" if has(net) else "" for has in TICKS[table].values())])
        for figure in row.values():
            body[-1] += [
                _cell(figure),
                *([str(figure["paper"])] if "paper" in figure else []),
            ]
    for measure, figure in next(iter(content["rows"].values())).items():
        header += [measure, *(["paper"] if "paper" in figure else [])]
    orders = [
        [
            *(pair, measure, f"{figure['paper']:+.1f}", _cell(figure, "+")),
            ", ".join(f"{value:+.1f}" for value in figure["by_seed"]),
            figure["order"],
        ]
        for pair, row in content["differences"].items()
        for measure, figure in row.items()
    ]
    same = "Each training seed generates images of its own, the same for all rows."
    if content["same_images"]:
        same = "All rows and training seeds were scored on the same episodes."
    return [
        markdown(header, body),
        "The paper's figures: PASCAL-5i, mean of the folds, ResNet-50, 1 shot.",
        "## Does the paper's order hold? Paired differences on the same episodes",
        markdown(("rows", "measure", "paper", "ours", "by seed", "order"), orders),
        "Undecided: our interval contains 0, or the seeds differ in sign. A mean over "
        "some classes is held against the paper's mIoU.",
        f"Protocol: {content['protocol']}. {same}",
    ]


# Tables I and II.


def benchmark_table(
    found: Mapping[int, Mapping[str, Mapping[int, Sequence[Found]]]],
) -> dict[str, Any]:
    """Return what Tables I and II show: by shots and backbone every fold, and means.

    `found` holds by shots, backbone and fold one result a training seed. Raises
    InputError where they weren't trained and scored alike.
    """
    protocols = {}
    for shots, rows in found.items():
        every = [one for folds in rows.values() for of in folds.values() for one in of]
        free = OWN | {"fold", "classes", "backbone weights"}
        _agree(every, free, f"the runs with {shots} shot(s)")
        protocols[shots] = every[0].facts["text"]
    return {
        "protocols": protocols,
        "rows": {
            shots: {name: _folds_row(folds) for name, folds in rows.items()}
            for shots, rows in found.items()
        },
    }


def _folds_row(folds: Mapping[int, Sequence[Found]]) -> dict[str, Any]:
    of_folds = {fold: figures(found) for fold, found in folds.items()}
    row = {f"Fold-{fold}": of_fold["mIoU"] for fold, of_fold in of_folds.items()}
    fb_ious = [of_fold["FB-IoU"] for of_fold in of_folds.values()]
    mean = mean_over_folds(list(row.values()))
    return row | {"Mean": mean, "FB-IoU": mean_over_folds(fb_ious)}


def _folds_page(table: str, content: Mapping[str, Any]) -> list[str]:
    parts = []
    for shots, rows in content["rows"].items():
        body, columns = [], list(next(iter(rows.values())))
        for name, row in rows.items():
            body.append([name, "ours", *map(_cell, row.values())])
            if paper := PAPER[table].get((shots, name)):
                shown = dict(zip(COLUMNS, map(str, paper), strict=True))
                body.append([name, "paper", *(shown[column] for column in columns)])
        parts += [
            f"## {shots}-shot",
            markdown(["backbone", "mIoU", *columns], body),
            "Protocol of the first fold, the others alike: "
            f"{content['protocols'][shots]}.",
        ]
    return [
        *parts,
        "Weights trained with 1 shot. Mean and FB-IoU: over the folds shown (the "
        "paper's: over all four), their intervals as if folds were independent.",
    ]


def _cost(content: Mapping[str, Any]) -> list[str]:
    """Return what all pages say at their end."""
    seeds, trained = content["seeds"], content["trained"]
    minutes = [seconds / 60 for seconds in trained["seconds"]] or [math.nan]
    return [
        f"Means over {len(seeds)} training seed(s) ({', '.join(map(str, seeds))}); in "
        "brackets 95 % intervals over query images (Bayesian bootstrap), which say "
        "nothing about other training runs; ± standard deviation over the seeds.",
        f"Trained: {trained['runs']} runs of {', '.join(map(str, trained['steps']))} "
        f"steps, the same settings for every row; {statistics.median(minutes):.1f} min "
        f"a run ({min(minutes):.1f}-{max(minutes):.1f}) with its evaluations, on "
        f"{'; '.join(trained['machines'])}.",
        f"Command: `{content['command']}`",
    ]


def _agree(found: Iterable[Found], free: set[str], what: str) -> None:
    """Refuse results whose protocols or inputs differ in more than `free`."""
    first, *others = found
    for other in others:
        keys = (first.facts.keys() | other.facts.keys()) - free
        differ = sorted(k for k in keys if first.facts.get(k) != other.facts.get(k))
        if differ:
            raise InputError(
                f"{what} were not trained and scored alike ({', '.join(differ)} "
                "differ): choose a new --workdir"
            )

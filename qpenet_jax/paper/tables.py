"""The paper's tables in its layout: our values with their intervals beside its own.

First the content of a table, as its JSON file holds it, then the Markdown page.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qpenet_jax.core import markdown
from qpenet_jax.core.errors import InputError
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.variants import VARIANTS
from qpenet_jax.paper.measures import (
    Found,
    Measured,
    mean_over_folds,
    measured,
    measured_difference,
    verdict,
)
from qpenet_jax.paper.results import (
    ABLATION_RESULTS,
    FOLD_COLUMNS,
    FOLD_RESULTS,
    TABLES,
)

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

GENERATED = {"version", "text", "training images", "validation images"}
"""What may differ between training seeds: generated images depend on the seed."""


# Tables III to V.


def ablation(found: Mapping[str, Sequence[Found]]) -> dict[str, Any]:
    """Returns the content of Tables III to V: rows by variant, and their differences.

    `found` holds one result a training seed. Raises InputError if the rows, or the
    seeds, were not trained and scored alike.
    """
    for of_seed in zip(*found.values(), strict=True):
        _check_alike(of_seed, set(), "the rows of a training seed")
    any_row = next(iter(found.values()))
    _check_alike(any_row, GENERATED, "the training seeds")
    return {
        "protocol": any_row[0].facts["text"],
        "same_images": len({one.facts["version"] for one in any_row}) == 1,
        "rows": {name: _beside_paper(name, of) for name, of in found.items()},
        "differences": {
            f"{a} - {b}": _difference(a, b, found) for a, b in _pairs(list(found))
        },
    }


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns every other row with `full`, then every row with the one above it."""
    others = [name for name in names if name != "full"]
    with_full = [(name, "full") for name in others if "full" in names]
    return [*with_full, *zip(others[1:], others[:-1], strict=True)]


def _beside_paper(variant: str, found: Sequence[Found]) -> dict[str, Measured]:
    row = measured(found)
    for name in ("mIoU", "FB-IoU"):  # the paper gives no others
        row[name]["paper"] = _paper(variant, name)
    return row


def _difference(
    a: str, b: str, found: Mapping[str, Sequence[Found]]
) -> dict[str, Measured]:
    """Returns the measures of a - b, each with the paper's and our verdict on it."""
    row = measured_difference(found[a], found[b])
    for name, ours in row.items():
        ours["paper"] = round(_paper(a, name) - _paper(b, name), 1)
        ours["order"] = verdict(ours["paper"], ours["interval"], ours["by_seed"])
    return row


def _paper(variant: str, measure: str) -> float:
    result = ABLATION_RESULTS[variant]
    return result.fb_iou if measure == "FB-IoU" else result.miou


# Tables I and II.


def benchmark_table(
    found: Mapping[int, Mapping[str, Mapping[int, Sequence[Found]]]],
) -> dict[str, Any]:
    """Returns the content of Tables I and II: every fold and the means.

    `found` holds by shots, backbone and fold one result a training seed. Raises
    InputError if they were not trained and scored alike.
    """
    protocols = {}
    for shots, rows in found.items():
        every = [one for folds in rows.values() for of in folds.values() for one in of]
        free = GENERATED | {"fold", "classes", "backbone weights"}
        _check_alike(every, free, f"the runs with {shots} shot(s)")
        protocols[shots] = every[0].facts["text"]
    return {
        "protocols": protocols,
        "rows": {
            shots: {name: _folds_row(folds) for name, folds in rows.items()}
            for shots, rows in found.items()
        },
    }


def _folds_row(folds: Mapping[int, Sequence[Found]]) -> dict[str, Measured]:
    of_folds = {fold: measured(found) for fold, found in folds.items()}
    row = {f"Fold-{fold}": of_fold["mIoU"] for fold, of_fold in of_folds.items()}
    fb_ious = [of_fold["FB-IoU"] for of_fold in of_folds.values()]
    mean = mean_over_folds(list(row.values()))
    return row | {"Mean": mean, "FB-IoU": mean_over_folds(fb_ious)}


def _check_alike(found: Iterable[Found], free: set[str], what: str) -> None:
    """Refuses results whose protocols or inputs differ in more than `free`."""
    first, *others = found
    for other in others:
        keys = (first.facts.keys() | other.facts.keys()) - free
        differ = sorted(k for k in keys if first.facts.get(k) != other.facts.get(k))
        if differ:
            raise InputError(
                f"{what} were not trained and scored alike ({', '.join(differ)} "
                "differ): choose a new --workdir"
            )


# The page.


def page(table: str, content: Mapping[str, Any]) -> str:
    """Returns a table as a Markdown page, with its protocol, cost and command.

    `content` is that of `ablation` or `benchmark_table`, with "seeds", "trained" and
    "command".
    """
    parts = _ablation_parts if table in TICKS else _folds_parts
    title = f"# {TABLES[table]}, reproduced"
    return "\n\n".join([title, *parts(table, content), *_cost(content)]) + "\n"


def _ablation_parts(table: str, content: Mapping[str, Any]) -> list[str]:
    same = "Each training seed generates images of its own, the same for all rows."
    if content["same_images"]:
        same = "All rows and training seeds were scored on the same episodes."
    return [
        _ablation_rows(table, content["rows"]),
        "The paper's values: PASCAL-5i, mean of the folds, ResNet-50, 1 shot.",
        "## Does the paper's order hold? Paired differences on the same episodes",
        _orders(content["differences"]),
        "Undecided: our interval contains 0, or the seeds differ in sign. A mean over "
        "some classes is compared with the paper's mIoU.",
        f"Protocol: {content['protocol']}. {same}",
    ]


def _ablation_rows(table: str, rows: Mapping[str, Mapping[str, Measured]]) -> str:
    header, body = ["row", *TICKS[table]], []
    for measure, value in next(iter(rows.values())).items():
        header += [measure, *(["paper"] if "paper" in value else [])]
    for name, row in rows.items():
        network = QPENet(**VARIANTS[name].fields)
        ticks = ("✓" if has(network) else "" for has in TICKS[table].values())
        body.append([name, *ticks])
        for value in row.values():
            paper = [str(value["paper"])] if "paper" in value else []
            body[-1] += [_cell(value), *paper]
    return markdown.table(header, body)


def _orders(differences: Mapping[str, Mapping[str, Measured]]) -> str:
    body = [
        [
            *(pair, measure, f"{value['paper']:+.1f}", _cell(value, "+")),
            ", ".join(f"{one:+.1f}" for one in value["by_seed"]),
            value["order"],
        ]
        for pair, row in differences.items()
        for measure, value in row.items()
    ]
    return markdown.table(
        ("rows", "measure", "paper", "ours", "by seed", "order"), body
    )


def _folds_parts(table: str, content: Mapping[str, Any]) -> list[str]:
    parts = []
    for shots, rows in content["rows"].items():
        parts += [
            f"## {shots}-shot",
            _folds_rows(table, shots, rows),
            "Protocol of the first fold; the other folds differ in their classes: "
            f"{content['protocols'][shots]}.",
        ]
    return [
        *parts,
        "The weights were trained with 1 shot. Mean and FB-IoU: over the folds shown "
        "(the paper's: over all four); their intervals take the folds for independent.",
    ]


def _folds_rows(
    table: str, shots: int, rows: Mapping[str, Mapping[str, Measured]]
) -> str:
    body, columns = [], list(next(iter(rows.values())))
    for backbone, row in rows.items():
        body.append([backbone, "ours", *map(_cell, row.values())])
        network = backbone.removesuffix("_deepstem")
        if paper := FOLD_RESULTS[table].get((shots, network)):
            shown = dict(zip(FOLD_COLUMNS, map(str, paper), strict=True))
            body.append([backbone, "paper", *(shown[column] for column in columns)])
    return markdown.table(["backbone", "mIoU", *columns], body)


def _cell(value: Measured, sign: str = "") -> str:
    shown = (f"{x:{sign}.1f}" for x in (value["ours"], *value["interval"]))
    std = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return "{} [{}, {}]".format(*shown) + std


def _cost(content: Mapping[str, Any]) -> list[str]:
    """Returns the end of every page: what the numbers mean and what they took."""
    seeds, trained = content["seeds"], content["trained"]
    minutes = [seconds / 60 for seconds in trained["seconds"]] or [math.nan]
    return [
        f"Means over {len(seeds)} training seed(s) ({', '.join(map(str, seeds))}). In "
        "brackets: 95 % intervals over query images (Bayesian bootstrap), which say "
        "nothing about other training runs. ±: standard deviation over the seeds.",
        f"Trained: {trained['runs']} runs of {', '.join(map(str, trained['steps']))} "
        f"steps, with the same settings for every row. A run with its evaluations took "
        f"{statistics.median(minutes):.1f} min ({min(minutes):.1f} to "
        f"{max(minutes):.1f}) on {'; '.join(trained['machines'])}.",
        f"Command: `{content['command']}`",
    ]

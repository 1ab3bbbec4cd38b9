"""The results of an evaluation as a dictionary, a Markdown table, CSV and files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qpenet_jax.core import markdown
from qpenet_jax.core.files import write_whole
from qpenet_jax.evaluation import metrics
from qpenet_jax.evaluation.metrics import Interval, Scores
from qpenet_jax.evaluation.protocols import Protocol

RESULTS = "results.json"
TABLE = "results.md"
SHEET = "results.csv"

BRACKETS = (
    "In brackets: 95 % intervals over query images (Bayesian bootstrap); they say "
    "nothing about another training run. A class without episodes counts 0."
)

Results = dict[str, Any]
"""What results.json holds; IoU in percent."""


def summarize(
    scores: Scores,
    protocol: Protocol,
    class_ids: Sequence[int],
    subset: Sequence[str] = (),
) -> Results:
    """Returns the contents of results.json; IoU in percent.

    `class_ids` are those of `protocol.classes`, in their order; `subset` names classes
    whose own mean is given beside the mean over all. Nothing in it depends on the time
    or the speed: a run that was killed and went on has the same file.
    """
    found = metrics.estimate(scores, class_ids)
    percents = [iou.percent() for iou in found.per_class]
    per_class = dict(zip(protocol.classes, percents, strict=True))
    fb_iou, *fb_iou_interval = found.fb_iou.percent()
    by_seed = metrics.seed_mean_iou(scores, class_ids)
    mious = list(by_seed.values())
    std = _percent(float(np.std(mious, ddof=1))) if len(mious) > 1 else None
    result = {
        **_mean(found.miou),
        "fb_iou": fb_iou,
        "fb_iou_interval": fb_iou_interval,
        "per_class": {name: iou for name, (iou, *_) in per_class.items()},
        "per_class_interval": {name: ends for name, (_, *ends) in per_class.items()},
        "per_seed": {str(s): _percent(miou) for s, miou in by_seed.items()},
        "seed_spread": {
            "std": std,
            "min": _percent(min(mious)),
            "max": _percent(max(mious)),
        },
        "episodes": protocol.episodes,
        "seeds": list(protocol.seeds),
        "protocol": protocol.to_dict(),
    }
    if subset:
        chosen = [class_ids[protocol.classes.index(name)] for name in subset]
        mean = metrics.estimate(scores, chosen).miou
        result["subset"] = {"classes": list(subset), **_mean(mean)}
    return result


def table(results: dict[str, Results]) -> str:
    """Returns a Markdown table: a column a result, a row a class, means last."""
    rows = []
    for cells in zip(*map(_rows, results.values()), strict=True):
        title = cells[0][0]
        is_class = title in next(iter(results.values()))["per_class"]
        values = [
            f"{iou:.1f}" if is_class else with_interval(iou, (low, high))
            for _, iou, low, high in cells
        ]
        rows.append([title, *values])
    return markdown.table(["IoU %", *results], rows)


def with_interval(value: float, ends: Sequence[float], sign: str = "") -> str:
    """Returns a value and the ends of its interval; with `sign` "+" all have signs."""
    low, high = (f"{end:{sign}.1f}" for end in ends)
    return f"{value:{sign}.1f} [{low}, {high}]"


def _rows(result: Results) -> list[tuple[str, float, float, float]]:
    """Returns title, IoU and the ends of its interval: the classes, then the means."""
    rows = [
        (name, iou, *result["per_class_interval"][name])
        for name, iou in result["per_class"].items()
    ]
    if "subset" in result:
        mean = result["subset"]
        title = "mean of " + ", ".join(mean["classes"])
        rows.append((title, mean["miou"], *mean["miou_interval"]))
    rows.append(("mIoU", result["miou"], *result["miou_interval"]))
    rows.append(("FB-IoU", result["fb_iou"], *result["fb_iou_interval"]))
    return rows


def write_report(folder: Path, results: Results) -> None:
    """Writes results.md, results.csv and last results.json, each whole or not at all.

    So where there is a results.json, the others belong to it. The table stands beside
    `results["references"]`, where there are any; `results["selection"]` is a sentence
    on how the checkpoint was chosen.
    """
    (folder / RESULTS).unlink(missing_ok=True)  # of an evaluation before
    write_whole(folder / TABLE, _page(results))
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerows([("name", "iou", "low", "high"), *_rows(results)])
    write_whole(folder / SHEET, sheet.getvalue())
    write_json(folder / RESULTS, results)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _page(results: Results) -> str:
    """Returns results.md."""
    parts = [
        "# Results",
        f"Protocol: {results['protocol']['text']}",
        table(
            {**results.get("references", {}), results.get("network", "QPENet"): results}
        ),
        *(
            f"Gain over cosine, {what}: {with_interval(value, ends, '+')}"
            for what, (value, *ends) in results.get("gain_over_cosine", {}).items()
        ),
        _seeds(results),
        BRACKETS,
    ]
    for what, which in results.get("shared", {}).items():
        parts.append(f"Warning: {what}: {which}")
    for retry in results.get("retries", []):
        parts.append(
            f"Warning: {retry['found']} at step {retry['at']} of the training, which "
            f"went back to step {retry['to']} and on with other episodes"
        )
    if "selection" in results:
        parts.append(f"Checkpoint: {results['selection']}")
    if "dtype" in results:
        parts.append(f"Computed in {results['dtype']} on {results['device']}")
    return "\n\n".join(parts) + "\n"


def _seeds(results: Results) -> str:
    """Returns the sentence on the spread over seeds."""
    spread, seeds = results["seed_spread"], results["per_seed"]
    if spread["std"] is None:
        return f"Spread over seeds: unknown, there is one (seed {next(iter(seeds))})."
    values = ", ".join(f"{seed}: {miou:.1f}" for seed, miou in seeds.items())
    return (
        f"Spread over {len(seeds)} seeds: mIoU {spread['min']:.1f} to "
        f"{spread['max']:.1f}, standard deviation {spread['std']:.2f} ({values})."
    )


def _mean(miou: Interval) -> Results:
    value, *ends = miou.percent()
    return {"miou": value, "miou_interval": ends}


def _percent(value: float) -> float:
    return round(100 * float(value), 2)

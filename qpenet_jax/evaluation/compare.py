"""Is one result better than another? Paired differences on their common episodes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpenet_jax.core import markdown
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.metrics import (
    Interval,
    Scores,
    common_episodes,
    estimate,
    estimate_difference,
    load_scores,
    mean_iou,
)
from qpenet_jax.evaluation.report import RESULTS, with_interval

EPISODES = "episodes_qpenet.csv"
"""The scores beside a results.json that doesn't name its "episodes_file"."""

DERIVED = {"text", "name", "preset"}
"""Entries of a protocol that only repeat the others in words."""

ROUNDING = 0.011
"""results.json holds percent with two decimals."""

LONGEST_VALUE = 40
"""In a message, in characters; longer values are cut off."""

HEADER = ("IoU %", "A", "B", "B - A", "episodes")

Differences = dict[str, list[Any]]
"""The two values of every entry in which two protocols differ."""


def compare_results(
    a: Path, b: Path, *, different_protocols: bool = False
) -> dict[str, Any]:
    """Returns A, B and B - A in IoU percent, all on the episodes common to both.

    `a` and `b` are results.json files, or their folders, with the scores of the
    episodes beside them. The differences have 95 % intervals over query images;
    classes that only one of the two scored are left out.

    Raises:
        InputError: a file is missing or broken; the data sets differ; the protocols
            differ and `different_protocols` isn't set; no episode or class is common.
    """
    (a, _), (b, _) = files_of(a), files_of(b)
    first, second = _read(a), _read(b)
    protocols = first["protocol"], second["protocol"]
    entries = [key for key in {**protocols[0], **protocols[1]} if key not in DERIVED]
    values = {key: [protocol.get(key) for protocol in protocols] for key in entries}
    differs = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    _refuse(differs, f"{a} and {b}", different_protocols)
    all_a, all_b = episode_scores(a, first), episode_scores(b, second)
    try:
        common = common_episodes(all_a, all_b)
    except InputError as error:
        raise InputError(f"{a} and {b}: {error}") from None
    # Of different folds no episode is common, so there is one class at least.
    names = dict(zip(first["class_ids"], protocols[0]["classes"], strict=True))
    names = {i: name for i, name in names.items() if i in second["class_ids"]}
    counts = [len(scores.rows) for scores in (common[0], all_a, all_b)]
    return {
        "a": str(a),
        "b": str(b),
        "selection": [result.get("selection", "") for result in (first, second)],
        "protocol": protocols[0]["text"],
        "differs": differs,
        "episodes": dict(zip(("common", "a", "b"), counts, strict=True)),
        **_paired(*common, names),
    }


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Returns a comparison as Markdown: what was compared, then the table."""
    episodes, differs = comparison["episodes"], comparison["differs"]
    lines = [
        f"{name}: {comparison[name.lower()]}{selection and f' ({selection})'}"
        for name, selection in zip("AB", comparison["selection"], strict=True)
    ]
    lines.append(f"Protocol{' of A' if differs else ''}: {comparison['protocol']}")
    if differs:
        lines.append(f"DIFFERENT PROTOCOLS, A / B: {_listed(differs)}")
    lines.append(
        f"Common episodes: {episodes['common']}, of {episodes['a']} in A and "
        f"{episodes['b']} in B; all numbers are on these."
    )
    means = {"mIoU": comparison["miou"], "FB-IoU": comparison["fb_iou"]}
    rows = [
        [
            name,
            f"{row['a']:.1f}",
            f"{row['b']:.1f}",
            with_interval(row["difference"], row["interval"], "+"),
            str(row.get("episodes", episodes["common"])),
        ]
        for name, row in (comparison["per_class"] | means).items()
    ]
    lines.append(markdown.table(HEADER, rows))
    lines.append(
        "In brackets: 95 % intervals of the paired difference over query images "
        "(Bayesian bootstrap). A class without episodes counts 0."
    )
    return "\n\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    """Returns a results.json that has all that a comparison needs."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        protocol = results["protocol"]
        whole = (
            {"text", "dataset", "classes"} <= set(protocol)
            and len(protocol["classes"]) == len(set(results["class_ids"])) > 0
            and isinstance(results["miou"], float | int)
            and isinstance(results.get("episodes_file", EPISODES), str)
        )
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; `qpenet evaluate` writes one"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise InputError(
            f"{path}: not a results.json of `qpenet evaluate`, or broken; evaluate "
            "again"
        )
    return results


def files_of(results: Path) -> tuple[Path, Path]:
    """Returns the results.json that a file or folder stands for, and its episodes.

    Raises:
        InputError: no results.json.
    """
    path = results / RESULTS if results.is_dir() else results
    return path, path.parent / _read(path).get("episodes_file", EPISODES)


def episode_scores(path: Path, results: Mapping[str, Any]) -> Scores:
    """Returns the episodes of a results.json; raises InputError unless of its mIoU."""
    _, episodes = files_of(path)
    scores = load_scores(episodes)
    miou = 100 * mean_iou(scores, results["class_ids"])
    if abs(miou - results["miou"]) > ROUNDING:
        raise InputError(
            f"{episodes}: not the episodes of {path} (mIoU {miou:.2f}, there "
            f"{results['miou']:.2f}), as after an interrupted run; evaluate again"
        )
    return scores


def _paired(a: Scores, b: Scores, names: dict[int, str]) -> dict[str, Any]:
    """Returns the rows of the comparison: each class, mIoU and FB-IoU."""
    found = (
        estimate(a, list(names)),
        estimate(b, list(names)),
        estimate_difference(b, a, list(names)),
    )
    columns = [(*each.per_class, each.miou, each.fb_iou) for each in found]
    *per_class, miou, fb_iou = map(_row, *columns)
    class_ids = a.column("class_id")
    for row, i in zip(per_class, names, strict=True):
        row["episodes"] = int((class_ids == i).sum())
    by_name = dict(zip(names.values(), per_class, strict=True))
    return {"per_class": by_name, "miou": miou, "fb_iou": fb_iou}


def _refuse(differs: Differences, files: str, different_protocols: bool) -> None:
    """Refuses protocols that differ more than they may."""
    if "version" in differs:  # an index means another image
        version = _listed({"version": differs["version"]})
        raise InputError(
            f"{files}: different data ({version}), so no episode is common; evaluate "
            "both on the same data set"
        )
    if differs and not different_protocols:
        raise InputError(
            f"{files}: different protocols ({_listed(differs)}); evaluate both by one, "
            "or compare their common episodes with --different-protocols"
        )


def _listed(differs: Differences) -> str:
    return ", ".join(
        f"{key} {_short(a)} / {_short(b)}" for key, (a, b) in differs.items()
    )


def _short(value: Any) -> str:
    """Returns a value for a message."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value or "")
    if len(text) > LONGEST_VALUE:
        return text[: LONGEST_VALUE - 3] + "..."
    return text or "(none)"


def _row(a: Interval, b: Interval, difference: Interval) -> dict[str, Any]:
    value, *ends = difference.percent()
    of_a, of_b = a.percent()[0], b.percent()[0]
    return {"a": of_a, "b": of_b, "difference": value, "interval": ends}

"""What the runs of a table left behind: their results, episodes, time and machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpenet_jax.config import selections
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.compare import episode_scores
from qpenet_jax.evaluation.report import RESULTS
from qpenet_jax.paper.measures import Found
from qpenet_jax.paper.plan import PlannedRun
from qpenet_jax.runs.build import complete, identity
from qpenet_jax.runs.folder import INPUTS_FILE, read_config

COST = "cost.json"
"""Seconds that a run took, over all its attempts, and the machine."""


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
    return before.identity == identity(run.config)


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

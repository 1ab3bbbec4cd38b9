"""`qpenet reproduce`: a table of the paper, our values beside the paper's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpenet_jax.core.files import local_path, refuse_overwriting, write_whole
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.paper.cost import print_plan
from qpenet_jax.paper.execute import execute, interruptible
from qpenet_jax.paper.finished import by_fold, by_variant, training_facts
from qpenet_jax.paper.plan import Plan, PlannedRun
from qpenet_jax.paper.tables import ablation, benchmark_table, page
from qpenet_jax.runs.datasets import files_read


def reproduce(
    table: str,
    config_file: str | Path,
    workdir: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    rows: Sequence[str] = (),
    backbones: Sequence[str] = ("resnet50", "resnet101"),
    folds: Sequence[int] = (0, 1, 2, 3),
    dry_run: bool = False,
) -> None:
    """Trains and score all runs of a table that aren't yet; write and prints it.

    Writes `<workdir>/<table>.md` and `.json`; `Plan` says which runs there are. Every
    row has the config's settings with the `overrides`, written `--config.x=y`. A dry
    run prints the plan and its measured cost, and writes nothing.

    Raises:
        InputError: bad input, a run in use, or runs failed; their logs are named.
        SystemExit: 130, after Ctrl-C; the same call goes on.
    """
    plan = Plan(
        table,
        config_file,
        local_path(workdir),
        tuple(seeds or ()),
        overrides,
        rows,
        backbones,
        folds,
    )
    runs = plan.runs()
    if dry_run:
        print_plan(runs)
        return
    read = [path for run in runs for path in files_read(run.config)]
    written = [plan.file, plan.file.with_suffix(".json")]
    refuse_overwriting(written, [local_path(config_file), *read])
    with interruptible():
        execute(runs)
    content = _content(plan, runs)
    text = page(table, content)
    write_whole(plan.file, text)
    write_json(plan.file.with_suffix(".json"), content)
    print(f"\n{text}\nwritten to {plan.file} and .json")


def _content(plan: Plan, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Returns what the table's JSON file holds."""
    made = (
        ablation(by_variant(runs))
        if plan.is_ablation
        else benchmark_table(by_fold(runs))
    )
    trained = training_facts(runs)
    return {"command": plan.command, "seeds": plan.seeds, "trained": trained} | made

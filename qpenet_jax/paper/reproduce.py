"""`qpenet reproduce`: a table of the paper, our values beside the paper's.

Each run is trained and scored in a process and a folder of its own. So a run can be
stopped and resumed as any training can, and has the device's whole memory.
"""

import contextlib
import dataclasses
import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from qpenet_jax.config import selections
from qpenet_jax.core import markdown
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path, refuse_overwriting, write_whole
from qpenet_jax.evaluation.protocols import of_dataset
from qpenet_jax.evaluation.report import RESULTS, write_json
from qpenet_jax.evaluation.scoring import score_episodes
from qpenet_jax.paper.plan import Plan, PlannedRun
from qpenet_jax.paper.tables import page, table_content
from qpenet_jax.runs.build import build_predictor, build_weights
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_eval_samplers,
    build_protocol,
    files_read,
    selection_protocols,
)
from qpenet_jax.runs.folder import read_json
from qpenet_jax.training.preflight import first_steps

LOG = "train.log"
"""All that a run's processes print."""

MEASURED_STEPS, MEASURED_EPISODES = 20, 10

RunProcess = Callable[[Sequence[str], BinaryIO], int]
"""Runs a command with its output in a file and returns its exit code."""


def run_process(command: Sequence[str], log: BinaryIO) -> int:
    """Runs a command as a process and returns its exit code."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reached it as well, a signal to us alone did not. SIGTERM after
        # SIGINT is no second Ctrl-C to a training: it saves its step, then ends.
        process.terminate()
        process.wait()
        raise
    finally:
        process.kill()  # nothing where it has ended


def reproduce(
    plan: Plan, *, dry_run: bool = False, run_process: RunProcess = run_process
) -> None:
    """Trains and scores all runs of a table that aren't yet; writes and prints it.

    Writes `<workdir>/<table>.md` and `.json`. A dry run prints the plan and its
    measured cost, and writes nothing. `run_process` runs the command of a run.

    Raises:
        InputError: bad input, or runs failed; their logs are named.
        KeyboardInterrupt: after Ctrl-C; the run that was trained is saved.
    """
    runs = plan.runs()
    if dry_run:
        print_plan(runs)
        return
    file = local_path(plan.workdir) / f"{plan.table}.md"
    read = [path for run in runs for path in files_read(run.config)]
    written = [file, file.with_suffix(".json")]
    refuse_overwriting(written, [local_path(plan.config), *read])
    failed = 0
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.name}:", end=" ", flush=True)
        if not run.to_score:
            print(f"done before, {_scores(run)}")
            continue
        start = time.monotonic()
        try:
            error = _execute(run, run_process)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped: the same command goes on") from None
        minutes = (time.monotonic() - start) / 60
        print(f"{error or _scores(run)}, {minutes:.1f} min", flush=True)
        failed += bool(error)
    if failed:
        raise InputError(
            f"{failed} of {len(runs)} runs failed, see their logs; the same command "
            "tries them again"
        )
    content = table_content(plan, runs)
    text = page(content)
    write_whole(file, text)
    write_json(file.with_suffix(".json"), content)
    print(f"\n{text}\nwritten to {file} and .json")


def _execute(run: PlannedRun, run_process: RunProcess) -> str:
    """Trains and scores what isn't yet; returns an error in one line, or ""."""
    log = run.folder / LOG
    run.folder.mkdir(parents=True, exist_ok=True)
    for shots in run.to_score:
        with log.open("ab") as file:
            before = file.tell()
            code = run_process(run.command(shots), file)
        if code:
            printed = log.read_bytes()[before:].decode(errors="replace")
            error = last_error(printed) or f"exit code {code}"
            return f"FAILED ({error}), log: {log}"
    return ""


def last_error(printed: str) -> str:
    """Returns a log's last line, without the progress bar before "error:"."""
    lines = printed.strip().splitlines() or [""]
    start = max(lines[-1].find("error: "), 0)
    return lines[-1][start:].strip()


def _scores(run: PlannedRun) -> str:
    results = read_json(run.folder / RESULTS)
    return f"mIoU {results['miou']:.1f}, FB-IoU {results['fb_iou']:.1f}"


# The dry run.

STEP = "step"
"""Key of a training step, beside numbers of shots, which stand for scored episodes."""


def measured_cost(run: PlannedRun) -> dict[Any, float]:
    """Returns seconds by STEP and numbers of shots, once all is compiled."""
    config = run.config
    with contextlib.closing(first_steps(config)) as stream:
        steps = list(itertools.islice(stream, 1 + MEASURED_STEPS))
    predict = build_predictor(config, steps[-1].state.params, build_weights(config))
    val = build_dataset(config, "val")

    def per_episode(shots):
        protocol = of_dataset(build_protocol(config, shots=shots), val)
        samplers = build_eval_samplers(config, val, protocol)[:1]
        start = 0.0
        for count in (1, MEASURED_EPISODES):  # the first compiles
            start = time.perf_counter()
            few = dataclasses.replace(protocol, episodes=count)
            score_episodes(predict, val, few, samplers, label=f"{shots} shot(s)")
        return (time.perf_counter() - start) / MEASURED_EPISODES

    per_step = statistics.mean(step.took for step in steps[1:])  # the first compiles
    return {STEP: per_step} | {shots: per_episode(shots) for shots in run.shots}


def print_plan(
    runs: Sequence[PlannedRun],
    measure: Callable[[PlannedRun], dict[Any, float]] = measured_cost,
) -> None:
    """Prints every run, whether it is done, and the time of all that are not.

    One of each backbone is measured, its last, which of the ablations is `full`.
    """
    last = {run.config.backbone.name: run for run in runs}
    costs = {backbone: measure(run) for backbone, run in last.items()}
    rows, seconds = [], []
    for run in runs:
        cost, counts = costs[run.config.backbone.name], _counts(run)
        if run.to_score:
            seconds.append(sum(cost[what] * count for what, count in counts.items()))
        steps, state = counts.pop(STEP), "to do" if run.to_score else "done"
        rows.append([run.name, f"{steps:,}", f"{sum(counts.values()):,}", state])
    print(markdown.table(("run", "steps", "episodes scored", "state"), rows))
    for backbone, cost in costs.items():
        each = (f"{cost[k]:.2f} s an episode of {k} shot(s)" for k in cost if k != STEP)
        print(f"{last[backbone].name}: {cost[STEP]:.2f} s a step, {', '.join(each)}")
    print(
        f"(measured on {MEASURED_STEPS} steps and {MEASURED_EPISODES} episodes)\n"
        f"{len(runs)} runs, {len(seconds)} to do: about {sum(seconds) / 3600:.1f} h, "
        "without start-up and compilation; nothing was written"
    )


def _counts(run: PlannedRun) -> dict[Any, int]:
    """Returns a run's steps, and its scored episodes by shots, selection included."""
    config, steps = run.config, run.steps
    names, protocol = selections(config), build_protocol(config)
    counts = dict.fromkeys(run.shots, protocol.episodes * len(protocol.seeds))
    # Once for each selection, and without training by two references.
    counts[run.shots[0]] *= len(names) + 2 * config.eval.references
    for of in selection_protocols(config, names).values():
        times = math.ceil(steps / config.eval.every)
        counts[run.shots[0]] += times * of.episodes * len(of.seeds)
    return {STEP: steps} | counts

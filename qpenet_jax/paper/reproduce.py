"""`qpenet reproduce`: a table of the paper, our values beside the paper's.

Each run is trained and scored in a process and a folder of its own. So a run can be
stopped and resumed as any training can, and has the device's whole memory.
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path, refuse_overwriting, write_whole
from qpenet_jax.evaluation.report import RESULTS, write_json
from qpenet_jax.paper.cost import print_plan
from qpenet_jax.paper.plan import PROGRAM, Plan, PlannedRun
from qpenet_jax.paper.tables import page, table_content
from qpenet_jax.runs.datasets import files_read
from qpenet_jax.runs.folder import read_json

LOG = "train.log"
"""All that a run's processes print."""

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
    refuse_overwriting(written, [local_path(plan.config_file), *read])
    try:
        execute(runs, run_process)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped: the same command goes on") from None
    content = table_content(plan, runs)
    text = page(content)
    write_whole(file, text)
    write_json(file.with_suffix(".json"), content)
    print(f"\n{text}\nwritten to {file} and .json")


def execute(runs: Sequence[PlannedRun], run_process: RunProcess = run_process) -> None:
    """Trains and scores what isn't yet, and prints a line for every run.

    Raises:
        InputError: runs failed: see their logs.
    """
    failed = 0
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.name}:", end=" ", flush=True)
        if run.is_done:
            print(f"done before, {scores_line(run)}")
            continue
        start = time.monotonic()
        error = _execute_one(run, run_process)
        minutes = (time.monotonic() - start) / 60
        print(f"{error or scores_line(run)}, {minutes:.1f} min", flush=True)
        failed += bool(error)
    if failed:
        raise InputError(
            f"{failed} of {len(runs)} runs failed, see their logs; the same command "
            "tries them again"
        )


def _execute_one(run: PlannedRun, run_process: RunProcess) -> str:
    """Trains and scores; returns an error in one line, empty if there is none."""
    log = run.folder / LOG
    run.folder.mkdir(parents=True, exist_ok=True)
    for shots in run.shots:
        if run.results_file(shots):
            continue
        with log.open("ab") as file:
            before = file.tell()
            code = run_process(_command(run, shots), file)
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


def _command(run: PlannedRun, shots: int) -> list[str]:
    """Returns what scores with `shots`: training for the first number of them."""
    if shots == run.shots[0]:
        return run.command
    words = ["--workdir", run.folder, "--shots", shots]
    words += ["--out", run.folder / f"{shots}shot"]
    return [*PROGRAM, "evaluate", *map(str, words)]


def scores_line(run: PlannedRun) -> str:
    """Returns the scores of a finished run for one line of text."""
    results = read_json(run.folder / RESULTS)
    return f"mIoU {results['miou']:.1f}, FB-IoU {results['fb_iou']:.1f}"

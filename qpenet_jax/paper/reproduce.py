"""`qpenet reproduce`: a table of the paper, our values beside the paper's.

Each run is trained and scored in a process and a folder of its own. So a run can be
stopped and resumed as any training can, and has the device's whole memory.
"""

import contextlib
import functools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import (
    local_path,
    locked,
    refuse_overwriting,
    write_whole,
)
from qpenet_jax.core.runtime import processor
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.paper.cost import print_plan
from qpenet_jax.paper.measures import (
    COST,
    by_fold,
    by_variant,
    is_done,
    results_file,
    scores_line,
    training_facts,
)
from qpenet_jax.paper.plan import PROGRAM, Plan, PlannedRun
from qpenet_jax.paper.tables import ablation, benchmark_table, page
from qpenet_jax.runs.datasets import files_read

LOG = "train.log"
"""All that a run's processes print."""

LOCK = "reproduce.lock"
"""Held while a run's process is waited for; training holds a lock of its own."""

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
        InputError: bad input, a run in use, or runs failed; their logs are named.
        SystemExit: 130, after Ctrl-C; the same call goes on.
    """
    runs = plan.runs()
    if dry_run:
        print_plan(runs)
        return
    read = [path for run in runs for path in files_read(run.config)]
    written = [plan.file, plan.file.with_suffix(".json")]
    refuse_overwriting(written, [local_path(plan.config_file), *read])
    with interruptible():
        execute(runs, run_process)
    content = _content(plan, runs)
    text = page(plan.table, content)
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


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Takes SIGTERM for Ctrl-C; after either, prints one line and exits with 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def execute(runs: Sequence[PlannedRun], run_process: RunProcess = run_process) -> None:
    """Trains and scores what isn't yet, and prints a line for every run.

    Raises:
        InputError: a run is in use by another process, or runs failed: see their logs.
        KeyboardInterrupt: after Ctrl-C; the run that was trained is saved.
    """
    minutes, failed = [], 0
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.name}:", end=" ", flush=True)
        if is_done(run):
            print(f"done before, {scores_line(run)}")
            continue
        start = time.monotonic()
        error = _execute_one(run, run_process)
        minutes.append((time.monotonic() - start) / 60)
        failed += bool(error)
        left = sum(not is_done(later) for later in runs[number:])
        remaining = f"about {left * statistics.mean(minutes):.0f} min for the {left}"
        result = f"{error or scores_line(run)}, {minutes[-1]:.1f} min"
        print(f"{result}; {remaining} left", flush=True)
    if failed:
        raise InputError(
            f"{failed} of {len(runs)} runs failed, see their logs; the same command "
            "tries them again"
        )


def _execute_one(run: PlannedRun, run_process: RunProcess) -> str:
    """Trains and scores; returns an error in one line, empty if there is none."""
    log = run.folder / LOG
    message = f"{run.folder} is in use by another process: wait for it, or end it"
    for shots in run.shots:
        if results_file(run, shots):
            continue
        with locked(run.folder / LOCK, message), log.open("ab") as file:
            before = log.stat().st_size
            with _timed(run.folder / COST):
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


@contextlib.contextmanager
def _timed(cost: Path) -> Iterator[None]:
    """Adds the seconds that the `with` takes to those in the file."""
    machine, start = _machine(), time.monotonic()
    try:
        yield
    finally:
        before = json.loads(cost.read_text())["seconds"] if cost.exists() else 0
        seconds = round(before + time.monotonic() - start, 1)
        write_json(cost, {"seconds": seconds, "machine": machine})


@functools.cache
def _machine() -> str:
    """Returns processor, JAX device (asked in another process) and versions."""
    code = "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return (
        f"{os.cpu_count()} x {processor()}, JAX device {asked.stdout.strip()}, Python "
        f"{platform.python_version()}, jax {jax.__version__}"
    )

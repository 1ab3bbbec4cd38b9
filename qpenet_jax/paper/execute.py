"""Train and score the planned runs, each in a process and a folder of its own.

So a run can be stopped and resumed as any training can, and has the device's whole
memory: nothing is computed on it here meanwhile.
"""

import contextlib
import functools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import jax

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import locked
from qpenet_jax.core.runtime import processor
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.paper.finished import COST, is_done, results_file, scores_line
from qpenet_jax.paper.plan import PROGRAM, PlannedRun

LOG = "train.log"
"""All that a run's processes print."""

LOCK = "reproduce.lock"
"""Held while a run's process is waited for; training holds a lock of its own."""

ERROR_LINE = re.compile(
    r"(?:^|[\r\]] *)((?:error|[\w.]+(?:Error|Exception)): .*)", re.MULTILINE
)
"""At the start of a line, or behind a progress bar, which ends no line."""


def execute(runs: Sequence[PlannedRun]) -> None:
    """Trains and score what isn't yet, and print a line for every run.

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
        error = _execute_one(run)
        minutes.append((time.monotonic() - start) / 60)
        failed += bool(error)
        left = sum(not is_done(later) for later in runs[number:])
        remaining = f"about {left * statistics.mean(minutes):.0f} min for the {left}"
        told = f"{error or scores_line(run)}, {minutes[-1]:.1f} min"
        print(f"{told}; {remaining} left", flush=True)
    if failed:
        raise InputError(
            f"{failed} of {len(runs)} runs failed, see their logs; the same command "
            "tries them again"
        )


def _execute_one(run: PlannedRun) -> str:
    """Trains and score; return an error in one line, empty if there is none."""
    log = run.folder / LOG
    for shots in run.shots:
        if results_file(run, shots):
            continue
        before = log.stat().st_size if log.exists() else 0
        code = run_logged(_command(run, shots), log)
        if code:
            printed = log.read_bytes()[before:].decode(errors="replace")
            errors = ERROR_LINE.findall(printed) or [f"exit code {code}"]
            return f"FAILED ({errors[-1]}), log: {log}"
    return ""


def _command(run: PlannedRun, shots: int) -> list[str]:
    """Returns what scores with `shots`: training for the first number of them."""
    if shots == run.shots[0]:
        return run.command
    words = ["--workdir", run.folder, "--shots", shots]
    words += ["--out", run.folder / f"{shots}shot"]
    return [*PROGRAM, "evaluate", *map(str, words)]


def run_logged(command: Sequence[str], log: Path) -> int:
    """Runs a command to its end, output appended to `log`; return its exit code.

    The time it took is added up in the file COST beside the log.

    Raises:
        InputError: another process runs a command with this log.
    """
    message = f"{log.parent} is in use by another process: wait for it, or end it"
    with locked(log.with_name(LOCK), message), log.open("ab") as file, _timed(log):
        return _run(command, file)


def _run(command: Sequence[str], log: BinaryIO) -> int:
    """Runs a command as a process; return its exit code."""
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


@contextlib.contextmanager
def _timed(log: Path) -> Iterator[None]:
    """Adds the seconds that the `with` takes to those in the file COST."""
    cost, machine, start = log.with_name(COST), _machine(), time.monotonic()
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

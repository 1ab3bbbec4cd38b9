"""Run one case in a new process, for its start and its peak memory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from qpenet_jax.benchmark.contenders import Contender
from qpenet_jax.core.errors import InputError


def run_child(module: str, **told: Any) -> dict[str, Any]:
    """Runs `python -m module` with a JSON object; return the one that it prints last.

    The child also gets the time of its start, in seconds since the epoch.

    Raises:
        InputError: it failed, with its last line.
    """
    text = json.dumps(told | {"started": time.time()})
    printed = run_module(
        [module, text],
        lambda reason: (
            f"{module} failed in a process of its own ({reason}): give a smaller "
            "--size or --batch"
        ),
    )
    return json.loads(printed.splitlines()[-1])


def run_module(
    words: Sequence[str], told: Callable[[str], str], **environment: str
) -> str:
    """Runs `python -m` with these words in a new process; return what it printed.

    Raises:
        InputError: it failed; what `told` makes of its last line.
    """
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **paths, **environment},
    )
    if done.returncode:
        reasons = done.stderr.strip().splitlines() or ["killed, out of memory?"]
        raise InputError(told(reasons[-1]))
    return done.stdout


def child_report(
    contender: Contender, started: float, at_import: int, memory: Callable[[], int]
) -> None:
    """Does three steps and prints what `run_child` returns.

    `start_s` is from the start of the process to the end of its first step; `memory`
    returns the peak in bytes, of which the libraries took `at_import`.
    """
    contender.call()
    start = time.time() - started
    contender.call()
    contender.call()
    found = {"start_s": start, "peak_bytes": memory(), "import_bytes": at_import}
    print(json.dumps(found))

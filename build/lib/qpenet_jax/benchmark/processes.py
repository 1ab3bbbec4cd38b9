"""Run one case in a new process, for its start and its peak memory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from qpenet_jax.benchmark.contenders import Contender
from qpenet_jax.core.errors import InputError


def run_child(module: str, **told: Any) -> dict[str, Any]:
    """Run `python -m module` with a JSON object; return the one that it prints last.

    The child also gets the time of its start, in seconds since the epoch.

    Raises:
        InputError: it failed, with its last line.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    text = json.dumps(told | {"started": time.time()})
    command = [sys.executable, "-P", "-m", module, text]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, out of memory?"])[-1]
        raise InputError(
            f"{module} failed in a process of its own ({reason}): give a smaller "
            "--size or --batch"
        )
    return json.loads(done.stdout.splitlines()[-1])


def child_report(
    contender: Contender, started: float, at_import: int, memory: Callable[[], int]
) -> None:
    """Do three steps and print what `run_child` returns.

    `start_s` is from the start of the process to the end of its first step; `memory`
    returns the peak in bytes, of which the libraries took `at_import`.
    """
    contender.call()
    start = time.time() - started
    contender.call()
    contender.call()
    found = {"start_s": start, "peak_bytes": memory(), "import_bytes": at_import}
    print(json.dumps(found))

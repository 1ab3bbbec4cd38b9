"""Run modules in new processes; as a program, measure one case in its own process."""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from qpenet_jax.benchmark.made_up import made_up_episodes
from qpenet_jax.benchmark.settings import Case
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.runtime import keep_freed_memory


def run_module(words: Sequence[str], **environment: str) -> str:
    """Runs `python -m` with these words in a new process and returns what it printed.

    Raises:
        InputError: it failed, with its last line.
    """
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **paths, **environment},
    )
    if done.returncode:
        killed = "killed; out of memory? Give a smaller --size or --batch"
        reasons = done.stderr.strip().splitlines() or [killed]
        raise InputError(f"a process of {words[0]} failed: {reasons[-1]}")
    return done.stdout


def run_case(case: Case, **options: str) -> dict[str, Any]:
    """Returns the measurements of `main` from a new process.

    Raises:
        InputError: it failed, with its last line.
    """
    given = {"case": dataclasses.asdict(case), "started": time.time(), **options}
    return json.loads(run_module([__name__, json.dumps(given)]).splitlines()[-1])


def main() -> None:
    """Does three steps of the case in the JSON argument and prints JSON.

    "start_s" is from the start of the process to the end of the first step, and
    "peak_bytes" the peak memory, of which the libraries took "import_bytes". With
    `variant` it is PyTorch on `device`, otherwise JAX with its compilation `cache`.
    """
    given = json.loads(sys.argv[1])
    case = Case(**given["case"])
    keep_freed_memory()
    if "variant" in given:
        torch_side = importlib.import_module("qpenet_jax.benchmark.torch_side")
        memory = functools.partial(torch_side.device_memory, given["device"])
        at_import = memory()
        options = given["variant"], given["device"], made_up_episodes(case)
        step = torch_side.torch_candidate(case, *options).call
    else:
        from qpenet_jax.benchmark import jax_side

        jax.config.update("jax_compilation_cache_dir", given["cache"])
        memory = jax_side.device_memory
        at_import = memory()
        # Training starts with a compiled initialisation, so that counts, too.
        params = jax_side.initial_params(case)
        weights = jax_side.random_weights(case)._replace(params=params)
        step = jax_side.jax_candidate(case, weights, made_up_episodes(case)).call
    step()
    start = time.time() - given["started"]
    step()
    step()
    found = {"start_s": start, "peak_bytes": memory(), "import_bytes": at_import}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

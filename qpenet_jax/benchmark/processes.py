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

from qpenet_jax.benchmark.made_up import made_up_episodes
from qpenet_jax.benchmark.settings import Case
from qpenet_jax.benchmark.speed_report import Row
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


def run_case(case: Case, variant: str, device: str, cache: str) -> Row:
    """Returns the measurements of `main` from a new process.

    It takes its compilations from the folder `cache` and leaves them there. Raises
    InputError as `run_module` does.
    """
    given = [dataclasses.asdict(case), variant, device, time.time()]
    words = [__name__, json.dumps(given)]
    printed = run_module(words, JAX_COMPILATION_CACHE_DIR=cache)
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    """Does three steps of the case in the JSON argument and prints a row as JSON.

    "start, s" is from the start of the process to the end of the first step, and "MiB"
    the peak memory, of which importing the libraries took "imports, MiB". The variant
    is "JAX", or one of PyTorch on a device.
    """
    fields, variant, device, started = json.loads(sys.argv[1])
    case = Case(**fields)
    keep_freed_memory()
    if variant == "JAX":
        from qpenet_jax.benchmark import jax_side

        memory = jax_side.device_memory
        imports = memory()
        # Training starts with a compiled initialisation, so that counts, too.
        params = jax_side.initial_params(case)
        weights = jax_side.random_weights(case)._replace(params=params)
        step = jax_side.jax_candidate(case, weights, made_up_episodes(case)).call
    else:
        torch_side = importlib.import_module("qpenet_jax.benchmark.torch_side")
        memory = functools.partial(torch_side.device_memory, device)
        imports = memory()
        episodes = made_up_episodes(case)
        step = torch_side.torch_candidate(case, variant, device, episodes).call
    step()
    start = time.time() - started
    step()
    step()
    row = {"MiB": memory() / 2**20, "imports, MiB": imports / 2**20}
    print(json.dumps({"start, s": start} | row))


if __name__ == "__main__":
    main()

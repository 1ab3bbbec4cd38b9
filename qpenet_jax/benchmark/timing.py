"""How things are compared: in turns, in one process, once their results are equal."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qpenet_jax.benchmark.settings import Case
from qpenet_jax.core.errors import InputError

Row = dict[str, Any]
"""Cells by the header of their column: text, a number, quartiles, or None."""


class Table(NamedTuple):
    """What was measured in the same way, and a sentence about it above the rows."""

    caption: str
    rows: list[Row]


TURN = 1.0
"""Seconds that a turn lasts at least: short calls are repeated. The first call of a
turn isn't timed, as the caches hold another's data and its own threads sleep."""

PAUSE = 0.05
"""Seconds between turns, in which the idle threads of the one before stop spinning."""

ROUNDS = 5

Clock = Callable[[], float]


def measure(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float = 0.0,
    clock: Clock = perf_counter,
) -> list[Row]:
    """Calls all in turns, A B A B, and returns a row with quartiles for each.

    "ms" is the time of a call, "ratio" the first's time divided by its own in the same
    round. It goes on for `seconds`, and for ROUNDS at least, after a round of warm-up;
    a turn lasts no longer than `seconds`. With `time.process_time` as `clock` times are
    those of all cores together, which other work on the machine changes less.
    """
    longest = max(_seconds(call, 1, clock) for call in calls.values())
    repeats = max(1, math.ceil(min(TURN, seconds) / longest))
    start, rounds = clock(), []
    while len(rounds) < ROUNDS or clock() - start < seconds:
        rounds.append([_seconds(call, repeats, clock) for call in calls.values()])
    times = np.array(rounds).T
    return [
        {"variant": n, "ms": quartiles(1e3 * t), "ratio": quartiles(times[0] / t)}
        for n, t in zip(calls, times, strict=True)
    ]


def _seconds(call: Callable[[], Any], repeats: int, clock: Clock) -> float:
    """Returns the seconds of one call, the mean of `repeats`."""
    time.sleep(PAUSE)
    if repeats > 1:
        call()
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def quartiles(values: Float[np.ndarray, "n"]) -> list[float]:
    """Returns the first, second and third quartile."""
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist()


def run_module(words: Sequence[str], cache: str) -> str:
    """Runs `python -m` with these words in a new process and returns what it printed.

    The process takes its compilations from the folder `cache` and leaves them there.

    Raises:
        InputError: it failed, with its last line.
    """
    changed = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **changed},
    )
    if done.returncode:
        killed = "killed; out of memory? Give a smaller --size or --batch"
        reasons = done.stderr.strip().splitlines() or [killed]
        raise InputError(f"a process of {words[0]} failed: {reasons[-1]}")
    return done.stdout


# --- are the results equal? -------------------------------------------------------

TIE = {"float32": 1e-3, "tf32": 0.03, "bfloat16": 0.03}
"""A pixel whose margin is below this share of the largest may be of either class."""

LIMITS = {  # in float32, and in the others, whose numbers have 8 or 11 bits
    "margin": (1e-3, 0.2),
    "masks": (1e-3, 0.01),
    "features": (1e-3, 0.2),
    "loss": (1e-4, 0.02),
    "gradient": (0.01, 0.5),
}
"""The largest differences at which speed is still compared."""


def differences_between(
    in_jax: Mapping[str, np.ndarray],
    in_other: Mapping[str, np.ndarray],
    case: Case,
    other: str,
) -> dict[str, float]:
    """Returns how far the results differ; refuses a comparison of different things.

    Differences are relative: of margins, features and loss to the largest, of gradients
    to their norm. "masks" is the share of pixels, without ties, of another class.

    Raises:
        InputError: naming what differs.
    """
    found = {}
    for name, expected in in_other.items():
        norm = np.linalg.norm if name == "gradient" else lambda x: np.abs(x).max()
        found[name] = float(norm(in_jax[name] - expected) / norm(expected))
    if "margin" in in_other:
        margin = in_other["margin"]
        clear = np.abs(margin) > TIE[case.dtype] * np.abs(margin).max()
        differs = (in_jax["margin"] > 0) != (margin > 0)
        found["masks"] = float(differs[clear].mean())
    for name, value in found.items():
        limit = LIMITS[name][case.dtype != "float32"]
        if not value <= limit:  # NaN is refused, too
            raise InputError(
                f"{case}: {name} of JAX and {other} differ by {value:.2g}, more than "
                f"{limit:g}, so their speed can't be compared: measure JAX alone"
            )
    return found

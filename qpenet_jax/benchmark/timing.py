"""How steps are compared: in turns, in one process, once their results are equal."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qpenet_jax.benchmark.settings import Case
from qpenet_jax.benchmark.speed_report import Row
from qpenet_jax.core.errors import InputError

TURN = 1.0
"""Seconds that a turn lasts at least: short steps are repeated. The first step of a
turn isn't timed, as the caches hold another's data and its own threads sleep."""

PAUSE = 0.05
"""Seconds between turns, in which the idle threads of the one before stop spinning."""

ROUNDS = 5

Clock = Callable[[], float]


class Candidate(NamedTuple):
    """A step of JAX or PyTorch that is timed.

    `call` does a step and returns its result when it is finished; `numbers` takes the
    first result and returns the numbers that must be equal for both.
    """

    call: Callable[[], Any]
    numbers: Callable[[Any], dict[str, np.ndarray]]


def interleave(
    calls: Sequence[Callable[[], Any]],
    seconds: float = 0.0,
    rounds: int = ROUNDS,
    clock: Clock = perf_counter,
) -> list[Float[np.ndarray, "n"]]:
    """Calls all in turns, A B A B, and returns the seconds of a call in each round.

    It goes on for `seconds`, and for `rounds` at least, after a round of warm-up. With
    `time.process_time` as `clock` the seconds are those of all cores together, which
    other work on the machine changes less. A turn lasts no longer than `seconds`.
    """
    longest = max(_seconds(call, 1, clock) for call in calls)
    repeats = max(1, math.ceil(min(TURN, seconds) / longest))
    start, times = clock(), []
    while len(times) < rounds or clock() - start < seconds:
        times.append([_seconds(call, repeats, clock) for call in calls])
    return list(np.array(times).T)


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


def compare(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    clock: Clock = perf_counter,
    ending: str = "",
) -> Row:
    """Returns the quartiles of all calls in ms, and the first's as a share of each.

    `ending` ends the headers of the row.
    """
    times = interleave(list(calls.values()), seconds, clock=clock)
    row: Row = {}
    for name, each in zip(calls, times, strict=True):
        row[f"{name}, ms{ending}"] = quartiles(1e3 * each)
        if each is not times[0]:
            row[f"{next(iter(calls))} / {name}{ending}"] = quartiles(times[0] / each)
    return row


def matmul_rate(
    product: Callable[[], Any], rows: int, clock: Clock = perf_counter
) -> float:
    """Returns the best FLOP/s of five products of two square matrices."""
    product()
    return 2 * rows**3 / min(_seconds(product, 1, clock) for _ in range(5))


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
    other: str = "PyTorch",
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
                f"{limit:g}, so their speed can't be compared: "
                "measure JAX alone"
            )
    return found

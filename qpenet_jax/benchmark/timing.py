"""How steps are timed: several candidates in turns, in one process."""

import math
import time
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

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


def matmul_rate(
    product: Callable[[], Any], rows: int, clock: Clock = perf_counter
) -> float:
    """Returns the best FLOP/s of five products of two square matrices."""
    product()
    return 2 * rows**3 / min(_seconds(product, 1, clock) for _ in range(5))

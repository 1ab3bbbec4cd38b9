"""Clocks: what the contenders' steps take, measured in turns."""

import math
import time
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Float

TURN = 1.0
"""Seconds that a turn lasts at least: short steps are repeated. The first step of a
turn isn't timed, as it finds the other's data in the caches and its own threads asleep.
"""

PAUSE = 0.05
"""Seconds between turns, in which the idle threads of the one before stop spinning."""

ROUNDS = 5


def interleave(
    calls: Sequence[Callable[[], Any]],
    seconds: float = 0.0,
    rounds: int = ROUNDS,
    clock: Callable[[], float] | None = None,
) -> list[Float[np.ndarray, "n"]]:
    """Lets all take turns, A B A B; return the seconds of a call in each of n rounds.

    It goes on for `seconds`, and for `rounds` at least, after a round of warm-up. With
    `time.process_time` as `clock` they are those of all cores together, which other
    work on the machine changes less.
    """
    longest = max(_turn(call, 1) for call in calls)
    repeats = math.ceil(TURN / longest)
    start, times = perf_counter(), []
    while len(times) < rounds or perf_counter() - start < seconds:
        times.append([_turn(call, repeats, clock) for call in calls])
    return list(np.array(times).T)


def _turn(
    call: Callable[[], Any], repeats: int, clock: Callable[[], float] | None = None
) -> float:
    time.sleep(PAUSE)
    if repeats > 1:
        call()
    now = clock or perf_counter
    start = now()
    for _ in range(repeats):
        call()
    return (now() - start) / repeats


def quartiles(values: Float[np.ndarray, "n"]) -> list[float]:
    """Returns the first, second and third quartile."""
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist()


def matmul_rate(product: Callable[[], Any], rows: int) -> float:
    """Returns the best FLOP/s of five products of two square matrices."""
    product()
    return 2 * rows**3 / min(_turn(product, 1) for _ in range(5))

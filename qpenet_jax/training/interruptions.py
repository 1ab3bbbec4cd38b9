"""What interrupts a training: a loss that isn't finite any more, Ctrl-C and SIGTERM.

After such a loss it begins again from its latest checkpoint, if the config allows it,
and leaves out the batches that led there. They are written down first: a run that is
killed meanwhile leaves out the same ones.
"""

import contextlib
import functools
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Array
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.runs.folder import read_json
from qpenet_jax.training import health

RETRIES = "retries.json"
"""Which step wasn't finite (`at`), in what (`found`), and back to which step (`to`)."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)

P = ParamSpec("P")

_any = jax.jit(jnp.any)


class Retry(Exception):
    """A training begins again, from its latest checkpoint, without some batches."""


def with_retries(training: Callable[P, None]) -> Callable[P, None]:
    """Returns a training that begins again whenever it raises `Retry`."""

    @functools.wraps(training)
    def begin(*args: P.args, **kwargs: P.kwargs) -> None:
        while True:
            try:
                return training(*args, **kwargs)
            except Retry as retry:
                cluster.warn(str(retry))

    return begin


def not_finite(
    history: Sequence[Mapping[str, float]], step: int, params: PyTree[Array]
) -> tuple[str, int] | None:
    """Returns what isn't finite any more, and since which step; None if all is.

    `history` holds the metrics of the steps up to `step`, `params` what is saved then.
    """
    for number, values in enumerate(history, step - len(history) + 1):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                return f"{name} is {values[name]}", number
    return None if health.is_finite(params) else ("a parameter isn't finite", step)


def divergence(
    workdir: Path, found: str, at: int, saved: int | None, limit: int
) -> Retry | InputError:
    """Returns what a training raises that isn't finite at step `at`.

    `Retry`, which is written down; after `limit` retries an error. `saved` is the step
    of the latest checkpoint.
    """
    number = cluster.by_first(lambda: _write_retry(workdir, found, at, saved, limit))
    if number:
        return Retry(
            f"{found} at step {at}: back to step {saved or 0}, and on with other "
            f"episodes (retry {number} of {limit})"
        )
    kept = "none is saved yet" if saved is None else f"step {saved} is kept"
    return InputError(
        f"{found} at step {at}; last good checkpoint: {kept}; start again in a "
        "new --workdir with --config.recipe=stable or a lower config.optimizer.lr"
    )


def _write_retry(workdir, found, at, saved, limit) -> int:
    """Returns the number of the retry; 0 if there is none left."""
    to = saved or 0
    # A training that lost its checkpoints may be before some: these come again.
    retries = [retry for retry in read_retries(workdir) if retry["to"] <= to]
    if len(retries) >= limit:
        return 0
    retries.append({"at": at, "found": found, "to": to})
    write_json(workdir / RETRIES, {"retries": retries})
    return len(retries)


def read_retries(workdir: Path) -> list[dict[str, Any]]:
    """Returns the retries of a run, in their order."""
    path = workdir / RETRIES
    return read_json(path)["retries"] if path.exists() else []


def batches_left_out(workdir: Path, step: int) -> int:
    """Returns how many batches retries have left out before the one after `step`."""
    return sum(r["at"] - r["to"] for r in read_retries(workdir) if r["to"] <= step)


class StopSignal(contextlib.AbstractContextManager):
    """Sets `asked` when a signal arrives; a second one stops the process at once."""

    asked = False
    _any_asked: Any = False

    def __enter__(self) -> "StopSignal":
        """Catches the signals."""
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler)
        print("\nstopping after this step; again to stop at once", file=sys.stderr)

    def in_any_process(self, split: NamedSharding) -> bool:
        """Returns whether any process was asked to stop, the same in all of them.

        Called once a step. With several processes it returns what the call before has
        asked the devices, which share a batch by `split`: so no process waits.
        """
        if cluster.count() == 1:
            return self.asked
        flags = np.full(len(split.addressable_devices), self.asked)
        flags = jax.make_array_from_process_local_data(split, flags)
        before, self._any_asked = bool(self._any_asked), _any(flags)
        return before

"""What a training does when its loss isn't finite any more.

If the config allows it, it goes back to its latest checkpoint, and on with the episodes
behind those that led there. Which these are is written down first, so that a run that
is killed meanwhile takes the same ones when it goes on.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Array
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.runs.folder import read_json
from qpenet_jax.training import health

RETRIES = "retries.json"
"""Which step wasn't finite (`at`), in what (`found`), and back to which step (`to`)."""


class NotFinite(InputError):
    """Training diverged: `what` isn't finite any more since `step`."""

    def __init__(self, what: str, step: int, saved: int | None):
        self.what, self.step = what, step
        kept = "none is saved yet" if saved is None else f"step {saved} is kept"
        super().__init__(
            f"{what} at step {step}; last good checkpoint: {kept}; start again in a "
            "new --workdir with --config.recipe=stable or a lower config.optimizer.lr"
        )


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


def read_retries(workdir: Path) -> list[dict[str, Any]]:
    """Returns the retries of a run, in their order."""
    path = workdir / RETRIES
    return read_json(path)["retries"] if path.exists() else []


def skipped_batches(workdir: Path, step: int) -> int:
    """Returns how many batches were left out for the steps after `step`."""
    return sum(r["at"] - r["to"] for r in read_retries(workdir) if r["to"] <= step)


def note_retry(
    workdir: Path, found: str, at: int, saved: int | None, limit: int
) -> None:
    """Writes down that training goes on from the saved step, with other episodes.

    Those behind the ones that led to step `at`: a run that is killed meanwhile takes
    the same when it goes on.

    Raises:
        NotFinite: there have been `limit` retries.
    """
    cluster.by_first(lambda: _note(workdir, found, at, saved, limit))


def _note(workdir, found, at, saved, limit) -> None:
    to = saved or 0
    # A training that lost its checkpoints may be before some: these come again.
    retries = [retry for retry in read_retries(workdir) if retry["to"] <= to]
    if len(retries) >= limit:
        raise NotFinite(found, at, saved)
    retries.append({"at": at, "found": found, "to": to})
    write_json(workdir / RETRIES, {"retries": retries})
    cluster.warn(
        f"{found} at step {at}: back to step {to}, and on with other episodes (retry "
        f"{len(retries)} of {limit})"
    )

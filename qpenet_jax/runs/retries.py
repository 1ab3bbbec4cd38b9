"""What a training does when its loss isn't finite any more, if it was asked to go on.

It goes back to its latest checkpoint, and on with the episodes behind those that led
there. Which these are is written down first, so that a run that is killed meanwhile
takes the same ones when it goes on.
"""

import sys
from pathlib import Path
from typing import Any

from qpenet_jax.evaluation.report import write_json
from qpenet_jax.runs.folder import read_json
from qpenet_jax.runs.progress import NotFinite

RETRIES = "retries.json"

Retry = dict[str, Any]
"""Which step went wrong (`at`), in which way (`found`), and back to which (`to`)."""


def read(workdir: Path) -> list[Retry]:
    """Returns the retries of a run, in their order."""
    path = workdir / RETRIES
    return read_json(path)["retries"] if path.exists() else []


def skipped(workdir: Path, step: int) -> int:
    """Returns how many batches were left out for the steps after `step`."""
    return sum(r["at"] - r["to"] for r in read(workdir) if r["to"] <= step)


def told(workdir: Path) -> dict[str, list[Retry]]:
    """Returns what the results tell of retries; nothing if there were none."""
    retries = read(workdir)
    return {"retries": retries} if retries else {}


def go_back(workdir: Path, error: NotFinite, to: int, limit: int) -> None:
    """Writes down that training goes on from step `to`; tell it in one line.

    Raises:
        NotFinite: the error, if there have been `limit` retries.
    """
    # A training that lost its checkpoints may be before some: these come again.
    retries = [retry for retry in read(workdir) if retry["to"] <= to]
    if len(retries) >= limit:
        raise error
    retries.append({"at": error.step, "found": error.what, "to": to})
    write_json(workdir / RETRIES, {"retries": retries})
    print(
        f"\nwarning: {error.what} at step {error.step}: back to step {to}, and on with "
        f"other episodes (retry {len(retries)} of {limit})",
        file=sys.stderr,
    )

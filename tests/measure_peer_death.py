"""Kill one of two processes at random steps: the table of docs/reliability.md.

    python tests/measure_peer_death.py --folder /tmp/deaths --kills 10 --seed 0

trains the shrunk quick start with two processes of two devices, once unbroken and once
with one of the processes killed outright (kill -9) again and again, each time after
some steps. It prints how the other one ended, and whether all parameters are the same
bits in the end.
"""

import argparse
import os
import random
import re
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).parents[1])]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from test_cluster import Pair, training  # noqa: E402

from qpenet_jax.runs.folder import open_run  # noqa: E402

CHANGES = {"steps": 120, "save_every": 3, "eval__every": 40}


def steps_taken(both):
    """Return the last step that the bar of the first process shows."""
    shown = re.findall(r"training: [^\r]*? (\d+)/\d+ \[", both.printed()[0])
    return int(shown[-1]) if shown else 0


def killed(workdir, folder, rng):
    """Start, kill one after some steps; print how the other one ended."""
    both = Pair(folder, *training(workdir, **CHANGES))
    victim, wait = rng.randrange(2), rng.randint(1, 10)
    both.until(lambda: steps_taken(both) > 0)
    first = steps_taken(both)
    both.until(lambda: steps_taken(both) >= first + wait)
    time.sleep(rng.random())
    step = steps_taken(both)
    both.processes[victim].kill()
    start = time.monotonic()
    codes = both.ended()
    seconds = time.monotonic() - start
    told = both.lines(1 - victim, "error", "Traceback", "F1", "E1", "W1")
    print(
        f"| {step} | {victim} | {seconds:.1f} | {codes[1 - victim]} | {len(told)} | "
        f"{told[-1] if told else ''} |",
        flush=True,
    )


def finished(workdir, folder):
    both = Pair(folder, *training(workdir, **CHANGES))
    codes = both.ended()
    assert codes == [0, 0], both.printed()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    rng = random.Random(args.seed)
    broken, whole = args.folder / "broken", args.folder / "whole"
    print(
        "| step | killed | seconds until the other ended | its status | lines | last |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    for _ in range(args.kills):
        killed(broken, args.folder, rng)
    finished(broken, args.folder)
    finished(whole, args.folder)
    ours, theirs = (open_run(run) for run in (broken, whole))
    same = jax.tree.map(np.array_equal, ours.params, theirs.params)
    rows = [(run / "episodes_qpenet.csv").read_bytes() for run in (broken, whole)]
    print(f"same bits of all parameters: {all(jax.tree.leaves(same))}")
    print(f"same step and rows: {ours.step == theirs.step and rows[0] == rows[1]}")


if __name__ == "__main__":
    main()

"""Count kills, and watch memory: two rows of "Faults, counted" in docs/reliability.md.

    python docs/measurements/faults.py kills /tmp/faults 20
    python docs/measurements/faults.py memory /tmp/faults 10000

trains and predicts in a folder that may be deleted afterwards, and prints a line for
each kill, or the memory during the queries. Every command is a process of its own.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from commands import ROOT, overrides, words

FIELDS = overrides(steps=40, save_every=2, eval__every=10, eval__base_episodes=6)
RESULTS = ("results.json", "references.json", "episodes_qpenet.csv", "inputs.json")


def start(*arguments):
    """Starts a command in the root of the checkout."""
    command = [sys.executable, "-m", "qpenet_jax.cli", *map(str, arguments)]
    cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | cache, stdout=subprocess.DEVNULL
    )


def train(workdir, seconds=None):
    """Trains, killed after some seconds; returns whether it ended before."""
    process = start("train", *words(workdir, select_on="base,last"), *FIELDS)
    try:
        assert process.wait(seconds) == 0
        return True
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def content(workdir):
    """Returns results and the hashes of parameters and optimiser in checkpoints."""
    files = {name: (workdir / name).read_text() for name in RESULTS}
    for path in (workdir / "checkpoints").glob("*/_CHECKPOINT_METADATA"):
        about = json.loads(path.read_text())["custom_metadata"]
        files[path.parent.name] = json.dumps(about["sha256"])
    return files


def kills(folder, count):
    """Kills each training at a random moment, and goes on with it to the end."""
    train(folder / "warm")  # from here on nothing is compiled
    begun = time.monotonic()
    train(folder / "whole")
    length = time.monotonic() - begun
    whole, rng, done = content(folder / "whole"), np.random.default_rng(0), 0
    while done < count:
        moment, workdir = rng.uniform(0, length), folder / f"killed_{done}"
        if not train(workdir, moment):
            saved = (workdir / "checkpoints").exists()
            train(workdir)
            same = content(workdir) == whole
            print(f"{moment:.1f} s of {length:.0f}, {saved=}, {same=}", flush=True)
            done += 1


def memory(folder, count):
    """Predicts many queries, small ones or large ones; watches the resident memory."""
    if not (folder / "run").exists():
        train(folder / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(np.full((375, 500), 255, np.uint8)).save(folder / "mask.png")
    support = f"{folder / 'a.png'}:{folder / 'mask.png'}"
    for name, size, number in (
        ("small", (500, 375), count),
        ("large", (8000, 6000), max(count // 40, 1)),
    ):
        queries, out = folder / name / "queries", folder / name / "masks"
        queries.mkdir(parents=True)
        Image.fromarray(pixels).resize(size).save(folder / f"{name}.jpg")
        for i in range(number):
            (queries / f"{i:05d}.jpg").symlink_to(folder / f"{name}.jpg")
        given = "--support", support, "--query", queries, "--out", out
        process = start("predict", "--workdir", folder / "run", *given)
        while process.poll() is None:
            resident = subprocess.check_output(["ps", "-o", "rss=", f"{process.pid}"])
            done = len(list(out.glob("?????.png")))
            print(f"{name}: {done} queries, {int(resident) // 1024} MiB", flush=True)
            time.sleep(5)


if __name__ == "__main__":
    row, place, number = sys.argv[1:]
    {"kills": kills, "memory": memory}[row](Path(place).resolve(), int(number))

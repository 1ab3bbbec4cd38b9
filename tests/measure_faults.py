"""Count kills, and watch memory: rows of the table "Faults" of docs/reliability.md.

    python tests/measure_faults.py memory --folder /tmp/faults

makes a row of it, in a folder that may be deleted afterwards, and prints a JSON line.
The other rows are tests (docs/reliability.md names them).
The trainings are the quick start's, shrunk to 65 pixels, 16 channels and 12 steps with
evaluations and saves; every command is a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

SHRUNK = {
    "side": 65,
    "steps": 12,
    "batch_size": 2,
    "workers": 1,
    "log_every": 1,
    "save_every": 2,
    "select_on": "base,last",
    "model.channels": 16,
    "dataset.side": 65,
    "dataset.train_images": 60,
    "dataset.val_images": 40,
    "dataset.min_pixels": 64,
    "dataset.on_few": "drop",
    "eval.every": 4,
    "eval.episodes": 6,
    "eval.base_episodes": 6,
}

ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # most of a run is compilation
}


def words(workdir, **changes):
    """Return the command that trains in a workdir."""
    fields = SHRUNK | {name.replace("__", "."): v for name, v in changes.items()}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = ["--config", ROOT / "configs" / "quickstart.py"]
    return [sys.executable, "train.py", *config, "--workdir", workdir, *overrides]


def start(command, **options):
    """Start a command in the root of the checkout."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*map(str, command)]
    options = {"cwd": ROOT, "env": ENVIRONMENT} | pipes | options
    return subprocess.Popen(command, **options)


def finish(command, **options):
    """Run a command to its end; return its exit code and what it printed last."""
    process = start(command, **options)
    _, errors = process.communicate()
    return process.returncode, errors


def trained(workdir, **changes):
    """Train without a fault, or go on after it."""
    code, errors = finish(words(workdir, **changes))
    assert code == 0, errors
    return workdir


# --- Many queries ---


def memory(folder, count, seed):
    """Predict many queries, small ones and large ones; watch the resident memory."""
    run = folder / "run"
    if not run.exists():
        trained(run)
    small = _predicted(folder / "small", run, count or 10_000, [(500, 375), (333, 500)])
    large = _predicted(folder / "large", run, (count or 10_000) // 40, [(8000, 6000)])
    return {"small": small, "8000 x 6000": large}


def _predicted(folder, run, count, sizes):
    """Return MiB resident after 100 queries (or the first half) and after all."""
    sys.path.insert(0, str(ROOT))
    from qpenet_jax.data.sources.shapes import Shapes

    queries, out = folder / "queries", folder / "out"
    queries.mkdir(parents=True)
    shapes = Shapes("val", 3, 120)
    Image.fromarray(shapes.image(0)).save(folder / "support.png")
    marked = (shapes.label(0) > 0).astype(np.uint8)
    Image.fromarray(255 * marked).save(folder / "mask.png")
    for i, size in enumerate(sizes):
        Image.fromarray(shapes.image(i)).resize(size).save(folder / f"{i}.jpg")
    for i in range(count):
        (queries / f"{i:05d}.jpg").symlink_to(folder / f"{i % len(sizes)}.jpg")
    support = f"{folder / 'support.png'}:{folder / 'mask.png'}"
    command = [sys.executable, "-m", "qpenet_jax.cli", "predict", "--workdir", run]
    command += ["--support", support, "--query", queries, "--out", out]
    begun = time.monotonic()
    process = start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    early = min(100, count // 2)
    seen = {}
    while process.poll() is None:
        done = _last(out)
        resident = _resident(process.pid)
        if resident:
            for mark in (early, count // 2, count - 2):
                if done >= mark:
                    seen.setdefault(mark, resident)
        # Results are as many as queries, and take more room than is wanted.
        for i in range(max(done - 50, 0)):
            (out / f"{i:05d}.png").unlink(missing_ok=True)
            (out / f"{i:05d}_overlay.jpg").unlink(missing_ok=True)
        time.sleep(0.1)
    assert process.returncode == 0
    return {"queries": count, "seconds": round(time.monotonic() - begun), "MiB": seen}


def _last(out):
    """Return how many queries have results, by the names of the newest."""
    if not out.is_dir():
        return 0
    return max((int(p.stem) + 1 for p in out.glob("?????.png")), default=0)


def _resident(pid):
    """Return the MiB of memory that a process has now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = [int(x.split()[1]) // 1024 for x in lines if x.startswith("VmRSS")]
    return found[0] if found else None


# --- kill -9 ---

RESULTS = ("results.json", "references.json", "episodes_qpenet.csv", "inputs.json")


KILLED = {"steps": 40, "eval__every": 10}


def kills(folder, count, seed):
    """Kill each training at a random moment, and go on with it to the end."""
    rng = np.random.default_rng(seed)
    whole, begun = folder / "whole", time.monotonic()
    assert _forked(whole, None) == 0
    length = time.monotonic() - begun
    rows = []
    while len(rows) < (count or 20):
        workdir = folder / f"killed_{len(rows)}"
        moment = float(rng.uniform(0.0, length))
        if _forked(workdir, moment) == 0:  # it was faster
            shutil.rmtree(workdir)
            continue
        saved = _hashes(workdir) if (workdir / "checkpoints").exists() else {}
        assert _forked(workdir, None) == 0
        differs = differing(workdir, whole)
        row = {"second": round(moment, 1), "left": sorted(saved)}
        row["differs"] = differs
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        shutil.rmtree(workdir)
    return {
        "kills": len(rows),
        "the same in the end": sum(not row["differs"] for row in rows),
        "left no checkpoint": sum(not row["left"] for row in rows),
        "seconds of a run": round(length),
    }


def _forked(workdir, seconds):
    """Train in a process that is killed after some seconds; return its exit code.

    It is forked from one that has imported all, which is a third of the work.
    """
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["qpenet_jax.training.train", "grain"])
    command = [str(word) for word in words(workdir, workers=0, **KILLED)[1:]]
    process = forked.Process(target=_train, args=(command,))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def _train(command):
    sys.path.insert(0, str(ROOT))
    from qpenet_jax.cli.main import program

    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    program(["train", *command[1:]])


def differing(workdir, whole):
    """Return what of a run isn't bit for bit that of another."""
    names = [*RESULTS, *(f"selected_on_last/{name}" for name in RESULTS[:1])]
    names = [n for n in names if _content(workdir / n) != _content(whole / n)]
    ours, theirs = _hashes(workdir), _hashes(whole)
    return names + ([] if ours == theirs else [f"{ours} != {theirs}"])


def _content(path):
    return path.read_bytes() if path.exists() else None


def _hashes(workdir):
    """Return the SHA-256 of parameters and optimiser in each checkpoint.

    Checkpoints are compared with it wherever they are read, so the last two are.
    """
    found = {}
    for step in (workdir / "checkpoints").glob("[0-9]*"):
        if not step.name.isdigit():
            continue  # what an interrupted save left
        text = (step / "_CHECKPOINT_METADATA").read_text()
        found[step.name] = json.loads(text)["custom_metadata"]["sha256"]
    return found


ROWS = {"kills": kills, "memory": memory}


def main():
    """Run the rows that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", choices=ROWS)
    parser.add_argument("--folder", type=Path, required=True, help="for runs and files")
    parser.add_argument("--count", type=int, help="how many; default: the table's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    for row in args.rows:
        folder = args.folder.resolve() / row
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps({row: ROWS[row](folder, args.count, args.seed)}), flush=True)


if __name__ == "__main__":
    main()

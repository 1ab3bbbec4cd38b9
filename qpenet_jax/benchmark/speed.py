"""How fast steps are, beside the PyTorch twin: `qpenet benchmark`.

`benchmark` measures; tables.py prints and draws what it returns.
"""

import dataclasses
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from qpenet_jax.backbones.precision import DTYPES, products
from qpenet_jax.benchmark import ours
from qpenet_jax.benchmark.data import benchmark_data
from qpenet_jax.benchmark.measure import (
    TWIN_VARIANTS,
    Case,
    Side,
    compare,
    interleave,
    made_up_episodes,
    quartiles,
    run_child,
)
from qpenet_jax.benchmark.protocol import protocol_run
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.runtime import keep_freed_memory, processor
from qpenet_jax.core.types import Episode
from qpenet_jax.evaluation.protocols import check_side
from qpenet_jax.runs.experiment import Experiment

WHAT = ("eval", "train", "backbone", "protocol", "data")
STEPS = ("eval", "train", "backbone")

PEAK_SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Rows of the square matrices whose product is the peak: some 0.1 s or less."""

TRIED = 3
"""Rounds by which the fastest variant of the twin's is chosen."""


def benchmark(
    what: Sequence[str] = ("eval", "train"),
    *,
    shots: Sequence[int] = (1,),
    batch: Sequence[int] = (1, 4),
    size: int = 473,
    dtype: Sequence[str] = ("float32",),
    backbone: str = "resnet50",
    weights: str = "",
    network: Mapping[str, Any] | None = None,
    against: Literal["torch"] | None = None,
    variants: Sequence[str] = tuple(TWIN_VARIANTS),
    experiment: Experiment | None = None,
    episodes: int | None = None,
    workers: Sequence[int] = (0, 1, 2),
    seconds: float = 20.0,
    seed: int = 0,
    processes: bool = True,
) -> dict[str, Any]:
    """Measure `what` for all shots, batch sizes and dtypes; return numbers and strings.

    `size` is in pixels; `weights` is the backbone's file, without one they are drawn;
    `network` changes fields of QPENet. `against` compares with the best of the twin's
    `variants`, by turns for `seconds` and five rounds at least. `processes` also
    measures start and peak memory of eval and train in fresh ones. "protocol" runs
    `episodes` episodes a seed of the experiment's data, or of made-up photos, without
    one; "data" loads by every number of `workers`. As in training, the process keeps
    freed memory from then on.

    Raises:
        InputError: unknown values, no PyTorch, or sides that compute different things.
    """
    _check(what, shots, batch, size, dtype, variants)
    # Both frameworks share the device: neither may take most of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    keep_freed_memory()
    opponent = _opponent(against, backbone)
    given = Case("", backbone, 1, 1, size, "", seed, weights, dict(network or {}))
    cases = [
        dataclasses.replace(given, what=w, shots=k, batch=b, dtype=d)
        for w, d, k, b in itertools.product(STEPS, dtype, shots, batch)
        if w in what
    ]
    result: dict[str, Any] = {"facts": _facts(given, opponent)}
    result["peak_flops"] = {
        d: _peak(d, opponent) for d in dict.fromkeys(c.dtype for c in cases)
    }
    measured = []
    for case in cases:
        found = _measure(case, opponent, variants, seconds)
        if processes and case.what != "backbone":
            found["processes"] = _processes(case, found.get("variant", ""), opponent)
        measured.append(found)
    result["cases"] = measured
    if "protocol" in what:
        result["protocol"] = [
            protocol_run(given, k, experiment, episodes) for k in shots
        ]
    if "data" in what:
        dataset = experiment.dataset("train") if experiment else None
        result["data"] = benchmark_data(
            dataset,
            side=size,
            shots=shots,
            seconds=seconds,
            workers=workers,
            seed=seed,
        )
    return result


def _check(what, shots, batch, size, dtype, variants) -> None:
    """Refuse what would fail later, or measure nothing."""
    for name, values, choices in (
        ("what", what, WHAT),
        ("dtype", dtype, DTYPES),
        ("variants", variants, TWIN_VARIANTS),
    ):
        for value in values:
            if value not in choices:
                raise InputError(f"--{name} {value!r}: choose {', '.join(choices)}")
    if min(*shots, *batch) < 1:
        raise InputError(f"shots {shots} and batch {batch}: give numbers of 1 or more")
    check_side(size)
    if "tf32" in dtype and jax.default_backend() != "gpu":
        raise InputError("--dtype tf32 is of NVIDIA's GPUs: choose float32")


class Opponent(NamedTuple):
    """The module with the twin (it imports PyTorch), and its device."""

    module: Any
    device: str


def _opponent(against: str | None, backbone: str) -> Opponent | None:
    if against is None:
        return None
    if against != "torch":
        raise InputError(f"--against {against!r}: choose torch")
    packages = ["torch", "torchvision"]
    if backbone == "efficientnet_lite0":
        packages.append("efficientnet_lite_pytorch")
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--against torch needs {package}, which isn't installed: run "
                "`pip install -e .[parity]`"
            )
    module = importlib.import_module("qpenet_jax.benchmark.opponent")
    return Opponent(module, module.device_for(jax.default_backend()))


def _facts(given: Case, opponent: Opponent | None) -> dict[str, Any]:
    """Return where, when and with what was measured."""
    packages = ["jax", "jaxlib", "flax", "numpy"]
    facts: dict[str, Any] = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backbone": given.backbone,
        "weights": given.weights or "drawn",
        "size": given.size,
        "seed": given.seed,
        "dropout": "off on both sides",
    }
    if opponent:
        packages += ["torch", "torchvision"]
        facts["torch_threads"] = opponent.module.threads()
    facts["versions"] = {name: importlib.metadata.version(name) for name in packages}
    return facts


def _peak(dtype: str, opponent: Opponent | None) -> dict[str, float]:
    """Return the FLOP/s of a large matrix product, of every framework."""
    n = PEAK_SIDE[jax.default_backend()]
    with products(dtype):
        peak = {"jax": ours.peak_rate(dtype, n)}
    if opponent:
        peak["torch"] = opponent.module.peak_rate(dtype, opponent.device, n)
    return peak


# --- one case ---------------------------------------------------------------------


def _measure(
    case: Case, opponent: Opponent | None, variants: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Time our step, by turns with the best variant of the twin's if there is one."""
    weights, episodes = ours.draw_weights(case), made_up_episodes(case)
    our_side = ours.side(case, weights, episodes)
    first = our_side.first()
    found = dataclasses.asdict(case) | {
        "name": str(case),
        "flop": ours.count_flop(case, weights, episodes),
    }
    sides = [our_side]
    if opponent:
        inputs = episodes, weights
        best, tried = _best(case, opponent, variants, first, inputs)
        sides.append(best)
        found |= tried
    times = interleave([s.call for s in sides], seconds)
    found["seconds"] = quartiles(times[0])
    found["rounds"] = len(times[0])
    if opponent:
        found["torch_seconds"] = quartiles(times[1])
        found["ratio"] = quartiles(times[0] / times[1])
    del sides, our_side
    gc.collect()  # before the next case is measured, or a process that needs memory
    return found


def _best(
    case: Case,
    opponent: Opponent,
    variants: Sequence[str],
    first: Mapping[str, np.ndarray],
    inputs: tuple[Episode, ours.Weights],
) -> tuple[Side, dict[str, Any]]:
    """Return the twin's fastest variant, and what all of them took in seconds.

    Every variant must compute what we do. torch.compile may fail, and is then told.
    """
    tried: dict[str, float | str] = {}
    best: tuple[float, str, Side, dict[str, float]] | None = None
    for variant in variants:
        try:
            side = opponent.module.side(case, variant, opponent.device, *inputs)
            differences = compare(case, first, side.first())
            (times,) = interleave([side.call], rounds=TRIED)
        except Exception as error:
            if variant != "compile" or isinstance(error, InputError):
                raise
            tried[variant] = f"not available ({_first_line(error)})"
            continue
        tried[variant] = seconds = float(np.median(times))
        if best is None or seconds < best[0]:
            best = seconds, variant, side, differences
    if best is None:
        raise InputError(f"{case}: PyTorch runs none of {', '.join(variants)}: {tried}")
    _, name, side, differences = best
    return side, {"variants": tried, "variant": name, "differences": differences}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:100]


def _processes(case: Case, variant: str, opponent: Opponent | None) -> dict[str, Any]:
    """Return time to the first step and peak memory in fresh processes.

    "cold" finds no compilation of earlier processes, "cached" that of the first.
    """
    told = {"case": dataclasses.asdict(case)}
    with tempfile.TemporaryDirectory() as cache:
        found = {
            kind: run_child("qpenet_jax.benchmark.ours", cache=cache, **told)
            for kind in ("cold", "cached")
        }
    if opponent:
        told |= {"variant": variant, "device": opponent.device}
        theirs = run_child("qpenet_jax.benchmark.opponent", **told)
        peaks = (
            child["peak_bytes"] - child["import_bytes"]
            for child in (found["cached"], theirs)
        )
        found |= {"torch": theirs, "memory_ratio": next(peaks) / next(peaks)}
    return found

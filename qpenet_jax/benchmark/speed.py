"""Measure speed and memory, on request beside the PyTorch twin: `qpenet benchmark`.

`benchmark` measures; speed_report.py shows its result.
"""

import dataclasses
import datetime
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qpenet_jax.backbones.precision import products
from qpenet_jax.benchmark import jax_side
from qpenet_jax.benchmark.evaluation_speed import evaluation_speed
from qpenet_jax.benchmark.flop import flop
from qpenet_jax.benchmark.loading_speed import loading_speed
from qpenet_jax.benchmark.made_up import made_up_episodes
from qpenet_jax.benchmark.memory_plans import memory_plans
from qpenet_jax.benchmark.prediction_speed import prediction_speed
from qpenet_jax.benchmark.processes import run_case
from qpenet_jax.benchmark.runtimes import runtimes
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.benchmark.speed_report import Row, Table
from qpenet_jax.benchmark.timing import (
    Candidate,
    compare,
    differences_between,
    interleave,
)
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.runtime import keep_freed_memory, processor
from qpenet_jax.runs.datasets import build_dataset

PEAK_ROWS = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Rows of the square matrices whose product is the peak: some 0.1 s or less."""

TRIED = 3
"""Rounds by which the fastest variant of the twin is chosen."""


class TorchSide(NamedTuple):
    """The module with the twin's steps (it imports PyTorch), and its device."""

    module: Any
    device: str


def benchmark(settings: Settings, config: Any | None = None) -> dict[str, Any]:
    """Measures the settings' steps; returns numbers and strings alone, for JSON.

    The images of "protocol" and "data" are the config's; without one they are made up.
    As in training, the process keeps freed memory from then on.

    Raises:
        InputError: this machine can't compute in a dtype; PyTorch is missing, or
            computes something different.
    """
    # Both frameworks share the device: neither may take most of its memory at once. It
    # must be set before the device is first used.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    keep_freed_memory()
    if "tf32" in settings.dtype and jax.default_backend() != "gpu":
        raise InputError("--dtype tf32 needs an NVIDIA GPU: choose float32")
    tables = list(_steps(settings))
    if "memory" in settings.what:
        tables.append(memory_plans(settings))
    if "protocol" in settings.what:
        tables.append(evaluation_speed(settings, config))
    if "runtimes" in settings.what:
        tables.append(runtimes(settings))
    if "predict" in settings.what:
        tables += prediction_speed(settings)
    if "data" in settings.what:
        images = build_dataset(config, "train") if config else None
        tables += loading_speed(settings, images)
    return {"facts": _facts(settings), "tables": [each._asdict() for each in tables]}


def _torch_side(settings: Settings) -> TorchSide:
    packages = ["torch", "torchvision"]
    if settings.backbone == "efficientnet_lite0":
        packages.append("efficientnet_lite_pytorch")
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--against torch needs {package}, which isn't installed: run "
                "`pip install -e .[parity]`"
            )
    module = importlib.import_module("qpenet_jax.benchmark.torch_side")
    return TorchSide(module, module.device_for(jax.default_backend()))


def _facts(given: Settings) -> dict[str, Any]:
    """Returns where, when and with which versions was measured."""
    packages = ["jax", "jaxlib", "flax", "numpy", "grain"]
    packages += ["torch", "torchvision"] if given.against else []
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    return {
        "backbone": given.backbone,
        "pixels": f"{given.size} x {given.size}",
        "weights": given.weights or "random",
        "seed": given.seed,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "cpu": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": ", ".join(versions),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# --- single steps -----------------------------------------------------------------

CAPTION = (
    "Time of one step without dropout, the median of several rounds with the first and "
    "third quartiles in brackets. JAX and PyTorch take turns in one process, with the "
    "same weights and inputs, after their results were found equal; in the ratio below "
    "1 JAX is faster. GFLOP counts direct convolutions and matrix products, and "
    "attention to all positions, whatever the step computes: a faster algorithm shows "
    "as more GFLOP/s. The peak is the speed of one large matrix product, of the faster "
    "framework."
)

PROCESSES = (
    "In a new process: the time from its start to the end of its first step, and its "
    "peak memory after three steps, of which importing the libraries takes a part. JAX "
    "runs twice: the first time it compiles everything, the second time it finds the "
    "compilations in its cache. The ratio is of the memory without imports, with the "
    "cache."
)


def _steps(settings: Settings) -> Iterator[Table]:
    """Yields the tables of single steps: times, the twin's variants, new processes."""
    cases = list(settings.cases())
    if not cases:
        return
    torch_side = _torch_side(settings) if settings.against else None
    peaks = {dtype: _peak(dtype, torch_side) for dtype in settings.dtype}
    measured, tried, started = [], [], []
    for case in cases:
        row, variants = step_speed(case, torch_side, settings)
        rate = row["GFLOP"] / row["JAX, ms"][1] * 1e3
        row |= {"GFLOP/s": rate, "% of peak": 1e11 * rate / peaks[case.dtype]}
        measured.append(row)
        tried += variants
        gc.collect()  # the next case, or a process of its own, may need the memory
        if settings.processes and case.what != "backbone":
            fastest = row.get("variant of PyTorch", "")
            started.append({"step": str(case)} | _processes(case, fastest, torch_side))
    yield Table(CAPTION, measured)
    if tried:
        yield Table("All variants of PyTorch, and their differences from JAX.", tried)
    if started:
        yield Table(PROCESSES, started)


def _peak(dtype: str, torch_side: TorchSide | None) -> float:
    """Returns the FLOP/s of a large matrix product in the faster framework."""
    rows = PEAK_ROWS[jax.default_backend()]
    with products(dtype):
        peak = jax_side.peak_rate(dtype, rows)
    if torch_side is None:
        return peak
    return max(peak, torch_side.module.peak_rate(dtype, torch_side.device, rows))


def step_speed(
    case: Case, torch_side: TorchSide | None, settings: Settings
) -> tuple[Row, list[Row]]:
    """Times JAX's step, in turns with the fastest variant of the twin if wanted.

    Returns the row of the step and those of the twin's variants.
    """
    weights, episodes = jax_side.random_weights(case), made_up_episodes(case)
    in_jax = jax_side.jax_candidate(case, weights, episodes)
    calls = {"JAX": in_jax.call}
    single = dataclasses.replace(case, dtype="float32")
    inputs = jax_side.inputs_of(single, weights, episodes)
    count = flop(jax.make_jaxpr(jax_side.step_of(single))(*inputs))
    row: Row = {"step": str(case), "GFLOP": count / 1e9}
    variants: list[Row] = []
    if torch_side:
        make = functools.partial(
            torch_side.module.torch_candidate,
            case,
            device=torch_side.device,
            episodes=episodes,
            weights=weights,
        )
        expected = first_numbers(in_jax)
        in_torch, variants = fastest_variant(case, make, settings, expected)
        calls["PyTorch"] = in_torch.call
        best = min((each for each in variants if "ms" in each), key=lambda v: v["ms"])
        row["variant of PyTorch"] = best["variant"]
    return row | compare(calls, settings.seconds), variants


def first_numbers(candidate: Candidate) -> dict[str, np.ndarray]:
    """Does a candidate's first step and returns its numbers."""
    return candidate.numbers(candidate.call())


def fastest_variant(
    case: Case,
    make: Callable[[str], Candidate],
    settings: Settings,
    expected: Mapping[str, np.ndarray],
) -> tuple[Candidate, list[Row]]:
    """Returns the twin's fastest variant, and a row for each variant.

    `make` returns a variant by its name; each must compute the `expected` numbers of
    JAX. torch.compile may fail; the reason is then in its row.
    """
    rows: list[Row] = []
    candidates: dict[float, Candidate] = {}
    for variant in settings.variants:
        row: Row = {"step": str(case), "variant": variant}
        rows.append(row)
        try:
            candidate = make(variant)
            row |= differences_between(expected, first_numbers(candidate), case)
            (times,) = interleave([candidate.call], min(settings.seconds, 1.0), TRIED)
        except Exception as error:
            if variant != "compile" or isinstance(error, InputError):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            row["failed"] = lines[0][:100]
            continue
        row["ms"] = 1e3 * float(np.median(times))
        candidates[row["ms"]] = candidate
    if not candidates:
        raise InputError(f"{case}: PyTorch fails: {rows[0]['failed']}")
    return candidates[min(candidates)], rows


def _processes(case: Case, variant: str, torch_side: TorchSide | None) -> Row:
    """Returns time to the first step and peak memory in new processes."""
    with tempfile.TemporaryDirectory() as cache:
        found = {kind: run_case(case, cache=cache) for kind in ("JAX", "JAX, cached")}
    if torch_side:
        found["PyTorch"] = run_case(case, variant=variant, device=torch_side.device)
    row: Row = {}
    for name, child in found.items():
        row[f"{name}: start, s"] = child["start_s"]
        row[f"{name}: MiB"] = child["peak_bytes"] / 2**20
        row[f"{name}: imports, MiB"] = child["import_bytes"] / 2**20
    if torch_side:
        in_jax, in_torch = (
            found[kind]["peak_bytes"] - found[kind]["import_bytes"]
            for kind in ("JAX, cached", "PyTorch")
        )
        row["JAX / PyTorch"] = in_jax / in_torch
    return row

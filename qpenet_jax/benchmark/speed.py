"""Measure speed and memory, on request beside the PyTorch twin: `qpenet benchmark`.

`benchmark` measures; the tables of single steps and the page are made here.
"""

import contextlib
import dataclasses
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qpenet_jax.backbones.precision import products
from qpenet_jax.benchmark import jax_side, timing
from qpenet_jax.benchmark.episode_speed import evaluation_speed, loading_speed
from qpenet_jax.benchmark.jax_side import Candidate, memory_plans, step_flop
from qpenet_jax.benchmark.made_up import made_up_episodes
from qpenet_jax.benchmark.prediction_speed import prediction_speed, runtimes
from qpenet_jax.benchmark.settings import STEPS, Case, Settings
from qpenet_jax.benchmark.timing import Row, Table
from qpenet_jax.core.errors import InputError, refused_as
from qpenet_jax.core.markdown import table
from qpenet_jax.core.runtime import keep_freed_memory, processor

PEAK_ROWS = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Rows of the square matrices whose product is the peak: some 0.1 s or less."""


def benchmark(settings: Settings) -> dict[str, Any]:
    """Measures what the settings name; returns numbers and strings alone, for JSON.

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
    tables = [
        each._asdict()
        for names, measured in TABLES.items()
        if set(names) & set(settings.what)
        for each in measured(settings)
    ]
    return {"facts": _facts(settings), "tables": tables}


def _facts(given: Settings) -> dict[str, Any]:
    """Returns where, when and with which versions was measured."""
    packages = ["jax", "jaxlib", "flax", "numpy", "grain"]
    packages += ["torch", "torchvision"] if given.against else []
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    return {
        "backbone": given.backbone,
        "pixels": f"{given.size} x {given.size}",
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "cpu": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": ", ".join(versions),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# --- single steps -----------------------------------------------------------------

CAPTION = (
    "Time of one step without dropout, the median of several rounds with the first and "
    "third quartiles in brackets. JAX and all variants of PyTorch take turns in one "
    "process, with the same weights and inputs, after their results were found equal; "
    "the ratio is JAX's time divided by the row's: below 1 JAX is faster. GFLOP counts "
    "direct convolutions and matrix products, and attention to all positions, whatever "
    "the step computes: a faster algorithm shows as more GFLOP/s. The peak is the "
    "speed of one large matrix product in JAX."
)

PROCESSES = (
    "In a new process: the time from its start to the end of its first step, and its "
    "peak memory after three steps, of which importing the libraries takes a part. JAX "
    "runs twice: the first time it compiles everything, the second time it finds the "
    "compilations in its cache."
)


def step_tables(settings: Settings) -> Iterator[Table]:
    """Yields the table of steps in this process, then of those in new processes.

    The backbone alone is measured in this process only.
    """
    cases = [*settings.cases([step for step in STEPS if step in settings.what])]
    yield Table(CAPTION, [r for case in cases for r in step_rows(case, settings)])
    trained = [case for case in cases if case.what != "backbone"]
    if trained:
        gc.collect()  # the processes may need the memory
        rows = [r for case in trained for r in process_rows(case, settings)]
        yield Table(PROCESSES, rows)


def step_rows(case: Case, settings: Settings) -> list[Row]:
    """Returns the rows of JAX and of the settings' variants of PyTorch."""
    gc.collect()  # the case before may have left memory that this one needs
    episodes = made_up_episodes(case)
    if settings.against:
        torch_side, device = _torch_side()
        weights = torch_side.random_weights(case)
        candidates = {
            variant: torch_side.torch_candidate(case, variant, device, episodes)
            for variant in settings.variants
        }
    else:
        weights, candidates = jax_side.random_weights(case), {}
    in_jax = jax_side.jax_candidate(case, weights, episodes)
    rows = compared_steps(case, {"JAX": in_jax} | candidates, settings.seconds)
    gflop, peak = step_flop(case, weights, episodes) / 1e9, _peak(case.dtype)
    for row in rows:
        rate = 1e3 * gflop / row["ms"][1]
        row |= {"GFLOP": gflop, "GFLOP/s": rate, "% of peak": 1e2 * rate / peak}
    return rows


def compared_steps(
    case: Case, candidates: Mapping[str, Candidate], seconds: float
) -> list[Row]:
    """Returns a row for each candidate; they take turns, and the first is JAX's.

    Raises:
        InputError: a candidate computes something different from JAX, or
            torch.compile fails.
    """
    numbers = {}
    for name, each in candidates.items():
        # It fails in many ways; it needs a C++ compiler, for example.
        fault = f"torch.compile fails for {case}"
        named = refused_as(fault, "leave it out with --variants")
        with named if name == "compile" else contextlib.nullcontext():
            numbers[name] = each.numbers(each.call())
    in_jax = numbers.pop("JAX")
    differences = {
        name: timing.differences_between(in_jax, found, case, name)
        for name, found in numbers.items()
    }
    calls = {name: each.call for name, each in candidates.items()}
    return [
        {"step": str(case)} | row | differences.get(row["variant"], {})
        for row in timing.measure(calls, seconds)
    ]


def _torch_side() -> tuple[Any, str]:
    """Returns the module with the twin's steps, which imports PyTorch, and a device."""
    for package in ("torch", "torchvision", "efficientnet_lite_pytorch"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--against torch needs {package}, which isn't installed: run "
                "`pip install -e .[parity]`"
            )
    module = importlib.import_module("qpenet_jax.benchmark.torch_side")
    return module, module.device_for(jax.default_backend())


def _peak(dtype: str) -> float:
    """Returns the GFLOP/s of a product of two large square matrices."""
    rows = PEAK_ROWS[jax.default_backend()]
    kind = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    matrix, product = jnp.ones((rows, rows), kind), jax.jit(jnp.matmul)
    with products(dtype):
        (row,) = timing.measure(
            {"": lambda: product(matrix, matrix).block_until_ready()}
        )
    return 2e-6 * rows**3 / row["ms"][0]


def process_rows(case: Case, settings: Settings) -> list[Row]:
    """Returns time to the first step and peak memory in new processes."""
    names, device = {"JAX": "JAX", "JAX, cached": "JAX"}, ""
    if settings.against:
        names |= {variant: variant for variant in settings.variants}
        device = _torch_side()[1]
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name, variant in names.items():
            given = [dataclasses.asdict(case), variant, device, time.time()]
            printed = timing.run_module([jax_side.__name__, json.dumps(given)], cache)
            row = json.loads(printed.splitlines()[-1])
            rows.append({"step": str(case), "variant": name} | row)
    return rows


TABLES: dict[tuple[str, ...], Callable[[Settings], Iterable[Table]]] = {
    STEPS: step_tables,
    ("memory",): memory_plans,
    ("protocol",): evaluation_speed,
    ("runtimes",): runtimes,
    ("predict",): prediction_speed,
    ("data",): loading_speed,
}
"""What makes the tables of the settings' `what`."""

# --- the report -------------------------------------------------------------------


def benchmark_report(result: dict[str, Any]) -> str:
    """Returns the result of `benchmark` as Markdown: the facts, then every table."""
    facts = (f"{name}: {value}" for name, value in result["facts"].items())
    parts = [f"{'; '.join(facts)}."]
    for each in result["tables"]:
        caption, rows = Table(**each)
        headers = list(dict.fromkeys(header for row in rows for header in row))
        cells = [[as_text(row.get(header)) for header in headers] for row in rows]
        parts += [caption, table(headers, cells, numbers=True)]
    return "\n\n".join(parts)


def as_text(value: Any) -> str:
    """Returns a cell's text: of quartiles the median with the others in brackets."""
    if value is None:
        return "-"
    if isinstance(value, list):
        low, median, high = map(as_text, value)
        return f"{median} ({low}-{high})"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpenet_jax.backbones.precision import products
from qpenet_jax.benchmark import jax_side
from qpenet_jax.benchmark.evaluation_speed import evaluation_speed
from qpenet_jax.benchmark.flop import flop
from qpenet_jax.benchmark.jax_side import Candidate
from qpenet_jax.benchmark.loading_speed import loading_speed
from qpenet_jax.benchmark.made_up import made_up_episodes
from qpenet_jax.benchmark.memory_plans import memory_plans
from qpenet_jax.benchmark.prediction_speed import prediction_speed
from qpenet_jax.benchmark.processes import run_case
from qpenet_jax.benchmark.runtimes import runtimes
from qpenet_jax.benchmark.settings import STEPS, Case, Settings
from qpenet_jax.benchmark.speed_report import Row, Table
from qpenet_jax.benchmark.timing import differences_between, measure
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.runtime import keep_freed_memory, processor
from qpenet_jax.runs.datasets import build_dataset

PEAK_ROWS = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Rows of the square matrices whose product is the peak: some 0.1 s or less."""


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
    tables = []
    if set(STEPS) & set(settings.what):
        tables += step_tables(settings)
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


def step_tables(settings: Settings, new_processes: bool = True) -> list[Table]:
    """Returns the tables of single steps: in this process, and in new ones if wanted.

    The backbone alone is measured in this process only.
    """
    torch_side, device = _torch_side(settings) if settings.against else (None, "")
    peaks = {dtype: _peak(dtype) for dtype in settings.dtype}
    measured, started = [], []
    for case in settings.cases([step for step in STEPS if step in settings.what]):
        rows = _step_rows(case, settings, torch_side, device)
        for row in (each for each in rows if "ms" in each):
            rate = row["GFLOP"] / row["ms"][1] * 1e3
            row |= {"GFLOP/s": rate, "% of peak": 1e11 * rate / peaks[case.dtype]}
        measured += rows
        gc.collect()  # the next case, or a process of its own, may need the memory
        if new_processes and case.what != "backbone":
            variants = [row["variant"] for row in rows if "ms" in row]
            started += _process_rows(case, variants, device)
    tables = [Table(CAPTION, measured)]
    return tables + ([Table(PROCESSES, started)] if started else [])


def _step_rows(
    case: Case, settings: Settings, torch_side: Any, device: str
) -> list[Row]:
    """Returns the rows of JAX and, with `torch_side`, of PyTorch's variants."""
    weights = (torch_side or jax_side).random_weights(case)
    episodes = made_up_episodes(case)
    makers: dict[str, Callable[[], Candidate]] = {}
    for variant in settings.variants if torch_side else ():
        makers[variant] = functools.partial(
            torch_side.torch_candidate, case, variant, device, episodes
        )
    single = dataclasses.replace(case, dtype="float32")
    inputs = jax_side.inputs_of(single, weights, episodes)
    count = flop(jax.make_jaxpr(jax_side.step_of(single))(*inputs))
    in_jax = jax_side.jax_candidate(case, weights, episodes)
    rows = compared_steps(case, in_jax, makers, settings.seconds)
    return [row | {"GFLOP": count / 1e9} for row in rows]


def _torch_side(settings: Settings) -> tuple[Any, str]:
    """Returns the module with the twin's steps, which imports PyTorch, and a device."""
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
    return module, module.device_for(jax.default_backend())


def _peak(dtype: str) -> float:
    """Returns the FLOP/s of a product of two large square matrices."""
    rows = PEAK_ROWS[jax.default_backend()]
    kind = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    matrix, product = jnp.ones((rows, rows), kind), jax.jit(jnp.matmul)
    with products(dtype):
        (row,) = measure({"": lambda: product(matrix, matrix).block_until_ready()})
    return 2e3 * rows**3 / row["ms"][0]


def compared_steps(
    case: Case,
    in_jax: Candidate,
    makers: Mapping[str, Callable[[], Candidate]],
    seconds: float,
) -> list[Row]:
    """Returns a row for JAX and for each variant of PyTorch, which take turns.

    `makers` return the variants, each of which must compute the numbers of JAX.
    torch.compile may fail; the reason is then in its row.

    Raises:
        InputError: a variant computes something different.
    """
    expected = first_numbers(in_jax)
    calls, about = {"JAX": in_jax.call}, {"JAX": {}}
    for variant, make in makers.items():
        try:
            candidate = make()
            found = first_numbers(candidate)
        except Exception as error:
            if variant != "compile" or isinstance(error, InputError):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            about[variant] = {"failed": lines[0][:100]}
            continue
        about[variant] = differences_between(expected, found, case, variant)
        calls[variant] = candidate.call
    times = {row["variant"]: row for row in measure(calls, seconds)}
    return [
        {"step": str(case), "variant": variant} | times.get(variant, {}) | more
        for variant, more in about.items()
    ]


def first_numbers(candidate: Candidate) -> dict[str, np.ndarray]:
    """Does a candidate's first step and returns its numbers."""
    return candidate.numbers(candidate.call())


def _process_rows(case: Case, variants: Sequence[str], device: str) -> list[Row]:
    """Returns time to the first step and peak memory in new processes."""
    names = {"JAX": "JAX", "JAX, cached": "JAX"} | {v: v for v in variants[1:]}
    with tempfile.TemporaryDirectory() as cache:
        return [
            {"step": str(case), "variant": name}
            | run_case(case, variant, device, cache)
            for name, variant in names.items()
        ]

"""Measure speed and memory, on request beside the PyTorch twin: `qpenet benchmark`.

`benchmark` measures; tables.py and chart.py show what it returns.
"""

import dataclasses
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qpenet_jax.backbones.precision import products
from qpenet_jax.benchmark import jax_side as ours
from qpenet_jax.benchmark.contenders import (
    Contender,
    differences_between,
    made_up_episodes,
)
from qpenet_jax.benchmark.evaluation_speed import protocol_runs
from qpenet_jax.benchmark.loading_speed import benchmark_data
from qpenet_jax.benchmark.memory_plans import memory_plans
from qpenet_jax.benchmark.prediction_speed import prediction
from qpenet_jax.benchmark.processes import run_child
from qpenet_jax.benchmark.runtimes import runtimes
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.benchmark.timing import interleave, quartiles
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.runtime import keep_freed_memory, processor
from qpenet_jax.core.types import Episode
from qpenet_jax.runs.datasets import build_dataset

PEAK_ROWS = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Rows of the square matrices whose product is the peak: some 0.1 s or less."""

TRIED = 3
"""Rounds by which the fastest variant of the twin is chosen."""


def benchmark(settings: Settings, config: Any | None = None) -> dict[str, Any]:
    """Measures what the settings say; return numbers and strings alone, for JSON.

    The images of "protocol" and "data" are the config's; without one they are made
    up. As in training, the process keeps freed memory from then on.

    Raises:
        InputError: this machine can't compute in a dtype; PyTorch is missing, or
            computes something different.
    """
    # Both frameworks share the device: neither may take most of its memory at once. It
    # holds from when the device is first used, so that nothing before may ask for it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    keep_freed_memory()
    if "tf32" in settings.dtype and jax.default_backend() != "gpu":
        raise InputError("--dtype tf32 needs an NVIDIA GPU: choose float32")
    opponent = _opponent(settings)
    cases = list(settings.cases())
    result: dict[str, Any] = {
        "facts": _facts(settings, opponent),
        "peak_flops": {
            dtype: _peak(dtype, opponent)
            for dtype in dict.fromkeys(case.dtype for case in cases)
        },
        "cases": [_case(case, opponent, settings) for case in cases],
    }
    if "memory" in settings.what:
        result["memory"] = list(memory_plans(settings))
    if "protocol" in settings.what:
        result["protocol"] = list(protocol_runs(settings, config))
    if "runtimes" in settings.what:
        result["runtimes"] = list(runtimes(settings))
    if "predict" in settings.what:
        result["predict"] = prediction(settings)
    if "data" in settings.what:
        result["data"] = benchmark_data(
            build_dataset(config, "train") if config else None,
            side=settings.size,
            shots=settings.shots,
            seconds=settings.seconds,
            workers=settings.workers,
            seed=settings.seed,
        )
    return result


class Opponent(NamedTuple):
    """The module with the twin (it imports PyTorch), and its device."""

    module: Any
    device: str


def _opponent(settings: Settings) -> Opponent | None:
    if settings.against is None:
        return None
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
    return Opponent(module, module.device_for(jax.default_backend()))


def _facts(given: Settings, opponent: Opponent | None) -> dict[str, Any]:
    """Returns where, when and with what was measured."""
    packages = ["jax", "jaxlib", "flax", "numpy"]
    facts: dict[str, Any] = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backbone": given.backbone,
        "weights": given.weights or "random",
        "size": given.size,
        "seed": given.seed,
        "dropout": "switched off",
    }
    if opponent:
        packages += ["torch", "torchvision"]
        facts["torch_threads"] = opponent.module.threads()
    facts["versions"] = {name: importlib.metadata.version(name) for name in packages}
    return facts


def _peak(dtype: str, opponent: Opponent | None) -> dict[str, float]:
    """Returns the FLOP/s of a large matrix product in every framework."""
    n = PEAK_ROWS[jax.default_backend()]
    with products(dtype):
        peak = {"jax": ours.peak_rate(dtype, n)}
    if opponent:
        peak["torch"] = opponent.module.peak_rate(dtype, opponent.device, n)
    return peak


# --- one case ---------------------------------------------------------------------


def _case(case: Case, opponent: Opponent | None, settings: Settings) -> dict[str, Any]:
    """Measures one case: speed, and in new processes start and memory."""
    found = _speed(case, opponent, settings)
    gc.collect()  # the next case, or a process of its own, may need the memory
    if settings.processes and case.what != "backbone":
        found["processes"] = _processes(case, found.get("variant", ""), opponent)
    return found


def _speed(case: Case, opponent: Opponent | None, settings: Settings) -> dict[str, Any]:
    """Times our step, in turns with the fastest variant of the twin if there is one."""
    weights, episodes = ours.random_weights(case), made_up_episodes(case)
    jaxs = ours.contender(case, weights, episodes)
    first = jaxs.first()
    found = dataclasses.asdict(case) | {
        "name": str(case),
        "flop": ours.count_flop(case, weights, episodes),
    }
    if opponent is None:
        (times,) = interleave([jaxs.call], settings.seconds)
        return found | {"seconds": quartiles(times), "rounds": len(times)}
    inputs = episodes, weights
    twins, tried = _fastest(case, opponent, settings.variants, first, inputs)
    times, theirs = interleave([jaxs.call, twins.call], settings.seconds)
    return found | {
        **tried,
        "seconds": quartiles(times),
        "rounds": len(times),
        "torch_seconds": quartiles(theirs),
        "ratio": quartiles(times / theirs),
    }


class _Trial(NamedTuple):
    """What a variant of the twin took, and how far its results differ from ours."""

    seconds: float
    variant: str
    contender: Contender
    differences: dict[str, float]


def _fastest(
    case: Case,
    opponent: Opponent,
    variants: Sequence[str],
    first: Mapping[str, np.ndarray],
    inputs: tuple[Episode, ours.Weights],
) -> tuple[Contender, dict[str, Any]]:
    """Returns the twin's fastest variant, and what all of them took in seconds.

    Every variant must compute what we do. torch.compile may fail; the reason is then
    part of the result.
    """
    told: dict[str, float | str] = {}
    best: _Trial | None = None
    for variant in variants:
        try:
            trial = _try(case, opponent, variant, first, inputs)
        except Exception as error:
            if variant != "compile" or isinstance(error, InputError):
                raise
            told[variant] = f"not available ({_first_line(error)})"
            continue
        told[variant] = trial.seconds
        if best is None or trial.seconds < best.seconds:
            best = trial
    if best is None:
        raise InputError(f"{case}: PyTorch runs none of {', '.join(variants)}: {told}")
    return best.contender, {
        "variants": told,
        "variant": best.variant,
        "differences": best.differences,
    }


def _try(
    case: Case,
    opponent: Opponent,
    variant: str,
    first: Mapping[str, np.ndarray],
    inputs: tuple[Episode, ours.Weights],
) -> _Trial:
    twins = opponent.module.contender(case, variant, opponent.device, *inputs)
    differences = differences_between(first, twins.first(), case)
    (times,) = interleave([twins.call], rounds=TRIED)
    return _Trial(float(np.median(times)), variant, twins, differences)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:100]


def _processes(case: Case, variant: str, opponent: Opponent | None) -> dict[str, Any]:
    """Returns time to the first step and peak memory in new processes.

    "cold" finds no compilation of earlier processes, "cached" that of the first.
    """
    told = {"case": dataclasses.asdict(case)}
    with tempfile.TemporaryDirectory() as cache:
        found: dict[str, Any] = {
            kind: run_child("qpenet_jax.benchmark.jax_side", cache=cache, **told)
            for kind in ("cold", "cached")
        }
    if opponent:
        told |= {"variant": variant, "device": opponent.device}
        theirs = run_child("qpenet_jax.benchmark.torch_side", **told)
        ratio = _without_imports(found["cached"]) / _without_imports(theirs)
        found |= {"torch": theirs, "memory_ratio": ratio}
    return found


def _without_imports(child: Mapping[str, float]) -> float:
    return child["peak_bytes"] - child["import_bytes"]

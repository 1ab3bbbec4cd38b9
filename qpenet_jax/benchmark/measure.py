"""What the speed benchmarks measure with: cases, clocks, FLOP, memory, processes."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jax.extend import core
from jaxtyping import Float, UInt8

from qpenet_jax.benchmark.photos import made_up_photo
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.data.transforms import fit, fit_label

TWIN_VARIANTS = {
    "eager": "eager, NCHW",
    "channels_last": "eager, channels_last",
    "compile": "torch.compile, channels_last",
}
"""Ways of running the PyTorch twin, and what tables call them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure: "eval", "train" or "backbone" at these sizes.

    `size` is in pixels; `network` holds fields of QPENet other than the paper's;
    `weights` is the backbone's file, random ones are drawn without it. Plain values
    alone, so that another process can be told the case as JSON.
    """

    what: str
    backbone: str = "resnet50"
    shots: int = 1
    batch: int = 1
    size: int = 473
    dtype: str = "float32"
    seed: int = 0
    weights: str = ""
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> int:
        """Number of images that pass the backbone in a step."""
        return self.batch * (self.shots + 1)

    def __str__(self) -> str:
        """Return a name for tables and messages."""
        shots = f"{self.shots} shot{'s' if self.shots > 1 else ''}"
        return f"{self.what}, {shots}, batch {self.batch}, {self.dtype}"


class Side(NamedTuple):
    """One of the two that compete, in one case.

    `first` does a step and returns the numbers that must be equal on both sides; `call`
    does a step and returns when it is finished.
    """

    first: Callable[[], dict[str, np.ndarray]]
    call: Callable[[], Any]


# --- inputs -----------------------------------------------------------------------

SHARES = (0.02, 0.4)
"""How much of a photo its object covers: in VOC, padded, the middle 80 % of objects of
2,048 pixels or more cover 2 to 41 %. Attention's cost depends on it."""


def made_up_episodes(case: Case) -> Episode:
    """Return the case's batch of episodes; the images are photos of noise."""
    rng = np.random.default_rng(case.seed)
    drawn = [_photo(i, case.size, rng) for i in range(case.images)]
    images, masks = map(np.stack, zip(*drawn, strict=True))
    shape = case.batch, case.shots + 1
    images, masks = (x.reshape(*shape, *x.shape[1:]) for x in (images, masks))
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:])


def _photo(
    index: int, side: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"]]:
    """Return a photo and the mask of an ellipse in it, tinted."""
    image, label = made_up_photo(index)
    height, width = label.shape
    scale = math.sqrt(rng.uniform(*SHARES) / math.pi)  # of the half axes
    axes = round(scale * width), round(scale * height)
    centre = (
        int(rng.integers(axes[0], width - axes[0])),
        int(rng.integers(axes[1], height - axes[1])),
    )
    mask = np.zeros_like(label)
    cv2.ellipse(mask, centre, axes, 0, 0, 360, 1, cv2.FILLED)
    image[mask == 1] = image[mask == 1] // 2 + rng.integers(0, 128, 3).astype(np.uint8)
    return fit(image, side), fit_label(mask, side)


# --- are they equal? --------------------------------------------------------------

TIE = {"float32": 1e-3, "tf32": 0.03, "bfloat16": 0.03}
"""Pixels whose margin is below this share of the largest may fall on either side."""

LIMITS = {  # in float32, and with the 8 or 11 bits of the others
    "margin": (1e-3, 0.2),
    "masks": (1e-3, 0.01),
    "features": (1e-3, 0.2),
    "loss": (1e-4, 0.02),
    "gradient": (0.01, 0.5),
}
"""How far the sides may differ, as `compare` tells it."""


def compare(
    case: Case, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Return how far two sides differ, or refuse to compare their speed.

    Deviations are relative: of margins, features and loss to the largest, of gradients
    to their norm. "masks" is the share of pixels, away from ties, of another class.

    Raises:
        InputError: naming what differs.
    """
    found = {name: _deviation(name, ours[name], theirs[name]) for name in theirs}
    if "margin" in theirs:
        tie = TIE[case.dtype] * np.abs(theirs["margin"]).max()
        clear = np.abs(theirs["margin"]) > tie
        differs = (ours["margin"] > 0) != (theirs["margin"] > 0)
        found["masks"] = float(differs[clear].mean())
    for name, value in found.items():
        limit = LIMITS[name][case.dtype != "float32"]
        if not value <= limit:  # NaN is refused, too
            raise InputError(
                f"{case}: {name} of JAX and PyTorch differ by {value:.2g}, more than "
                f"{limit:g}: no comparison of speed; measure without --against"
            )
    return found


def _deviation(name: str, found: np.ndarray, expected: np.ndarray) -> float:
    difference = found - expected
    if name == "gradient":
        return float(np.linalg.norm(difference) / np.linalg.norm(expected))
    return float(np.abs(difference).max() / np.abs(expected).max())


# --- clocks -----------------------------------------------------------------------

TURN = 1.0
"""Seconds that a turn lasts at least: short steps are repeated, and the first of them,
which finds the other side's data in the caches and its own threads asleep, isn't timed.
"""

PAUSE = 0.05
"""Seconds between turns, in which the idle threads of one side stop spinning."""

ROUNDS = 5


def interleave(
    calls: Sequence[Callable[[], Any]], seconds: float = 0.0, rounds: int = ROUNDS
) -> list[Float[np.ndarray, "n"]]:
    """Let all sides take turns, A B A B; return seconds a call for each of n rounds.

    It goes on for `seconds`, and for `rounds` at least, after a round of warm-up.
    """
    longest = max(_turn(call, 1) for call in calls)
    repeats = math.ceil(TURN / longest)
    start, times = time.perf_counter(), []
    while len(times) < rounds or time.perf_counter() - start < seconds:
        times.append([_turn(call, repeats) for call in calls])
    return list(np.array(times).T)


def _turn(call: Callable[[], Any], repeats: int) -> float:
    time.sleep(PAUSE)
    if repeats > 1:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def quartiles(values: Float[np.ndarray, "n"]) -> list[float]:
    """Return the first, second and third quartile."""
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist()


def matmul_rate(product: Callable[[], Any], side: int) -> float:
    """Return the best FLOP/s of five products of two square matrices."""
    product()
    return 2 * side**3 / min(_turn(product, 1) for _ in range(5))


# --- FLOP -------------------------------------------------------------------------


def flop(jaxpr: Any, used: Sequence[bool] | None = None) -> int:
    """Count the FLOP of the convolutions and matrix products that a jaxpr needs.

    A multiplication and an addition are two. Padding counts, zeros put between pixels
    don't. Of `platform_dependent` the default counts, which is the plain formulation:
    fast ones (Winograd) then show as speed, not as less work. `used` tells which
    outputs are.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    outputs = zip(jaxpr.outvars, used or [True] * len(jaxpr.outvars), strict=True)
    needed = {var for var, is_used in outputs if is_used and _is_var(var)}
    total = 0
    for equation in reversed(jaxpr.eqns):
        wanted = [var in needed for var in equation.outvars]
        if any(wanted):
            total += _equation_flop(equation, wanted)
            needed.update(filter(_is_var, equation.invars))
    return total


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _equation_flop(equation: Any, wanted: Sequence[bool]) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        inner = math.prod(shape[axis] for axis in contracted)
        return 2 * equation.outvars[0].aval.size * inner
    if name == "conv_general_dilated":
        kernel, outputs = equation.invars[1].aval, equation.outvars[0].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        products = outputs.size * (kernel.size // features)
        return 2 * products // math.prod(params["lhs_dilation"])
    if name == "cond":
        branches = params["branches"]
        platforms = params.get("branches_platforms")
        if platforms:
            return flop(branches[platforms.index(None)], wanted)
        return max(flop(branch, wanted) for branch in branches)
    if name == "scan":
        return params["length"] * flop(params["jaxpr"])
    if name == "while":  # how often is not known: once
        return flop(params["body_jaxpr"])
    inner = next((params[k] for k in ("jaxpr", "call_jaxpr") if k in params), None)
    return flop(inner, wanted) if inner is not None else 0


# --- processes --------------------------------------------------------------------


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage counts the parent's memory in
        lines = status.read_text().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_child(module: str, **told: Any) -> dict[str, Any]:
    """Run `python -m module` with a JSON object; return the one that it prints last.

    It is told when it was started, in seconds since the epoch.

    Raises:
        InputError: it failed, with its last line.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    text = json.dumps(told | {"started": time.time()})
    command = [sys.executable, "-P", "-m", module, text]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, out of memory?"])[-1]
        raise InputError(
            f"{module} failed in a process of its own ({reason}): give a smaller "
            "--size or --batch, or leave the processes out"
        )
    return json.loads(done.stdout.splitlines()[-1])


def child_report(
    side: Side, started: float, at_import: int, memory: Callable[[], int]
) -> None:
    """Do three steps and print what a process of its own tells.

    `start_s` is from the process's start to the end of its first step; `memory` returns
    the peak in bytes, of which the libraries took `at_import`.
    """
    side.call()
    start = time.time() - started
    side.call()
    side.call()
    found = {"start_s": start, "peak_bytes": memory(), "import_bytes": at_import}
    print(json.dumps(found))

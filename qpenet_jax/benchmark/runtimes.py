"""Our steps beside other run times' on the same exported network: ONNX's on a CPU.

A task that was learned once encodes its query and decodes it. Both parts are measured,
in turns, one photo at a time.
"""

import functools
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpenet_jax.backbones.registry import backbone
from qpenet_jax.benchmark import jax_side as ours
from qpenet_jax.benchmark.contenders import made_up_episodes
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.benchmark.timing import interleave, quartiles
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.markdown import table
from qpenet_jax.evaluation.predictor import qpenet_predictor
from qpenet_jax.runs.export import onnx
from qpenet_jax.runs.parts import network_parts


def threads() -> int:
    """Returns how many cores this process may use: `taskset` can lower it."""
    return len(os.sched_getaffinity(0))


Call = Callable[[dict[str, np.ndarray]], dict[str, Any]]

EQUAL = 1e-3
"""Largest difference of margins, as a share of the largest margin, that is compared."""


def runtimes(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields what the parts of a prediction take, by number of shots and run time.

    Raises:
        InputError: no CPU, no run time of ONNX, or one that computes something else.
    """
    if jax.default_backend() != "cpu":
        raise InputError("runtimes are compared on a CPU: set JAX_PLATFORMS=cpu")
    found = {
        n: f for n, f in RUNTIMES.items() if importlib.util.find_spec(n) is not None
    }
    if not found or importlib.util.find_spec("jax2onnx") is None:
        raise InputError(
            "runtimes needs jax2onnx and onnxruntime or openvino: docs/export.md tells "
            "how to install them"
        )
    for shots in settings.shots:
        yield _beside(settings.case("eval", shots, 1, "float32"), found, settings)


def _beside(
    case: Case, sessions: dict[str, Callable[[bytes], Call]], settings: Settings
) -> dict[str, Any]:
    weights, episode = ours.random_weights(case), made_up_episodes(case)
    networks = ours.network_of(case), backbone(case.backbone)
    predict = qpenet_predictor(*networks, weights.params, weights.backbone)
    supports = tuple(
        predict.encode(episode.support_images[:, k], ("support",))
        for k in range(case.shots)
    )
    query = predict.encode(episode.query_image, ("query",))
    jax.block_until_ready((supports, query))
    margin = np.asarray(predict.decode(supports, episode.support_masks, query))

    parts = network_parts(
        networks, weights.params, weights.backbone, case.size, (case.shots,)
    )
    named = {"image": episode.query_image, "masks": episode.support_masks}
    named |= {f"query_{n}": np.asarray(x) for n, x in query.items()}
    stacked = jax.tree.map(lambda *x: np.asarray(jnp.stack(x, 1)), *supports)
    named |= {f"support_{n}": x for n, x in stacked.items()}
    mine: dict[str, Callable[[], Any]] = {
        "encode_query": lambda: predict.encode(episode.query_image, ("query",)),
        f"decode_{case.shots}shot": lambda: predict.decode(
            supports, episode.support_masks, query
        ),
    }
    result: dict[str, Any] = {"shots": case.shots, "parts": {}, "differences": {}}
    for name, call in mine.items():
        model = onnx(parts[name], name)
        inputs = {n: named[n] for n in parts[name].inputs}
        theirs = {
            n: functools.partial(make(model), inputs) for n, make in sessions.items()
        }
        if name.startswith("decode"):
            result["differences"] = {
                n: float(
                    np.abs(other()["margin"] - margin).max() / np.abs(margin).max()
                )
                for n, other in theirs.items()
            }
        calls = {"ours": lambda call=call: jax.block_until_ready(call()), **theirs}
        result["parts"][name] = _timed(calls, settings.seconds)
    for runtime, difference in result["differences"].items():
        if not difference <= EQUAL:
            raise InputError(
                f"{case}: margins of {runtime} differ from ours by {difference:.2g} of "
                "the largest, so their speed can't be compared"
            )
    return result


CLOCKS = {"seconds": time.perf_counter, "core_seconds": time.process_time}


def _timed(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Returns what each takes, and what we take as a share of each, by both CLOCKS."""
    found: dict[str, Any] = {}
    for what, clock in CLOCKS.items():
        times = interleave(list(calls.values()), seconds / len(CLOCKS), clock=clock)
        by_name = dict(zip(calls, times, strict=True))
        found[what] = {n: quartiles(t) for n, t in by_name.items()}
        found[f"{what}_ratio"] = {
            n: quartiles(by_name["ours"] / t) for n, t in by_name.items() if n != "ours"
        }
    return found


def _onnxruntime(model: bytes) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options)
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _openvino(model: bytes) -> Call:
    import openvino  # pyright: ignore[reportMissingImports]  # on one's own wish

    core = openvino.Core()
    read = core.read_model(model, b"")
    # By itself it would compute in bfloat16 where the CPU has that.
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_NUM_THREADS"] = str(threads())
    compiled = core.compile_model(read, "CPU", options)

    def call(inputs):
        found = compiled(inputs)
        return {port.get_any_name(): found[port] for port in compiled.outputs}

    return call


RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino}
"""What is compared where it is installed: from a model's bytes to a call of it."""


def runtimes_report(found: Sequence[dict[str, Any]]) -> str:
    """Returns the table of `runtimes`, with the ratios' quartiles in brackets."""
    names = list(found[0]["differences"])
    rows = []
    for case in found:
        for part, times in case["parts"].items():
            if part == "encode_query" and case is not found[0]:
                continue  # it knows no shots
            cells = [part, _milliseconds(times["seconds"]["ours"])]
            for name in names:
                cells.append(_milliseconds(times["seconds"][name]))
                cells += [_ratio(times[f"{what}_ratio"][name]) for what in CLOCKS]
            rows.append(cells)
    header = ["part", "JAX"]
    for name in names:
        header += [name, f"JAX / {name}", "of cores' time"]
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    largest = max(max(case["differences"].values()) for case in found)
    return (
        f"One photo at a time, in turns; medians and quartiles. {versions}; "
        f"{threads()} thread(s). Margins differ by {largest:.1g} of the largest at "
        f"most.\n\n{table(header, rows, numbers=True)}"
    )


def _milliseconds(times: Sequence[float]) -> str:
    return f"{1000 * times[1]:,.0f} ms"


def _ratio(quarters: Sequence[float]) -> str:
    low, middle, high = quarters
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"

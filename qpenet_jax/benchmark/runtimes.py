"""The parts of a prediction in JAX, beside run times of ONNX on the same network.

A task that was learned once encodes its query and decodes it. Both parts are measured,
in turns, one photo at a time, on a CPU.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpenet_jax.backbones.registry import backbone
from qpenet_jax.benchmark.jax_side import network_of, random_weights
from qpenet_jax.benchmark.made_up import made_up_episodes
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.benchmark.speed_report import Row, Table
from qpenet_jax.benchmark.timing import differences_between, measure
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.predictor import qpenet_predictor
from qpenet_jax.runs.export import network_parts, onnx

Session = Callable[[dict[str, np.ndarray]], dict[str, Any]]
"""A loaded model: named inputs to named outputs."""


def runtimes(settings: Settings) -> Table:
    """Returns the times of the parts of a prediction, by number of shots and run time.

    Raises:
        InputError: no CPU, no run time of ONNX, or one that computes something else.
    """
    if jax.default_backend() != "cpu":
        raise InputError("runtimes are compared on a CPU: set JAX_PLATFORMS=cpu")
    sessions = {
        n: f for n, f in RUNTIMES.items() if importlib.util.find_spec(n) is not None
    }
    if not sessions or importlib.util.find_spec("jax2onnx") is None:
        raise InputError(
            "runtimes needs jax2onnx and onnxruntime or openvino: docs/export.md says "
            "how to install them"
        )
    rows: list[Row] = []
    single = dataclasses.replace(settings, batch=(1,), dtype=("float32",))
    for case in single.cases(["eval"]):
        rows += compare_runtimes(case, sessions, settings.seconds)
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in sessions)
    return Table(
        "One photo at a time, in turns; medians and quartiles of the clock's time and "
        "of the time of all cores together. The ratio is JAX's time divided by the "
        f"row's. {versions}; {threads()} thread(s). Differences of margins are shares "
        "of the largest.",
        rows,
    )


def compare_runtimes(
    case: Case, sessions: Mapping[str, Callable[[bytes], Session]], seconds: float
) -> list[Row]:
    """Returns a row for each part and run time, with the margins' difference from JAX.

    Raises:
        InputError: the margins of a run time differ from JAX's.
    """
    weights, episode = random_weights(case), made_up_episodes(case)
    networks = network_of(case), backbone(case.backbone)
    predict = qpenet_predictor(*networks, weights.params, weights.backbone)
    encode = functools.partial(predict.encode, episode.query_image, ("query",))
    query, supports = (
        encode(),
        tuple(
            predict.encode(episode.support_images[:, k], ("support",))
            for k in range(case.shots)
        ),
    )
    decode = functools.partial(predict.decode, supports, episode.support_masks, query)
    parts = network_parts(
        networks, weights.params, weights.backbone, case.size, (case.shots,)
    )
    stacked = jax.tree.map(lambda *x: np.asarray(jnp.stack(x, 1)), *supports)
    arrays = {"image": episode.query_image, "masks": episode.support_masks}
    arrays |= {f"query_{n}": np.asarray(x) for n, x in query.items()}
    arrays |= {f"support_{n}": x for n, x in stacked.items()}
    rows = []
    for name, call in (("encode_query", encode), (f"decode_{case.shots}shot", decode)):
        model = onnx(parts[name], name)
        inputs = {n: arrays[n] for n in parts[name].inputs}
        others = {n: functools.partial(f(model), inputs) for n, f in sessions.items()}
        found = {}
        if call is decode:
            margin = {"margin": np.asarray(decode())}
            for other, run in others.items():
                its = {"margin": run()["margin"]}
                found[other] = differences_between(margin, its, case, other)["margin"]
        calls = {"JAX": lambda call=call: jax.block_until_ready(call()), **others}
        by_clock = measure(calls, seconds / 2)
        of_cores = measure(calls, seconds / 2, time.process_time)
        for row, cores in zip(by_clock, of_cores, strict=True):
            row |= {f"{key} of cores": cores[key] for key in ("ms", "ratio")}
            rows.append({"part": name, **row, "difference": found.get(row["variant"])})
    return rows


def threads() -> int:
    """Returns how many cores this process may use: `taskset` can lower it."""
    return len(os.sched_getaffinity(0))


def _onnxruntime(model: bytes) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options)
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _openvino(model: bytes) -> Session:
    import openvino  # pyright: ignore[reportMissingImports]  # the user installs it

    core = openvino.Core()
    # Without the hint it would compute in bfloat16 where the CPU has that.
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_NUM_THREADS"] = str(threads())
    compiled = core.compile_model(core.read_model(model, b""), "CPU", options)

    def call(inputs):
        found = compiled(inputs)
        return {port.get_any_name(): found[port] for port in compiled.outputs}

    return call


RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino}
"""Run times that are compared where they are installed."""

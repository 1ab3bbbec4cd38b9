"""The time of predictions: of `qpenet predict`, and beside run times of ONNX."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qpenet_jax.backbones.registry import backbone
from qpenet_jax.benchmark import timing
from qpenet_jax.benchmark.jax_side import network_of, random_weights
from qpenet_jax.benchmark.made_up import Files, made_up_episodes, write_photo
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.benchmark.timing import Row, Table
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.predictor import qpenet_predictor
from qpenet_jax.masks.annotations import parse_support, read_supports
from qpenet_jax.masks.queries import Query, find_queries, frames
from qpenet_jax.masks.tasks import Tasks
from qpenet_jax.masks.writers import MaskWriter
from qpenet_jax.runs.export import network_parts, onnx
from qpenet_jax.segmenter import Segmenter, load

PARTS = ("read", "network", "save")


def prediction_speed(
    settings: Settings, megapixels: Sequence[float] = range(1, 13), starts: int = 5
) -> Iterator[Table]:
    """Yields tables: the first mask of a process, and every photo by number of shots.

    Photos are made up, of these `megapixels`, one after the other, with an ellipse as
    the object; `starts` processes find the compilations of an earlier one.

    Raises:
        InputError: `settings.workdir` holds no run, or a process failed.
    """
    # A run has a side of its own.
    side = [] if settings.workdir else [f"--config.side={settings.size}"]
    method = settings.workdir or f"Starter, {settings.size} pixels"
    with tempfile.TemporaryDirectory() as name:
        folder, most = Path(name), max(settings.shots)
        supports = [
            write_photo(folder / "supports", i, megapixels[0]) for i in range(most)
        ]
        sizes = itertools.cycle(megapixels)
        queries = [
            write_photo(folder, 1000 + i, next(sizes))[0]
            for i in tqdm(range(settings.photos), "making photos")
        ]
        words = side or [f"--workdir={settings.workdir}"]
        cold, *cached = (
            first_mask(words, folder, supports[0], queries[0])
            for _ in tqdm(range(1 + starts), "starting processes")
        )
        yield Table(
            f"{method}: from the start of a process to its first mask, without "
            f"compilations from before and with them ({starts} processes).",
            [{"cold, s": cold, "cached, s": timing.quartiles(np.array(cached))}],
        )
        segmenter = load(settings.workdir, side)
        tasks = {k: tasks_of(segmenter, supports[:k]) for k in sorted(settings.shots)}
        yield Table(
            f"{settings.photos} photos of {megapixels[0]} to {megapixels[-1]} "
            "megapixels; medians, and the rate of all.",
            each_photo(tasks, queries, folder / "out"),
        )


def first_mask(
    words: Sequence[str], folder: Path, support: Files, query: Path
) -> float:
    """Returns the seconds from the start of a process to its first mask."""
    out, marked = folder / "first", f"{support[0]}:{support[1]}"
    words = ["predict", *words, f"--out={out}", f"--query={query}"]
    start = time.time()
    timing.run_module(
        ["qpenet_jax.cli", *words, f"--support={marked}"], str(folder / "compilations")
    )
    return (out / f"{query.stem}.png").stat().st_mtime - start


def tasks_of(segmenter: Segmenter, supports: Sequence[Files]) -> Tasks:
    """Returns the tasks learned from files, read as `qpenet predict` does."""
    named = [parse_support(f"object={photo}:{mask}") for photo, mask in supports]
    return segmenter.learn_classes(read_supports(named))


def each_photo(
    tasks: Mapping[int, Tasks], photos: Sequence[Path], out: Path
) -> list[Row]:
    """Returns a row for each number of shots, the fewest first.

    They take turns at every photo, and write masks as `qpenet predict` does, below
    `out`.
    """
    writers = {k: MaskWriter(out / str(k), ("object",), ("png",)) for k in tasks}
    queries = find_queries(photos, recursive=False)
    for k in tasks:  # compiled before it is timed
        segmented(tasks[k], queries[0], writers[k])
    times = np.array(
        [
            [segmented(tasks[k], query, writers[k]) for k in tasks]
            for query in tqdm(queries, "segmenting", unit="photo")
        ]
    )
    fewest = min(tasks)
    return [
        {"shots": k}
        | {f"{part}, ms": 1e3 * np.median(each[:, i]) for i, part in enumerate(PARTS)}
        | {"masks/s": len(each) / each.sum()}
        | {f"time of {fewest} shot": np.median(each.sum(1) / times[:, 0].sum(1))}
        for k, each in zip(tasks, times.swapaxes(0, 1), strict=True)
    ]


def segmented(tasks: Tasks, query: Query, writer: MaskWriter) -> list[float]:
    """Segments a photo and returns the seconds of the PARTS."""
    times = [perf_counter()]
    (frame,) = frames(query)
    times.append(perf_counter())
    found = tasks.find(frame.pixels)
    times.append(perf_counter())
    writer.add(query, frame, found)
    times.append(perf_counter())
    return np.diff(times).tolist()


# --- beside run times of ONNX -----------------------------------------------------

Session = Callable[[dict[str, np.ndarray]], dict[str, Any]]
"""A loaded model: named inputs to named outputs."""


def runtimes(settings: Settings) -> Iterator[Table]:
    """Yields the times of the parts of a prediction, by number of shots and run time.

    A task that was learned once encodes its query and decodes it. Both parts are
    measured, in turns, one photo at a time, on a CPU.

    Raises:
        InputError: no CPU, no run time of ONNX, or one that computes something else.
    """
    if jax.default_backend() != "cpu":
        raise InputError("runtimes are compared on a CPU: set JAX_PLATFORMS=cpu")
    sessions = {n: f for n, f in RUNTIMES.items() if importlib.util.find_spec(n)}
    if not sessions or importlib.util.find_spec("jax2onnx") is None:
        raise InputError(
            "runtimes needs jax2onnx and onnxruntime or openvino: docs/export.md says "
            "how to install them"
        )
    single = dataclasses.replace(settings, batch=(1,), dtype=("float32",))
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in sessions)
    yield Table(
        "One photo at a time, in turns; medians and quartiles of the clock's time and "
        "of the time of all cores together. The ratio is JAX's time divided by the "
        f"row's. {versions}; {threads()} thread(s). Differences of margins are shares "
        "of the largest.",
        [
            row
            for case in single.cases(["eval"])
            for row in compare_runtimes(case, sessions, settings.seconds)
        ],
    )


def compare_runtimes(
    case: Case, sessions: Mapping[str, Callable[[bytes], Session]], seconds: float
) -> list[Row]:
    """Returns a row for each part and run time, with the margins' difference from JAX.

    Raises:
        InputError: the margins of a run time differ from JAX's.
    """
    (frozen, params), episode = random_weights(case), made_up_episodes(case)
    networks = network_of(case), backbone(case.backbone)
    predict = qpenet_predictor(*networks, params, frozen)
    encode = functools.partial(predict.encode, episode.query_image, ("query",))
    supports = tuple(
        predict.encode(episode.support_images[:, k], ("support",))
        for k in range(case.shots)
    )
    query, masks = encode(), episode.support_masks
    decode = functools.partial(predict.decode, supports, masks, query)
    arrays: dict[str, Any] = {"image": episode.query_image, "masks": masks}
    arrays |= {f"query_{name}": array for name, array in query.items()}
    for name in supports[0]:
        arrays[f"support_{name}"] = jnp.stack([each[name] for each in supports], 1)
    parts = network_parts(networks, params, frozen, case.size, (case.shots,))
    rows = []
    for name, call in (("encode_query", encode), (f"decode_{case.shots}shot", decode)):
        model = onnx(parts[name], name)
        inputs = {n: np.asarray(arrays[n]) for n in parts[name].inputs}
        others = {n: functools.partial(f(model), inputs) for n, f in sessions.items()}
        found = {}
        for other, run in others.items() if call is decode else ():
            both = {"margin": np.asarray(decode())}, {"margin": run()["margin"]}
            found[other] = timing.differences_between(*both, case, other)["margin"]
        calls = {"JAX": lambda call=call: jax.block_until_ready(call()), **others}
        by_clock = timing.measure(calls, seconds / 2)
        of_cores = timing.measure(calls, seconds / 2, time.process_time)
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

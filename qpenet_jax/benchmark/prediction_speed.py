"""The waiting times of `qpenet predict`: until the first mask, and then for each photo.

Photos are made up, of 1 to 12 megapixels, with an ellipse as the object.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from qpenet_jax.benchmark.made_up import Files, write_photo
from qpenet_jax.benchmark.processes import run_module
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.benchmark.speed_report import Row, Table
from qpenet_jax.benchmark.timing import quartiles
from qpenet_jax.masks.annotations import parse_support, read_supports
from qpenet_jax.masks.queries import Query, find_queries, frames
from qpenet_jax.masks.tasks import Tasks
from qpenet_jax.masks.writers import MaskWriter
from qpenet_jax.segmenter import Segmenter, load

PARTS = ("read", "network", "save")


def prediction_speed(
    settings: Settings, megapixels: Sequence[float] = range(1, 13), starts: int = 5
) -> Iterator[Table]:
    """Yields tables: the first mask of a process, and every photo by number of shots.

    Photos have these `megapixels`, one after the other; `starts` is the number of
    processes that find compilations of an earlier one.

    Raises:
        InputError: `settings.workdir` holds no run, or a process failed.
    """
    # A run has a side of its own.
    side = [] if settings.workdir else [f"--config.side={settings.size}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        supports = [
            write_photo(folder / "supports", i, megapixels[0])
            for i in range(max(settings.shots))
        ]
        photos = tqdm(range(settings.photos), desc="making photos", unit="photo")
        queries = [
            write_photo(folder, 1000 + i, megapixels[i % len(megapixels)])[0]
            for i in photos
        ]
        processes = tqdm(range(1 + starts), desc="starting processes", unit="process")
        words = side or [f"--workdir={settings.workdir}"]
        cold, *cached = (
            _first_mask(words, folder, supports[0], queries[0]) for _ in processes
        )
        method = settings.workdir or f"Starter, {settings.size} pixels"
        yield Table(
            f"{method}: from the start of a process to its first mask, without "
            f"compilations from before and with them ({starts} processes).",
            [{"cold, s": cold, "cached, s": quartiles(np.array(cached))}],
        )
        segmenter = load(settings.workdir or None, side)
        tasks = {k: tasks_of(segmenter, supports[:k]) for k in settings.shots}
        yield Table(
            f"{settings.photos} photos of {megapixels[0]} to {megapixels[-1]} "
            "megapixels; medians, and the rate of all.",
            _rows(each_photo(tasks, queries, folder / "out")),
        )


def _first_mask(words: Sequence[str], folder: Path, support: Files, query: Path):
    """Returns the seconds from the start of a process to its first mask."""
    out, cache = folder / "first", folder / "compilations"
    words = ["qpenet_jax.cli", "predict", *words, f"--out={out}", f"--query={query}"]
    start = time.time()
    run_module(
        [*words, f"--support={support[0]}:{support[1]}"],
        JAX_COMPILATION_CACHE_DIR=str(cache),
    )
    return (out / f"{query.stem}.png").stat().st_mtime - start


def tasks_of(segmenter: Segmenter, supports: Sequence[Files]) -> Tasks:
    """Returns the tasks learned from files, read as `qpenet predict` does."""
    named = [parse_support(f"object={photo}:{mask}") for photo, mask in supports]
    return segmenter.learn_classes(read_supports(named))


def each_photo(
    tasks: dict[int, Tasks], photos: Sequence[Path], out: Path
) -> dict[int, Float[np.ndarray, "photos parts"]]:
    """Returns seconds of all photos by number of shots; these take turns at a photo.

    Masks are written to folders of `out` as `qpenet predict` does.
    """
    writers = {k: MaskWriter(out / str(k), ("object",), ("png",)) for k in tasks}
    times: dict[int, list[list[float]]] = {k: [] for k in tasks}
    queries = find_queries(photos, recursive=False)
    for k in tasks:  # compiled before it is timed
        _segment(tasks[k], queries[0], writers[k])
    for query in tqdm(queries, desc="segmenting", unit="photo"):
        for k in tasks:
            times[k].append(_segment(tasks[k], query, writers[k]))
    return {k: np.array(rows) for k, rows in times.items()}


def _segment(tasks: Tasks, query: Query, writer: MaskWriter) -> list[float]:
    """Segments a photo and returns the seconds of the PARTS."""
    times = [time.perf_counter()]
    (frame,) = frames(query)
    times.append(time.perf_counter())
    found = tasks.find(frame.pixels)
    times.append(time.perf_counter())
    writer.add(query, frame, found)
    times.append(time.perf_counter())
    return np.diff(times).tolist()


def _rows(times: dict[int, Float[np.ndarray, "photos parts"]]) -> list[Row]:
    fewest = times[min(times)].sum(1)
    return [
        {"shots": shots}
        | {f"{p}, ms": 1e3 * m for p, m in zip(PARTS, np.median(each, 0), strict=True)}
        | {"masks/s": len(each) / each.sum()}
        | {f"time of {min(times)} shot": np.median(each.sum(1) / fewest)}
        for shots, each in times.items()
    ]

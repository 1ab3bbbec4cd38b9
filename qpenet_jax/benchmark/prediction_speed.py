"""The waiting times of `qpenet predict`: until the first mask, and then for each photo.

Photos are made up, of 1 to 12 megapixels, with an ellipse as the object.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from qpenet_jax.benchmark.made_up import CLASSES, QUALITY, made_up_photo
from qpenet_jax.benchmark.processes import run_module
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.benchmark.speed_report import Table
from qpenet_jax.benchmark.timing import quartiles
from qpenet_jax.data.transforms import binary_mask
from qpenet_jax.masks.annotations import parse_support, read_supports
from qpenet_jax.masks.queries import Query, find_queries, frames
from qpenet_jax.masks.tasks import Tasks
from qpenet_jax.masks.writers import MaskWriter
from qpenet_jax.segmenter import Segmenter, load

PARTS = ("read", "network", "save")

Support = tuple[Path, Path]
"""The files of a photo and of its mask."""


def prediction_speed(
    settings: Settings, megapixels: Sequence[float] = range(1, 13), starts: int = 5
) -> Iterator[Table]:
    """Yields tables: the first mask of a process, and every photo by number of shots.

    Photos have these `megapixels`, one after the other; `starts` is the number of
    processes that find compilations of an earlier one.

    Raises:
        InputError: `settings.workdir` holds no run, or a process failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        supports = [
            make_photo(folder / "supports", i, megapixels[0])
            for i in range(max(settings.shots))
        ]
        for i in tqdm(range(settings.photos), desc="making photos", unit="photo"):
            size = megapixels[i % len(megapixels)]
            make_photo(folder / "queries", 1000 + i, size)
        cold, *cached = (
            _first_mask(settings, folder, supports[0])
            for _ in tqdm(range(1 + starts), desc="starting processes", unit="process")
        )
        method = settings.workdir or f"Starter, {settings.size} pixels"
        yield Table(
            f"{method}: from the start of a process to its first mask, without "
            f"compilations from before and with them ({starts} processes).",
            [{"cold, s": cold, "cached, s": quartiles(np.array(cached))}],
        )
        times = _each_photo(settings, folder, supports)
        fewest = times[min(times)].sum(1)
        rows = []
        for shots, each in times.items():
            parts = zip(PARTS, 1e3 * np.median(each, 0), strict=True)
            rows.append(
                {"shots": shots}
                | {f"{part}, ms": float(median) for part, median in parts}
                | {"masks/s": len(each) / each.sum()}
                | {f"time of {min(times)} shot": np.median(each.sum(1) / fewest)}
            )
        yield Table(
            f"{settings.photos} photos of {megapixels[0]} to {megapixels[-1]} "
            "megapixels; medians, and the rate of all.",
            rows,
        )


def make_photo(folder: Path, index: int, megapixels: float) -> Support:
    """Writes a photo as JPEG, and its mask; returns both files."""
    image, label = made_up_photo(index, megapixels)
    mask = binary_mask(label, index % CLASSES + 1) == 1
    masks = folder.with_name(f"{folder.name}_masks")
    for made in (folder, masks):
        made.mkdir(exist_ok=True)
    photo, mask_file = folder / f"{index:05d}.jpg", masks / f"{index:05d}.png"
    cv2.imwrite(str(photo), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), QUALITY)
    cv2.imwrite(str(mask_file), mask.astype(np.uint8))
    return photo, mask_file


def _first_mask(settings: Settings, folder: Path, support: Support) -> float:
    """Returns the seconds from the start of a process to its first mask."""
    query, out = min((folder / "queries").iterdir()), folder / "first"
    words = ["qpenet_jax.cli", "predict", "--support", ":".join(map(str, support))]
    words += ["--query", str(query), "--out", str(out), *side_option(settings)]
    words += [f"--workdir={settings.workdir}"] if settings.workdir else []
    start = time.time()
    run_module(words, JAX_COMPILATION_CACHE_DIR=str(folder / "compilations"))
    return (out / f"{query.stem}.png").stat().st_mtime - start


def side_option(settings: Settings) -> list[str]:
    """Returns the option for the side of images, which a run has of its own."""
    return [] if settings.workdir else [f"--config.side={settings.size}"]


def _each_photo(
    settings: Settings, folder: Path, supports: Sequence[Support]
) -> dict[int, Float[np.ndarray, "photos parts"]]:
    """Returns seconds of all photos by number of shots; these take turns at a photo."""
    segmenter = load(settings.workdir or None, side_option(settings))
    tasks = {k: tasks_of(segmenter, supports[:k]) for k in settings.shots}
    writers = {
        k: MaskWriter(folder / f"masks_{k}", ("object",), ("png",)) for k in tasks
    }
    queries = find_queries([folder / "queries"], recursive=False)
    times: dict[int, list[list[float]]] = {k: [] for k in tasks}
    for k in tasks:  # compiled before it is timed
        segment_photo(tasks[k], queries[0], writers[k])
    for query in tqdm(queries, desc="segmenting", unit="photo"):
        for k in tasks:
            times[k].append(segment_photo(tasks[k], query, writers[k]))
    return {k: np.array(rows) for k, rows in times.items()}


def tasks_of(segmenter: Segmenter, supports: Sequence[Support]) -> Tasks:
    """Returns the tasks learned from files, read as `qpenet predict` does."""
    named = [parse_support(f"object={photo}:{mask}") for photo, mask in supports]
    return segmenter.learn_classes(read_supports(named))


def segment_photo(tasks: Tasks, query: Query, writer: MaskWriter) -> list[float]:
    """Segments a photo as `qpenet predict` does; returns the seconds of the PARTS."""
    times = [time.perf_counter()]
    (frame,) = frames(query)
    times.append(time.perf_counter())
    found = tasks.find(frame.pixels)
    times.append(time.perf_counter())
    writer.add(query, frame, found)
    times.append(time.perf_counter())
    return np.diff(times).tolist()

"""What a user of `qpenet predict` waits for: the first mask, and then each photo.

Photos are made up, of 1 to 12 megapixels, with an ellipse as the object.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from qpenet_jax.benchmark.made_up import QUALITY, made_up_photo
from qpenet_jax.benchmark.processes import run_module
from qpenet_jax.benchmark.settings import Settings
from qpenet_jax.benchmark.timing import quartiles
from qpenet_jax.core.markdown import table
from qpenet_jax.masks.annotations import parse_support, read_supports
from qpenet_jax.masks.queries import Query, find_queries, frames
from qpenet_jax.masks.tasks import Tasks
from qpenet_jax.masks.writers import MaskWriter
from qpenet_jax.segmenter import Segmenter, load

MEGAPIXELS = range(1, 13)
"""Sizes of the photos, one after the other."""

STARTS = 5
"""Processes that find compilations of before."""

PARTS = ("read", "network", "save")


def prediction(settings: Settings) -> dict[str, Any]:
    """Returns seconds to the first mask, and of every photo's parts by number of shots.

    Raises:
        InputError: `settings.workdir` holds no run, or a process failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        supports = [
            _photo(folder / "supports", i, 1) for i in range(max(settings.shots))
        ]
        sizes = [MEGAPIXELS[i % len(MEGAPIXELS)] for i in range(settings.photos)]
        for i, size in enumerate(tqdm(sizes, desc="making photos", unit="photo")):
            _photo(folder / "queries", 1000 + i, size)
        return {
            "method": settings.workdir or f"Starter, {settings.size} pixels",
            "first_mask": _first_masks(settings, folder, supports[0]),
            "photos": _each_photo(settings, folder, supports),
        }


def _photo(folder: Path, index: int, megapixels: int) -> tuple[Path, Path]:
    """Writes a photo as JPEG, and its mask; return both files."""
    pixels, label = made_up_photo(index)
    scale = (megapixels * 1e6 / label.size) ** 0.5
    size = tuple(round(scale * length) for length in label.shape[::-1])
    large = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
    grain = np.random.default_rng(index).integers(-16, 17, large.shape, np.int16)
    large = (large + grain).clip(0, 255).astype(np.uint8)
    marked = np.where(label == 255, 0, np.minimum(label, 1)).astype(np.uint8)
    masks = folder.with_name(f"{folder.name}_masks")
    for made in (folder, masks):
        made.mkdir(exist_ok=True)
    photo, mask = folder / f"{index:05d}.jpg", masks / f"{index:05d}.png"
    cv2.imwrite(str(photo), large, QUALITY)
    cv2.imwrite(str(mask), cv2.resize(marked, size, interpolation=cv2.INTER_NEAREST))
    return photo, mask


# --- the first mask ---------------------------------------------------------------


def _first_masks(
    settings: Settings, folder: Path, support: tuple[Path, Path]
) -> dict[str, Any]:
    """Returns seconds from a process' start to its first mask: cold, and all others."""
    first, *others = (
        _first_mask(settings, folder, support)
        for _ in tqdm(range(1 + STARTS), desc="starting processes", unit="process")
    )
    return {"cold": first, "cached": quartiles(np.array(others))}


def _first_mask(settings: Settings, folder: Path, support: tuple[Path, Path]) -> float:
    query, out = min((folder / "queries").iterdir()), folder / "first"
    words = ["qpenet_jax.cli", "predict", "--support", ":".join(map(str, support))]
    words += ["--query", str(query), "--out", str(out), *_side(settings)]
    words += [f"--workdir={settings.workdir}"] if settings.workdir else []
    start = time.time()
    run_module(
        words,
        "qpenet predict failed: {}".format,
        JAX_COMPILATION_CACHE_DIR=str(folder / "compilations"),
    )
    return (out / f"{query.stem}.png").stat().st_mtime - start


def _side(settings: Settings) -> list[str]:
    """Returns the option of what has no run that would say how large it sees photos."""
    return [] if settings.workdir else [f"--config.side={settings.size}"]


# --- each photo -------------------------------------------------------------------


def _each_photo(
    settings: Settings, folder: Path, supports: Sequence[tuple[Path, Path]]
) -> dict[int, dict[str, list[float]]]:
    """Returns seconds of all photos by shots and part; shots take turns at a photo."""
    segmenter = load(settings.workdir or None, _side(settings))
    tasks = {k: tasks_of(segmenter, supports[:k]) for k in settings.shots}
    results = {
        k: MaskWriter(folder / f"masks_{k}", ("object",), ("png",)) for k in tasks
    }
    times = {k: {part: [] for part in PARTS} for k in tasks}
    queries = find_queries([folder / "queries"], recursive=False)
    for k in tasks:  # compiled before it is timed
        _timed(tasks[k], queries[0], results[k])
    for query in tqdm(queries, desc="segmenting", unit="photo"):
        for k in tasks:
            for part, seconds in zip(
                PARTS, _timed(tasks[k], query, results[k]), strict=True
            ):
                times[k][part].append(seconds)
    return times


def tasks_of(segmenter: Segmenter, supports: Sequence[tuple[Path, Path]]) -> Tasks:
    """Returns what is learned from photos and masks, reads as `qpenet predict` does."""
    named = [parse_support(f"object={photo}:{mask}") for photo, mask in supports]
    return segmenter.learn_classes(read_supports(named))


def _timed(tasks: Tasks, query: Query, results: MaskWriter) -> list[float]:
    """Returns the seconds of the PARTS of one photo, as `qpenet predict` does them."""
    times = [time.perf_counter()]
    (frame,) = frames(query)
    times.append(time.perf_counter())
    found = tasks.find(frame.pixels)
    times.append(time.perf_counter())
    results.add(query, frame, found)
    times.append(time.perf_counter())
    return np.diff(times).tolist()


# --- the report -------------------------------------------------------------------


def prediction_report(found: dict[str, Any]) -> str:
    """Returns what `prediction` measured as Markdown."""
    first, photos = found["first_mask"], found["photos"]
    low, middle, high = first["cached"]
    seconds = {k: np.array([parts[p] for p in PARTS]) for k, parts in photos.items()}
    fewest = min(seconds)
    rows = []
    for k, parts in seconds.items():
        each = [f"{1000 * np.median(part):,.0f} ms" for part in parts]
        ratio = np.median(parts.sum(0) / seconds[fewest].sum(0))
        rate = parts.shape[1] / parts.sum()
        rows.append([f"{k}", *each, f"{rate:.2f}", f"{ratio:.2f}"])
    header = ["shots", *PARTS, "masks/s", f"time of {fewest} shot"]
    count = next(iter(seconds.values())).shape[1]
    return (
        f"{found['method']}: from the start of a process to "
        f"its first mask {first['cold']:.1f} s without compilations from before, "
        f"{middle:.1f} s with them ({low:.1f}-{high:.1f}, {STARTS} processes).\n\n"
        f"{count} photos of {MEGAPIXELS[0]} to {MEGAPIXELS[-1]} megapixels; medians, "
        f"and the rate of all:\n\n{table(header, rows, numbers=True)}"
    )

"""Into what stages the time of loading an episode goes: ours, the plain pipeline's."""

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any
from unittest import mock

from qpenet_jax.benchmark import reference_pipeline as plain
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data import augmentation, loader
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler

Load = Callable[[EpisodeIds], Any]

Functions = Sequence[tuple[Any, str]]
"""The functions of a stage: where each is looked up, and its name there."""

EPISODES = 40
"""Episodes whose time is split into stages."""


def stages(
    dataset: SegmentationDataset, sampler: EpisodeSampler, ours: Load, opponent: Load
) -> dict[str, list[float]]:
    """Returns the milliseconds per image of every stage: ours, the plain pipeline's.

    "all" is the whole episode, stages and what lies between them.
    """
    table = _functions(dataset)
    both = [
        (load, {stage: functions[i] for stage, functions in table.items()})
        for i, load in enumerate((ours, opponent))
    ]
    taken = [
        [stage_seconds(load, sampler(index), functions) for load, functions in both]
        for index in range(EPISODES)
    ]
    images = EPISODES * (sampler.shots + 1)
    return {
        stage: [1e3 * sum(pair[i][stage] for pair in taken) / images for i in (0, 1)]
        for stage in (*table, "all")
    }


def _functions(dataset: Any) -> dict[str, tuple[Functions, Functions]]:
    """Returns the functions of every stage: ours, the plain pipeline's."""
    source = type(dataset)

    def of(module: Any, *names: str) -> Functions:
        return [(module, name) for name in names]

    cut = "_flip", "_pad", "_crop"
    return {
        "read and decode the image": (of(source, "image"), of(plain, "_image")),
        "read and decode the label": (of(source, "label"), of(plain, "_label")),
        "mask of the class": (of(loader, "binary_mask"), of(plain, "_mask")),
        "warp: scale": (of(augmentation, "_scale"), of(plain, "_scale")),
        "warp: rotate": (of(augmentation, "_rotate"), of(plain, "_rotate")),
        "blur": (of(augmentation, "_blur"), of(plain, "_blur")),
        "flip, pad, crop": (of(augmentation, *cut), of(plain, *cut)),
        "normalise": ((), of(plain, "_normalise")),
    }


def stage_seconds(
    load: Load, ids: EpisodeIds, functions: Mapping[str, Functions]
) -> dict[str, float]:
    """Loads an episode; return the seconds of every stage, and of "all".

    For the time of the loading each function is replaced by one that is timed. (A
    profiler would slow down what makes many calls, and since Python 3.12 it also sees
    the threads of Grain, which finish what they have begun.)
    """
    seconds = dict.fromkeys((*functions, "all"), 0.0)
    with contextlib.ExitStack() as replaced:
        for stage, places in functions.items():
            for place, name in places:
                timed = _timed(getattr(place, name), stage, seconds)
                replaced.enter_context(mock.patch.object(place, name, timed))
        _timed(load, "all", seconds)(ids)
    return seconds


def _timed(
    function: Callable[..., Any], stage: str, seconds: dict[str, float]
) -> Callable[..., Any]:
    """Returns the function, its time in this thread being added to that of a stage."""
    thread = threading.get_ident()

    @functools.wraps(function)
    def timed(*args: Any, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return function(*args, **options)
        start = perf_counter()
        result = function(*args, **options)
        seconds[stage] += perf_counter() - start
        return result

    return timed

"""Segment files: photos and videos in, masks in all formats out."""

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import UInt8

from qpenet_jax.masks.margins import Found
from qpenet_jax.masks.queries import Query, frames
from qpenet_jax.masks.results import Results


def segment_files(
    find: Callable[[UInt8[np.ndarray, "h w 3"]], Found],
    queries: Iterable[Query],
    results: Results,
) -> int:
    """Writes what `find` finds in every image and frame; return how many they were.

    One image at a time is in memory. Raises InputError where a file is broken or can't
    be written; what was written before stays, without a summary.
    """
    count = 0
    for query in queries:
        with contextlib.ExitStack() as stack:
            video = None
            if query.is_video:
                video = stack.enter_context(results.overlay_video(query))
            for frame in frames(query):
                found = find(frame.pixels)
                results.add(query, frame, found)
                count += 1
                if video is not None:
                    video.add(frame.pixels, found)
    results.finish()
    return count

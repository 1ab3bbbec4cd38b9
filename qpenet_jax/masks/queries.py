"""What is to be segmented: images, folders of images, the frames of videos."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import walk
from qpenet_jax.data.images import IMAGE_SUFFIXES, image_size, read_image
from qpenet_jax.masks.videos import VIDEO_SUFFIXES, read_video


class Query(NamedTuple):
    """An image or a video to segment, and what its results are called.

    `name` is a path without ending, `shown` the path that stands in files of results.
    """

    path: Path
    name: Path
    shown: Path

    @property
    def is_video(self) -> bool:
        """Whether its results are one for each frame."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


class Frame(NamedTuple):
    """An image of a query: its pixels, its name, and its number if of a video."""

    pixels: UInt8[np.ndarray, "h w 3"]
    name: Path
    number: int | None = None


def find_queries(paths: Sequence[str | Path], recursive: bool) -> list[Query]:
    """Returns all that is to be segmented, with its headers checked.

    Raises:
        InputError: a path that isn't there, a folder without images, two of one name, a
            file that is no image or no video.
    """
    found = [query for path in paths for query in _queries_at(Path(path), recursive)]
    name, times = Counter(query.name for query in found).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"two query images are called {str(name)!r}: their masks would overwrite "
            "each other; rename one"
        )
    for query in found:
        if query.is_video:
            next(read_video(query.path))
        else:
            image_size(query.path)
    return found


def frames(query: Query) -> Iterator[Frame]:
    """Yields the frames of a video one after the other, or the image.

    Raises InputError where it is broken.
    """
    if not query.is_video:
        yield Frame(read_image(query.path), query.name)
        return
    for number, pixels in enumerate(read_video(query.path)):
        yield Frame(pixels, query.name / f"{number:06d}", number)


def _queries_at(path: Path, recursive: bool) -> list[Query]:
    """Returns an image file, or those of a folder; prints what is left out."""
    if not path.exists():
        raise InputError(f"{path}: no such image or folder")
    if not path.is_dir():
        return [Query(path, Path(path.stem), Path(path.name))]
    files = list(walk(path, recursive).values())
    folders = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    skipped = Counter(file.suffix.lower() or "without ending" for file in files)
    for suffix in IMAGE_SUFFIXES:
        skipped.pop(suffix, None)
    notes = [f"{count} x {suffix}" for suffix, count in sorted(skipped.items())]
    if folders and not recursive:
        notes.append(f"{len(folders)} folder(s): give --recursive")
    if VIDEO_SUFFIXES & skipped.keys():
        notes.append("give videos by their own names")
    left_out = f"left out: {', '.join(notes)}"
    if not images:
        known, hint = (
            ", ".join(sorted(IMAGE_SUFFIXES)),
            f"; {left_out}" if notes else "",
        )
        raise InputError(f"{path} holds no image ({known}){hint}")
    if notes:
        print(f"{path}: {left_out}", file=sys.stderr)
    shown = [file.relative_to(path) for file in images]
    return list(map(Query, images, (name.with_suffix("") for name in shown), shown))

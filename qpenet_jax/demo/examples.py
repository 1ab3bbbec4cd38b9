"""Examples of the page: shapes, drawn when they are asked for; no files are shipped."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.demo.marks import Marked

CHOSEN = ("hexagon", "disc", "star")
"""Of the shapes that the first images show often enough, those that features of
EfficientNet-Lite0 find best without training; most others they find worse."""

SIDE, IMAGES = 321, 60

SUPPORTS, QUERIES = 3, 4

LEAST = 0.05
"""Share of its picture that a shape covers."""


class ExamplePhotos(NamedTuple):
    """Pictures in which a shape is marked, its masks there, and pictures to segment."""

    supports: list[Path]
    masks: list[Marked]
    queries: list[Path]


def write_example(name: str, folder: Path) -> ExamplePhotos:
    """Writes the pictures of an example, one of `CHOSEN`, into a folder.

    They are the first in which the shape is large enough, none is left out.
    """
    source = Shapes("val", IMAGES, SIDE)
    class_id = source.classes.index(name) + 1
    chosen = _showing(class_id)
    files = [_write(source, index, folder) for index in chosen]
    masks = [source.label(index) == class_id for index in chosen[:SUPPORTS]]
    return ExamplePhotos(files[:SUPPORTS], masks, files[SUPPORTS:])


@functools.cache
def _showing(class_id: int) -> Sequence[int]:
    source, least = Shapes("val", IMAGES, SIDE), LEAST * SIDE**2
    shown = (i for i in range(IMAGES) if (source.label(i) == class_id).sum() >= least)
    return tuple(itertools.islice(shown, SUPPORTS + QUERIES))


def _write(source: Shapes, index: int, folder: Path) -> Path:
    path = folder / f"{source.names[index]}.png"
    Image.fromarray(source.image(index)).save(path)
    return path

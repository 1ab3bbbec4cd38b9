"""What a user marks in a photo: `[NAME=]IMAGE:MARKS` on the command line.

MARKS is a mask's file, a JSON file of labelme or COCO, `polygon=x,y,...` or
`box=x,y,width,height`, in pixels from the photo's top left corner.
"""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from qpenet_jax.core.errors import InputError, refused_as
from qpenet_jax.core.files import local_path
from qpenet_jax.data.images import check_same_size, read_image, warn_of_turn
from qpenet_jax.data.prepare.instances import FORMAT_ERRORS, draw_segmentation
from qpenet_jax.data.supports import read_mask, support_mask
from qpenet_jax.masks.coco_json import coco_marks
from qpenet_jax.masks.labelme import labelme_marks

Mask = UInt8[np.ndarray, "h w"]
Size = tuple[int, int]

UNNAMED = "object"
"""What a single class is called if nothing names it."""

POLYGON, BOX = "polygon=", "box="


class SupportFiles(NamedTuple):
    """A photo with marks: the class that was named, or None, the photo, the marks."""

    name: str | None
    image: Path
    marks: str

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        if self.marks.startswith((POLYGON, BOX)):
            return [self.image]
        return [self.image, local_path(self.marks)]


class MarkedPhoto(NamedTuple):
    """A support as read: pixels, mask (1 the object, 255 ignored), the marks' label."""

    pixels: UInt8[np.ndarray, "h w 3"]
    mask: Mask
    label: str | None


def parse_support(text: str) -> SupportFiles:
    """Returns what `[NAME=]IMAGE:MARKS` stands for.

    Text before the first "=" is a name unless it holds one of `:/\\` or a file has the
    whole name.

    Raises:
        InputError: no colon, no name before "=", or a path that is none here.
    """
    name, rest = _name_and_rest(text)
    image, colon, marks = rest.rpartition(":")
    if not (colon and image and marks):
        raise InputError(
            f"--support {text}: give IMAGE:MASK, such as a.jpg:a.png, or "
            "NAME=IMAGE:MASK"
        )
    support = SupportFiles(name, local_path(image), marks)
    _ = support.files
    return support


def _name_and_rest(text: str) -> tuple[str | None, str]:
    head, equals, rest = text.partition("=")
    if not equals or any(sign in head for sign in ":/\\"):
        return None, text
    if Path(text.rpartition(":")[0]).exists():
        return None, text
    name = head.strip()
    if not name or not name.isprintable():
        raise InputError(f"--support {text}: give a name before =, or leave = out")
    return name, rest


def read_supports(
    supports: Sequence[SupportFiles],
) -> dict[str, tuple[list[np.ndarray], list[Mask]]]:
    """Returns images and masks by class, the classes in the order given.

    Without names all are of one class, called after the label of their marks if they
    have one.

    Raises:
        InputError: names for some only, marks of several labels without names, and
            whatever a file has wrong.
    """
    named = [support.name for support in supports if support.name is not None]
    if named and len(named) < len(supports):
        raise InputError(
            f"some supports have a name ({named[0]}) and some have none: give every "
            "--support a name, as in NAME=IMAGE:MASK, or none"
        )
    read = [read_support(support) for support in supports]
    if not named:
        labels = sorted({marked.label for marked in read if marked.label is not None})
        if len(labels) > 1:
            raise InputError(
                f"the marks have the labels {', '.join(labels)}: name the class of "
                "each support, --support NAME=IMAGE:MARKS"
            )
        named = [*labels, UNNAMED][:1] * len(supports)
    classes: dict[str, tuple[list, list]] = {name: ([], []) for name in named}
    for name, marked in zip(named, read, strict=True):
        classes[name][0].append(marked.pixels)
        classes[name][1].append(marked.mask)
    return classes


def read_support(support: SupportFiles) -> MarkedPhoto:
    """Returns a support's pixels and what is marked in them.

    Raises:
        InputError: the photo or the marks are broken, don't fit, or mark nothing.
    """
    pixels = read_image(support.image)
    size, marks, label = pixels.shape[:2], support.marks, None
    source = f"{support.image}:{marks}"
    if marks.startswith((POLYGON, BOX)):
        warn_of_turn(support.image)
        draw = _polygon if marks.startswith(POLYGON) else _box
        mask = draw(source, _numbers(source, marks.partition("=")[2]), size)
    elif marks.lower().endswith(".json"):
        source = marks
        mask, label = _read_json(local_path(marks), support, size)
    else:
        mask = read_mask(local_path(marks))
        check_same_size(mask.shape, size, local_path(marks))
        warn_of_turn(support.image, local_path(marks))
        return MarkedPhoto(pixels, mask, None)
    return MarkedPhoto(pixels, support_mask(mask.astype(np.uint8), source), label)


def _numbers(source: str, text: str) -> list[float]:
    with contextlib.suppress(ValueError):
        numbers = [float(part) for part in text.split(",")]
        if all(map(math.isfinite, numbers)):
            return numbers
    raise InputError(f"{source}: give numbers of pixels, separated by commas")


def _polygon(source: str, numbers: list[float], size: Size) -> Bool[np.ndarray, "h w"]:
    try:
        return draw_segmentation([numbers], *size)
    except ValueError as error:
        raise InputError(f"{source}: {error}; the photo is {_wide(size)}") from None


def _box(source: str, numbers: list[float], size: Size) -> Bool[np.ndarray, "h w"]:
    """Returns which pixels have their centre in a box."""
    left, top, width, height = numbers if len(numbers) == 4 else [-1.0] * 4
    if min(left, top) < 0 or left + width > size[1] or top + height > size[0]:
        raise InputError(
            f"{source}: a box is {BOX}x,y,width,height, not two corners, and lies in "
            f"the photo, which is {_wide(size)}"
        )
    x, y = np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5
    rows = (top <= y) & (y < top + height)
    columns = (left <= x) & (x < left + width)
    return np.outer(rows, columns)


def _wide(size: Size) -> str:
    return f"{size[1]} pixels wide and {size[0]} high"


def _read_json(
    path: Path, support: SupportFiles, size: Size
) -> tuple[Bool[np.ndarray, "h w"], str]:
    """Returns what a file of labelme or COCO marks in a photo, and its label there."""
    fault = f"{path} isn't a JSON file of labelme or COCO"
    with refused_as(fault, "fetch it again", FORMAT_ERRORS):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if "shapes" in content:
            marks = labelme_marks(path, content, size)
        else:
            marks = coco_marks(path, content, support.image, size)
        label = _choice(path, {label for label, _ in marks}, support.name)
        if "shapes" not in content:
            warn_of_turn(support.image)  # labelme turns photos as we do; others may not
        drawn = [draw() for name, draw in marks if name == label]
    return np.any(drawn, axis=0), label


def _choice(path: Path, labels: set[str], name: str | None) -> str:
    """Returns the label that was named, or the only one."""
    known = ", ".join(sorted(labels))
    if not labels:
        raise InputError(f"{path} marks nothing in this photo")
    if name is None and len(labels) > 1:
        raise InputError(
            f"{path} has the labels {known}: choose one, as in --support "
            f"NAME=IMAGE:{path.name}"
        )
    if name is not None and name not in labels:
        raise InputError(f"{path} has no label {name!r} in this photo, but {known}")
    return name or known

"""Lists of class names: a convention of other tools is taken whole, or refused whole.

Line i names value i. What other tools add to that, a line for the background or for
what is ignored, numbers or colours, would shift or spoil the names, taken in part.
"""

import re
from collections import Counter
from pathlib import Path

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE

LABELME = ("__ignore__", "_background_")
"""How labelme's own lists begin, those of its exports with the second line alone. Its
masks hold 255 and 0 there, and the classes from 1 on."""

NO_CLASS = {"background", "bg", "ignore", "ignored", "void", "unlabeled", "unlabelled"}
"""What lists of other tools call the values of no class: their small letters."""

NUMBERED = re.compile(r"(\d{1,9})[\s:;,=.)]+[^\s\d].*")
MARKUP = re.compile(r"[\[{#].*|\W*names\W*:.*|.*\t.*|.*:\d+,\d+,\d+:.*")
"""Lines of JSON, YAML and tables, comments, and colours as in CVAT's labelmap.txt."""


def read_classes(path: Path) -> tuple[str, ...]:
    """Returns the names of the classes 1..C, one a line.

    A list of labelme's (`__ignore__` and `_background_`, or the second alone, before
    the classes) is known: its masks number the classes from 1 on as well.

    Raises:
        InputError: no such file, an empty line, a name twice, more than fit; a list
            that holds more than names of classes.
    """
    lines = read_lines(path)
    if "" in lines:
        raise InputError(
            f"{path}: line {lines.index('') + 1} is empty; line i names value i"
        )
    for first in (LABELME, LABELME[1:]):
        if lines[: len(first)] == first and len(lines) > len(first):
            lines = lines[len(first) :]
            break
    _refuse_other_formats(path, lines)
    if len(lines) >= IGNORE:
        raise InputError(f"{path}: {len(lines)} classes; at most {IGNORE - 1} fit")
    return lines


def _refuse_other_formats(path: Path, lines: tuple[str, ...]) -> None:
    none = [x for x in lines if re.sub(r"[\W\d_]", "", x).lower() in NO_CLASS]
    if none:
        raise InputError(
            f"{path}: {', '.join(map(repr, none[:3]))} names no class; line 1 names "
            f"value 1 of the masks (0 is the background, {IGNORE} what is ignored): "
            "take out what is no class, and number the masks so"
        )
    marked = next(filter(MARKUP.fullmatch, lines), None)
    if marked or _are_numbered(lines) or _are_numbered(lines[1:]):
        raise InputError(
            f"{path}: {marked or lines[-1]!r} is more than a name; write the names "
            "alone, that of value 1 in line 1"
        )


def _are_numbered(lines: tuple[str, ...]) -> bool:
    """Tells whether all lines begin with numbers that count up."""
    numbers = [int(m[1]) for m in map(NUMBERED.fullmatch, lines) if m]
    if not numbers or len(lines) < 2:
        return False
    return numbers == [*range(numbers[0], numbers[0] + len(lines))]


def read_lines(path: Path) -> tuple[str, ...]:
    """Returns the stripped lines up to the last that isn't empty, all different.

    Raises:
        InputError: no such text file, nothing in it, or a line twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: no such text file; write one name a line") from None
    lines = tuple(line.strip() for line in text.rstrip().splitlines())
    if not lines:
        raise InputError(f"{path} is empty; write one name a line")
    line, times = Counter(filter(None, lines)).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path}: {line} is listed {times} times; keep one")
    return lines

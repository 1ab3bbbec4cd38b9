"""Anyone's images and masks: `qpenet prepare folder`.

```
ROOT/images/a.jpg   sub/b.png       any common format, subfolders allowed
ROOT/masks/a.png    sub/b.png       palette or 8-bit grey, values are class ids
ROOT/classes.txt                    one class a line; line i is value i
ROOT/train.txt      val.txt         optional: names such as sub/b, one a line
```
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE
from qpenet_jax.data.images import IMAGE_SUFFIXES, read_label
from qpenet_jax.data.prepare.archives import Member, open_archive, unique
from qpenet_jax.data.prepare.builder import Source, prepare
from qpenet_jax.data.sources.voc import read_lines

VAL_SHARE = 0.2
"""About the share of the images for validation, where no list says which."""

HASH_RANGE = 2**64
"""The split looks at 8 bytes of a name's SHA-256: the same on every machine."""

Splits = dict[str, Sequence[str]]
"""The names of each split."""


def prepare_folder(root: Path, out: Path, *, name: str | None = None) -> Path:
    """Writes the folder `root` as a data set below `out` and returns where it is.

    It is called `name`, else after the folder. Without `train.txt` and `val.txt`,
    a fifth of the images is for validation, by a hash of their names: the others stay
    where they are when images are added. With one of the two lists, the images that
    aren't on it make the other split, if there are any; with both, they are left out.

    Raises:
        InputError: a missing part, an image or a mask without the other, two images of
            one name, a bad list or class file, a mask value that is no class.
    """
    root = Path(root)
    classes = read_classes(root / "classes.txt")
    images = _files(root / "images", IMAGE_SUFFIXES)
    masks = _files(root / "masks", {".png"})
    if alone := sorted(images.keys() ^ masks.keys()):
        file = images.get(alone[0]) or masks[alone[0]]
        other = f"mask {root}/masks/{alone[0]}.png" if alone[0] in images else "image"
        raise InputError(f"{file} has no {other}; add it, or remove the file")
    if not images:
        raise InputError(f"{root / 'images'} holds no image; put some there")
    splits, rule = _split(root, sorted(images))

    def label(name: str) -> tuple[UInt8[np.ndarray, "h w"], str]:
        mask = str(masks[name])
        return read_label(mask), mask

    source = Source(
        name="folder",
        config=_identifier(name or root.resolve().name),
        classes=classes,
        splits=splits,
        images=images,
        label=label,
        facts={
            "classes": list(classes),
            "rules": rule,
            "images": {split: len(names) for split, names in splits.items()},
        },
    )
    return prepare(source, Path(out))


def _files(folder: Path, suffixes: set[str]) -> dict[str, Member]:
    """Returns the files below `folder` by relative path without ending."""
    if not folder.is_dir():
        raise InputError(f"folder {folder} doesn't exist; see data/README.md")
    with open_archive(folder) as found:  # what it gives can be read afterwards, too
        chosen = [name for name in found if Path(name).suffix.lower() in suffixes]
    if others := sorted(found.keys() - set(chosen)):
        known = " ".join(sorted(suffixes))
        print(
            f"{folder}: {len(others)} file(s) without the ending {known} are left out, "
            f"such as {others[0]}",
            file=sys.stderr,
        )
    return unique(
        (PurePosixPath(name).with_suffix("").as_posix(), found[name]) for name in chosen
    )


def _split(root: Path, names: Sequence[str]) -> tuple[Splits, str]:
    """Returns the names of each split, and the rule that divides them."""
    lists = {split: root / f"{split}.txt" for split in ("train", "val")}
    splits: Splits = {
        split: _listed(path, names) for split, path in lists.items() if path.exists()
    }
    if not splits:
        return _split_by_hash(names), f"a hash of the name gives {VAL_SHARE:g} to val"
    if len(splits) == 2:
        return splits, "train.txt and val.txt list the splits"
    [(split, ids)] = splits.items()
    [other] = lists.keys() - splits
    listed = set(ids)
    if rest := [name for name in names if name not in listed]:
        splits[other] = rest
    return splits, f"{split}.txt lists {split}, {other} the rest"


def _listed(path: Path, names: Sequence[str]) -> list[str]:
    ids = [line for line in read_lines(path) if line]
    if unknown := set(ids).difference(names):
        raise InputError(
            f"{path}: there is no image {min(unknown)!r}; write paths below images/ "
            "without file ending"
        )
    return ids


def _split_by_hash(names: Sequence[str]) -> Splits:
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for name in names:
        start = hashlib.sha256(name.encode()).digest()[:8]
        share = int.from_bytes(start, "big") / HASH_RANGE
        splits["val" if share < VAL_SHARE else "train"].append(name)
    return {**splits}


def _identifier(name: str) -> str:
    cleaned = re.sub(r"\W+", "_", name)
    return cleaned if cleaned.isidentifier() else f"_{cleaned}"


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
    for line in lines:
        if re.sub(r"[\W\d_]", "", line).lower() in NO_CLASS:
            raise InputError(
                f"{path}: {line!r} names no class; line 1 names value 1 of the masks "
                f"(0 is the background, {IGNORE} what is ignored): take out what is no "
                "class, and number the masks so"
            )
    marked = next(filter(MARKUP.fullmatch, lines), None)
    if marked or _are_numbered(lines) or _are_numbered(lines[1:]):
        raise InputError(
            f"{path}: {marked or lines[-1]!r} is more than a name; write the names "
            "alone, that of value 1 in line 1"
        )
    if len(lines) >= IGNORE:
        raise InputError(f"{path}: {len(lines)} classes; at most {IGNORE - 1} fit")
    return lines


def _are_numbered(lines: Sequence[str]) -> bool:
    """Returns whether all lines begin with numbers that count up."""
    numbers = [int(m[1]) for m in map(NUMBERED.fullmatch, lines) if m]
    if not numbers or len(lines) < 2:
        return False
    return numbers == [*range(numbers[0], numbers[0] + len(lines))]

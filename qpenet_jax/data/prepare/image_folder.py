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
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import walk
from qpenet_jax.core.types import IGNORE
from qpenet_jax.data.images import IMAGE_SUFFIXES, read_label
from qpenet_jax.data.prepare.archives import unique
from qpenet_jax.data.prepare.builder import LabelledImage, Source, prepare
from qpenet_jax.data.sources.voc import read_lines

HASH_RANGE = 2**64
"""The split looks at 8 bytes of a name's SHA-256: the same on every machine."""

Splits = dict[str, Sequence[str]]
"""The names of each split."""


def prepare_folder(
    root: Path, out: Path, *, name: str | None = None, val_share: float = 0.2
) -> Path:
    """Writes the folder `root` as a data set below `out` and returns where it is.

    It is called `name`, else after the folder. Without `train.txt` and `val.txt`,
    about `val_share` of the images are for validation, by a hash of their names: the
    others stay where they are when images are added. With one of the two lists, the
    images that aren't on it make the other split; with both, they are left out. A
    split without any image is left out as well.

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
    splits, rule = _split(root, sorted(images), val_share)
    splits = {split: names for split, names in splits.items() if names}

    def example(name: str) -> LabelledImage:
        image, mask = images[name], masks[name]
        data, label = image.read_bytes(), read_label(mask)
        return LabelledImage(data, label, str(image), str(mask))

    source = Source(
        name="folder",
        config=_identifier(name or root.resolve().name),
        classes=classes,
        splits=splits,
        example=example,
        image_bytes=sum(path.stat().st_size for path in images.values()),
        facts={
            "classes": list(classes),
            "rules": rule,
            "images": {split: len(names) for split, names in splits.items()},
        },
    )
    return prepare(source, Path(out))


def _files(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    """Returns the files below `folder` by relative path without ending."""
    if not folder.is_dir():
        raise InputError(f"folder {folder} doesn't exist; see data/README.md")
    found = walk(folder)
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


def _split(root: Path, names: Sequence[str], val_share: float) -> tuple[Splits, str]:
    """Returns the names of each split, and the rule that divides them."""
    lists = {split: root / f"{split}.txt" for split in ("train", "val")}
    given = {
        split: _listed(path, names) for split, path in lists.items() if path.exists()
    }
    if not given:
        return _split_by_hash(root, names, val_share)
    if len(given) == 2:
        return {**given}, "train.txt and val.txt list the splits"
    [(split, ids)] = given.items()
    [other] = lists.keys() - given
    listed = set(ids)
    rest = [name for name in names if name not in listed]
    return {**given, other: rest}, f"{split}.txt lists {split}, {other} the rest"


def _listed(path: Path, names: Sequence[str]) -> list[str]:
    ids = [line for line in read_lines(path) if line]
    if unknown := set(ids).difference(names):
        raise InputError(
            f"{path}: there is no image {min(unknown)!r}; write paths below images/ "
            "without file ending"
        )
    return ids


def _split_by_hash(
    root: Path, names: Iterable[str], val_share: float
) -> tuple[Splits, str]:
    if not 0 <= val_share <= 1:
        raise InputError(f"val_share {val_share}: choose a share from 0 to 1")
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for name in names:
        start = hashlib.sha256(name.encode()).digest()[:8]
        share = int.from_bytes(start, "big") / HASH_RANGE
        splits["val" if share < val_share else "train"].append(name)
    for split, chosen in splits.items():
        if not chosen and 0 < val_share < 1:
            raise InputError(
                f"{root}: no image fell to {split} by its name; list some in "
                f"{split}.txt, or choose another val_share than {val_share}"
            )
    return {**splits}, f"a hash of the name gives {val_share:g} of the images to val"


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

"""Images, label PNGs and an id list, laid out as PASCAL VOC: PASCAL and COCO alike."""

import functools
import hashlib
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from tqdm.contrib.concurrent import thread_map

from qpenet_jax.core.download import sha256
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import (
    check_label,
    image_size,
    read_image,
    read_label,
    warn_of_turn,
)
from qpenet_jax.data.versions import DIGITS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
THREADS = 2
"""What reads the files of all images."""


class VOCLayout:
    """A `SegmentationDataset` of `images/ID.jpg`, `masks/ID.png` and a list of ids.

    Masks are palette or grey PNGs of class ids: 0 background, 1..C, 255 ignore.
    """

    def __init__(
        self,
        root: str | Path,
        ids_file: str | Path,
        classes: Sequence[str],
        images: str = "JPEGImages",
        masks: str = "SegmentationClassAug",
    ):
        """Lists the files below `root`; nothing is decoded yet.

        Raises:
            InputError: a missing folder or list, an empty or malformed list, a
                repeated id, an id without image or mask.
        """
        folder = Path(root)
        if not folder.is_dir():
            raise InputError(f"data folder {root} doesn't exist; see data/README.md")
        self.classes = tuple(classes)
        self.names = read_ids(Path(ids_file))
        self._images = _find("image", folder / images, self.names, IMAGE_SUFFIXES)
        self._masks = _find("mask", folder / masks, self.names, (".png",))

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.names)

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Returns image `index`, RGB.

        Raises:
            InputError: the file is truncated or no image.
        """
        return read_image(self._images[index])

    def label(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Returns the label map of image `index`; what it holds, `counts` has checked.

        Raises:
            InputError: the file is broken or no label map.
        """
        return read_label(self._masks[index])

    @functools.cached_property
    def counts(self) -> Int[np.ndarray, "images classes"]:
        """Pixels of each class in each label, read once from all masks.

        Raises:
            InputError: a broken file, a value that is no class id, 255 alone, or a size
                that differs from the image's; for the first such file.
        """

        def counted(index: int) -> Int[np.ndarray, " classes"]:
            image, mask = self._images[index], self._masks[index]
            warn_of_turn(image, mask)
            size = image_size(image)
            return check_label(read_label(mask), size, len(self.classes), mask)

        counts = np.stack(self._of_all("reading masks", counted))
        if not counts.any():
            raise InputError(
                f"{Path(self._masks[0]).parent}: no listed mask shows a class; "
                "data/README.md says what the values of a mask mean"
            )
        return counts

    @property
    def photos(self) -> tuple[str, ...]:
        """A hash of every image's file."""
        return tuple(image[:DIGITS] for image, _ in self._hashes)

    @functools.cached_property
    def content(self) -> str:
        """A hash of all names, images and masks."""
        pairs = zip(self.names, self._hashes, strict=True)
        rows = (f"{name} {image} {mask}\n" for name, (image, mask) in pairs)
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    @functools.cached_property
    def _hashes(self) -> list[tuple[str, str]]:
        """Returns the SHA-256 of every image's file and of its mask's, read once."""
        files = [*zip(self._images, self._masks, strict=True)]
        return self._of_all(
            "hashing images", lambda i: tuple(sha256(Path(path)) for path in files[i])
        )

    def _of_all(self, what: str, of_one: Callable[[int], Any]) -> list[Any]:
        """Returns what is found of every image; a terminal shows a progress bar."""
        bar = {"desc": what, "disable": None, "leave": False}
        return thread_map(of_one, range(len(self)), max_workers=THREADS, **bar)


def read_ids(path: Path) -> tuple[str, ...]:
    """Reads a list of image ids, one a line.

    Raises:
        InputError: an unreadable, empty or malformed list, a repeated id.
    """
    ids = tuple(filter(None, read_lines(path)))
    for name in ids:
        whole = name == posixpath.normpath(name) and not name.startswith(("/", ".."))
        if len(name.split()) > 1 or not whole:
            raise InputError(
                f"{path}: '{name}' isn't an image id; write one id per line, below the "
                "folder of images, without file endings, '.', '..' and double slashes"
            )
    return ids


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


def _find(
    kind: str, folder: Path, names: Sequence[str], suffixes: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns the file of every id, with the first ending that exists."""
    if not folder.is_dir():
        raise InputError(f"{kind} folder {folder} doesn't exist; see data/README.md")
    found = {
        name: file
        for name in names
        for suffix in reversed(suffixes)
        if (file := folder / f"{name}{suffix}").is_file()
    }
    refuse_missing(kind, names, found, f"{folder} as {' or '.join(suffixes)}")
    return tuple(str(found[name]) for name in names)


def refuse_missing(
    kind: str, names: Collection[str], found: Container[str], where: str | Path
) -> None:
    """Refuses a list of images of which some have no file.

    Raises:
        InputError: naming the first of them, and how many they are.
    """
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(
            f"no {kind} of {missing[0]} in {where} ({len(missing)} of {len(names)} are "
            "missing); add the files, or take them off the list"
        )

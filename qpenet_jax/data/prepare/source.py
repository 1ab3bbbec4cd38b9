"""What a data set is made of, and what of it is refused before it is written."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import check_label, read_image, warn_of_turn
from qpenet_jax.data.labels import check_numbered


class Example(NamedTuple):
    """One image as it came, and its label map: 0 background, 1..C, 255 ignore.

    Messages name the image by `image_from` and the label by `label_from`, say
    "archive: member", or by `name`.
    """

    name: str
    image: bytes
    label: UInt8[np.ndarray, "h w"]
    image_from: str = ""
    label_from: str = ""


@dataclass(frozen=True)
class Source:
    """What a data set is made of: `splits[split]` are names, `example` loads one.

    `facts` says how it came about (archives with their SHA-256, rules that were
    chosen); preparing again with other facts is refused rather than ignored.
    """

    classes: tuple[str, ...]
    splits: dict[str, Sequence[str]]
    example: Callable[[str, str], Example]  # (split, name) -> Example
    image_bytes: int
    """About how many bytes all images take, for the check of the disk."""
    facts: dict[str, Any] = field(default_factory=dict)


def check_example(example: Example, classes: int) -> Int[np.ndarray, " classes"]:
    """Decodes the image once and returns the pixels of each class in its label.

    Raises:
        InputError: the image is broken, has another size than the label, or the label
            holds a value that is no class, or 255 alone.
    """
    image_from = example.image_from or example.name
    height, width = read_image(BytesIO(example.image), name=image_from).shape[:2]
    warn_of_turn(BytesIO(example.image), name=image_from)
    label_from = example.label_from or example.name
    check_numbered(example.label, label_from)
    return check_label(example.label, (height, width), classes, label_from)


def check_names(source: Source) -> None:
    """Refuses names that can't stand in one data set.

    Raises:
        InputError: a split without images; a name twice, in one split or in two; one
            that isn't Unicode.
    """
    split_of: dict[str, str] = {}
    for split, names in source.splits.items():
        if not names:
            raise InputError(f"split {split!r} has no image; check the lists of images")
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise InputError(
                f"split {split!r} lists image {name} {times} times; keep one"
            )
        for name in names:
            if name in split_of:
                raise InputError(
                    f"image {name} is in {split_of[name]} and in {split}: what is "
                    "trained on can't be scored; take it out of one of them"
                )
            if name != name.encode(errors="ignore").decode():
                raise InputError(f"image {name!r}: rename it, its name isn't Unicode")
        split_of |= dict.fromkeys(names, split)

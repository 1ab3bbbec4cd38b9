"""One annotation file of COCO's: read, checked, drawn.

Nothing of the file reaches pycocotools' C code unchecked: numbers that aren't finite or
lie far outside of the image would crash it. Of two with one id, one would be lost.
"""

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from pycocotools import mask as pycoco

from qpenet_jax.core.errors import InputError, refused_as
from qpenet_jax.data.folds import COCO_CLASSES

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that Pillow opens."""

NUMBER = "[P-o]{0,6}[0-O]"
"""A number of up to 7 groups of bits: only the last character has bit 5 not set."""

FORMAT_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a file of another format raises."""


class Instances:
    """One annotation file: which images show something, and their label maps.

    `files` are the file names of the images with more than crowds, by their names.
    """

    def __init__(self, path: Path):
        """Reads and checks the file; nothing is drawn yet.

        Raises:
            InputError: no such file, broken JSON, missing keys, an id or a name twice,
                other categories than COCO's 80, an annotation of an unknown image or
                category.
        """
        self.path = path
        fault = f"{path} isn't an instances file of COCO"
        with refused_as(fault, "fetch it again", FORMAT_ERRORS):
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            images = by_id(path, "images", content["images"])
            annotations = by_id(path, "annotations", content["annotations"])
            self._ranks = _ranks(path, content["categories"])
            self._of_image = self._grouped(images, annotations.values())
            shown = [images[number] for number in images if number in self._of_image]
            self._images = {PurePosixPath(i["file_name"]).stem: i for i in shown}
            self._sizes = {name: size_of(path, i) for name, i in self._images.items()}
        images = self._images.items()
        self.files = {name: i["file_name"].rpartition("/")[2] for name, i in images}
        if not shown:
            raise InputError(f"{path}: no image has an annotation but crowds")
        if len(self._images) < len(shown):
            raise InputError(f"{path}: two images have one name; rename one")

    def label(self, name: str) -> UInt8[np.ndarray, "h w"]:
        """Draws the label map of an image: 0 background, 1..80.

        Raises:
            InputError: an annotation that can't be drawn.
        """
        size = self._sizes[name]
        # pycocotools' masks are in column order as well; assigning is then faster.
        label = np.zeros(size, np.uint8, order="F")
        for annotation in self._of_image[self._images[name]["id"]]:
            mask = annotation_mask(self.path, annotation, name, size)
            label[mask] = self._ranks[annotation["category_id"]]
        return np.ascontiguousarray(label)

    def _grouped(self, images: dict, annotations: Iterable) -> dict[Any, list[dict]]:
        """Returns the annotations of each image that are no crowds, in their order."""
        of_image = defaultdict(list)
        choices = {"image_id": images, "category_id": self._ranks, "iscrowd": (0, 1)}
        for annotation in annotations:
            for key, known in choices.items():
                if annotation[key] not in known:
                    raise InputError(
                        f"{self.path}: annotation {annotation['id']} has the {key} "
                        f"{annotation[key]!r}, which stands for nothing; correct it"
                    )
            if not annotation["iscrowd"]:  # A crowd's pixels become background.
                of_image[annotation["image_id"]].append(annotation)
        return of_image


def by_id(path: Path, key: str, items: Sequence[dict[str, Any]]) -> dict[Any, dict]:
    """Returns the items by their ids, sure that each id is there once.

    Raises:
        InputError: an id twice. ValueError, LookupError, TypeError: no such items.
    """
    found: dict[Any, dict] = {}
    for item in items:
        if type(item["id"]) not in (int, str):
            raise ValueError(f"{key}: id {item['id']!r} is no whole number")
        if item["id"] in found:
            raise InputError(
                f"{path}: two {key} have the id {item['id']}; give each its own"
            )
        found[item["id"]] = item
    return found


def _ranks(path: Path, categories: Sequence[dict[str, Any]]) -> dict[Any, int]:
    """Returns the rank 1..80 of every category id; COCO's own ids run to 90."""
    named = by_id(path, "categories", categories)
    ids = sorted(named)
    if tuple(named[i]["name"] for i in ids) != COCO_CLASSES:
        raise InputError(
            f"{path}: its categories aren't COCO's 80 in their order; label maps of "
            "other classes can be prepared as a folder"
        )
    return {category: rank for rank, category in enumerate(ids, 1)}


def size_of(path: Path, image: dict[str, Any]) -> tuple[int, int]:
    """Returns height and width of an image; too large ones would use up the memory.

    Raises:
        InputError: no sizes of an image. LookupError: not in the file.
    """
    size = image["height"], image["width"]
    whole = all(type(side) is int and side >= 1 for side in size)
    if not whole or math.prod(size) > MAX_PIXELS:
        raise InputError(
            f"{path}: image {image['file_name']} has height {size[0]!r} and width "
            f"{size[1]!r}; correct them"
        )
    return size


def annotation_mask(
    path: Path, annotation: dict[str, Any], name: str, size: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """Returns the mask of an annotation of image `name`, by `draw_segmentation`.

    Raises:
        InputError: it can't be drawn.
    """
    fault = f"{path}: annotation {annotation['id']} of {name} can't be drawn"
    with refused_as(fault, "correct it or take it out", FORMAT_ERRORS):
        return draw_segmentation(annotation["segmentation"], *size)


def draw_segmentation(
    segmentation: Any, height: int, width: int
) -> Bool[np.ndarray, "h w"]:
    """Returns the mask of a segmentation as pycocotools draws it, checked before.

    A segmentation is a list of polygons [x0, y0, x1, y1, ...] in pixels, all of which
    are drawn, or a dict of run lengths.

    Raises:
        ValueError, TypeError, KeyError: not such numbers, or of another image.
    """
    if isinstance(segmentation, dict):
        return _draw_runs(segmentation, height, width)
    polygons: Any = _checked_polygons(segmentation, max(height, width))
    with warnings.catch_warnings():
        # Of pycocotools' own arrays under NumPy 2; the user can do nothing about it.
        warnings.simplefilter("ignore", DeprecationWarning)
        encoded = pycoco.merge(pycoco.frPyObjects(polygons, height, width))
        return pycoco.decode(encoded).view(bool)


def _checked_polygons(polygons: Any, side: int) -> list[list[float]]:
    """Returns the polygons of three points or more; `side` is the image's longer one.

    Others enclose nothing; pycocotools takes four numbers for a box if they come first.
    """
    if not isinstance(polygons, list) or not polygons:
        raise ValueError("neither polygons nor run lengths")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2:
            raise ValueError("a polygon is a list of points, each x and y")
        for value in polygon:
            # Tools let outlines end somewhat outside of an image.
            if type(value) not in (int, float) or not -side <= value <= 2 * side:
                raise ValueError(f"{value!r} is no coordinate in this image")
    enclosing = [polygon for polygon in polygons if len(polygon) >= 6]
    if not enclosing:
        raise ValueError("a polygon needs three points or more")
    return enclosing


def _draw_runs(
    encoded: dict[str, Any], height: int, width: int
) -> Bool[np.ndarray, "h w"]:
    """Returns the mask of run lengths of 0, 1, 0, ... down the columns."""
    if list(encoded["size"]) != [height, width]:
        raise ValueError(f"size {encoded['size']!r} isn't the image's")
    counts = encoded["counts"]
    runs = _decoded(counts) if isinstance(counts, str) else counts
    if any(type(run) is not int or run < 0 for run in runs):
        raise ValueError("a run length is no whole number from 0 on")
    if sum(runs) != height * width:
        raise ValueError(f"the runs cover {sum(runs)} of {height * width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 > 0, runs).reshape(width, height).T


def _decoded(text: str) -> list[int]:
    """Returns the run lengths of a compressed string.

    COCO writes numbers as groups of 5 bits, the lowest first, in characters from "0"
    on; bit 5 is set if another follows, bit 4 of the last if the number is negative.
    From the fourth number on they are differences to the number before the last.

    Source: pycocotools, maskApi.c, rleFrString.
    """
    if not re.fullmatch(f"({NUMBER})*", text):
        raise ValueError("broken run lengths")
    runs: list[int] = []
    for number in re.findall(NUMBER, text):
        bits = [ord(sign) - ord("0") for sign in number]
        value = sum((group & 31) << 5 * i for i, group in enumerate(bits))
        if bits[-1] & 16:
            value -= 1 << 5 * len(bits)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs

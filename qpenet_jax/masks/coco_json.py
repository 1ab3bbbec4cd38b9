"""The JSON of COCO: annotations read as marks, masks written in both its forms."""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped
from pycocotools import mask as pycoco

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import check_same_size
from qpenet_jax.data.prepare.instances import annotation_mask, by_id, size_of
from qpenet_jax.masks.polygons import outlines
from qpenet_jax.masks.tasks import Segmentation


def coco_marks(
    path: Path, content: dict[str, Any], photo: Path, size: tuple[int, int]
) -> list[tuple[str, Callable[[], Bool[np.ndarray, "h w"]]]]:
    """Returns for each annotation of a photo its category and a call that draws it.

    The photo is found by its file name, if two have it by its folders as well; crowds
    are left out. The call raises as `annotation_mask`.

    Raises:
        InputError: no or two images of that name, or another size than the photo's
            `size`. ValueError, LookupError, TypeError: no content of such a file.
    """
    images = by_id(path, "images", content["images"])
    names = by_id(path, "categories", content["categories"])
    found = _called(photo, images.values())
    if len(found) != 1:
        count = "no image" if not found else f"{len(found)} images"
        raise InputError(f"{path} has {count} called {photo.name}; it must have one")
    check_same_size(size_of(path, found[0]), size, f"{path}, {photo.name}")
    return [
        (
            str(names[one["category_id"]]["name"]),
            functools.partial(annotation_mask, path, one, photo.name, size),
        )
        for one in by_id(path, "annotations", content["annotations"]).values()
        if one["image_id"] == found[0]["id"] and not one.get("iscrowd")
    ]


def _called(photo: Path, images: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the images of a photo's file name; of several, those in its folders."""
    parts = (*photo.parent.resolve().parts, photo.name)
    named = [
        (image, PurePosixPath(image["file_name"].replace("\\", "/")).parts)
        for image in images
    ]
    alike = [(image, path) for image, path in named if path[-1:] == parts[-1:]]
    within = [image for image, path in alike if path == parts[-len(path) :]]
    return within if len(within) == 1 else [image for image, _ in alike]


class CocoFile:
    """What is found in many photos, as the content of one file in COCO's format.

    A class that is found in a photo makes one annotation there, with its score: its
    run lengths, or with `polygons` the outlines of its parts.
    """

    def __init__(self, classes: Sequence[str], *, polygons: bool = False):
        self.polygons = polygons
        self.content: dict[str, Any] = {
            "info": {"description": "masks found by qpenet predict"},
            "licenses": [],
            "images": [],
            "categories": [
                {"id": i, "name": name, "supercategory": ""}
                for i, name in enumerate(classes, 1)
            ],
            "annotations": [],
        }

    def add(self, file_name: str, found: Segmentation) -> None:
        """Adds a photo and its masks."""
        images, annotations = self.content["images"], self.content["annotations"]
        height, width = found.index.shape
        image_id = len(images) + 1
        images.append(
            {"id": image_id, "file_name": file_name, "height": height, "width": width}
        )
        for number, score in enumerate(found.scores, 1):
            if score is None:
                continue
            mask = found.index == number
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": number,
                **_encoded(mask),
                "iscrowd": 0,
                "score": score,
            }
            if self.polygons:
                annotation["segmentation"] = polygons(mask)
            annotations.append(annotation)


FINER = 3
"""A pixel becomes so many squared. Corners of outlines are then in the outer ones, and
never in the middle one, so that they round to the border of the pixel. The same holds
for both sides of a cut through a hole, as its middle is at 3 n or 3 n + 1."""


def polygons(mask: Bool[np.ndarray, "h w"]) -> list[list[int]]:
    """Returns x, y, x, y, ... of each part's outline, along the borders of its pixels.

    COCO's coordinates are those of pixels' borders, labelme's those of their centres.
    Holes and corners are as in `outlines`.
    """
    finer = mask.repeat(FINER, 0).repeat(FINER, 1)
    found = []
    for points in outlines(finer):
        corners = np.rint(points / FINER).astype(int)
        moved = (corners != np.roll(corners, 1, axis=0)).any(1)
        found.append(corners[moved].ravel().tolist())
    return found


def _encoded(mask: Shaped[np.ndarray, "h w"]) -> dict[str, Any]:
    """Returns a mask as run lengths in COCO's compressed form, its area and its box."""
    with warnings.catch_warnings():
        # Of pycocotools' own arrays under NumPy 2; the user can do nothing about it.
        warnings.simplefilter("ignore", DeprecationWarning)
        runs: Any = pycoco.encode(np.asfortranarray(mask, np.uint8))
        area, box = int(pycoco.area(runs)), pycoco.toBbox(runs).tolist()
    segmentation = {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")}
    return {"segmentation": segmentation, "area": area, "bbox": box}

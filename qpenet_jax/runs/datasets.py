"""From the config's `dataset` section to classes, folds and images."""

from pathlib import Path
from typing import Any, Literal

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.folds import (
    COCO_CLASSES,
    PASCAL_CLASSES,
    Fold,
    coco_fold,
    fold_of,
    named_fold,
    pascal_fold,
)
from qpenet_jax.data.sources.prepared import Prepared, prepared_classes
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.sources.voc import VOCLayout


def class_names(data: Any) -> tuple[str, ...]:
    """Returns the names of all classes of a data set.

    Raises:
        InputError: they are a prepared data set's, and there is none.
    """
    if data.kind == "shapes":
        return Shapes("val", 1).classes
    if data.split == "pascal":
        return PASCAL_CLASSES
    if data.split.startswith("coco"):
        return COCO_CLASSES
    if data.kind != "prepared":
        raise InputError(
            f"config.dataset.split={data.split!r} needs the class names of a "
            "prepared data set: config.dataset.kind=prepared"
        )
    return prepared_classes(data.root)


def chosen_fold(data: Any, classes: tuple[str, ...]) -> Fold:
    """Returns base and novel class ids by the config's split and fold.

    Raises:
        InputError: there is no such fold, or a novel class isn't among `classes`.
    """
    if data.split == "pascal":
        return pascal_fold(data.fold)
    if data.split.startswith("coco_"):
        return coco_fold(data.fold, data.split.removeprefix("coco_"))
    if data.split == "named":
        return named_fold(classes, tuple(data.novel))
    return fold_of(len(classes), data.fold, data.folds, data.split)


def open_split(
    data: Any, split: Literal["train", "val"], classes: tuple[str, ...], seed: int
) -> SegmentationDataset:
    """Returns the images of a split; `seed` draws the shapes.

    Raises:
        InputError: files are missing, or a prepared data set has other classes.
    """
    # pyright takes a cached_property for no match of a protocol's property.
    dataset: Any
    if data.kind == "shapes":
        dataset = Shapes(split, data[f"{split}_images"], data.side, seed)
    elif data.kind == "voc":
        ids = data[f"{split}_ids"]
        dataset = VOCLayout(data.root, ids, classes, data.images, data.masks)
    else:
        dataset = Prepared(data.root, split)
        if dataset.classes != classes:
            raise InputError(
                f"{data.root} has {len(dataset.classes)} other classes than "
                f"config.dataset.split={data.split!r} expects; choose "
                "'blocks', 'strided' or 'named'"
            )
    return dataset


def files_read(data: Any) -> list[Path]:
    """Returns the files and folders that a data set consists of."""
    if data.kind == "shapes":
        return []
    root = Path(data.root)
    if data.kind == "prepared":
        return [root]
    lists = [Path(ids) for ids in (data.train_ids, data.val_ids) if ids]
    return [root / data.images, root / data.masks, *lists]

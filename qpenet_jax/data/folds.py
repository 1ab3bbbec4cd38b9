"""Which classes are trained on and which are novel: by a rule, or by their names."""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from qpenet_jax.core.errors import InputError

FOLDS = 4

# fmt: off
PASCAL_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep",
    "sofa", "train", "tvmonitor",
)
"""The 20 classes of PASCAL VOC in the order of their ids 1..20."""

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck",
    "boat", "traffic light", "fire hydrant", "stop sign", "parking meter", "bench",
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
    "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife",
    "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot",
    "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
"""The 80 classes of COCO by contiguous id 1..80, the rank of the official id 1..90."""
# fmt: on


class Fold(NamedTuple):
    """The class ids to train on and those held out, each ascending."""

    base: tuple[int, ...]
    novel: tuple[int, ...]


def fold_of(
    classes: int,
    fold: int,
    folds: int = FOLDS,
    rule: Literal["blocks", "strided"] = "blocks",
) -> Fold:
    """Returns fold 0 .. folds - 1 of the class ids 1 .. `classes`.

    "blocks" cuts the ids into runs, "strided" takes fold + 1, fold + 1 + folds and so
    on. Every class is novel in exactly one fold; if `folds` doesn't divide `classes`,
    the numbers of novel classes differ by one.

    Raises:
        InputError: there is no such fold or rule, or a fold would be empty.
    """
    if not 2 <= folds <= classes:
        raise InputError(
            f"{classes} classes can't make {folds} folds: choose 2 or more folds, and "
            "not more than classes"
        )
    if fold not in range(folds):
        raise InputError(f"fold {fold}: choose 0 to {folds - 1}")
    ids = range(1, classes + 1)
    novel = {
        "blocks": ids[fold * classes // folds : (fold + 1) * classes // folds],
        "strided": ids[fold::folds],
    }
    if rule not in novel:
        raise InputError(f"fold rule {rule!r}: choose 'blocks' or 'strided'")
    return _fold(classes, novel[rule])


def named_fold(classes: Sequence[str], novel: Sequence[str]) -> Fold:
    """Returns the fold that holds out the classes named in `novel`.

    All classes may be novel: a trained network is then scored on each of them.

    Raises:
        InputError: a name that is none of `classes`, or no name at all.
    """
    unknown = [name for name in novel if name not in classes]
    if unknown or not novel:
        wrong = f"no class is called {', '.join(unknown)}" if unknown else "none given"
        raise InputError(f"novel classes: {wrong}; choose of {', '.join(classes)}")
    return _fold(len(classes), {classes.index(name) + 1 for name in novel})


def pascal_fold(fold: int) -> Fold:
    """Returns fold 0..3 of PASCAL-5i: novel classes are 5 fold + 1 .. 5 fold + 5.

    The procedural shapes have 20 classes as well and share these folds.

    Raises:
        InputError: there is no such fold.

    Source: Shaban et al., "One-Shot Learning for Semantic Segmentation", BMVC 2017.
    """
    return fold_of(20, fold)


def coco_fold(fold: int, split: str = "fwb") -> Fold:
    """Returns fold 0..3 of COCO-20i: 60 base and 20 novel classes.

    "fwb" takes every fourth class, fold + 1, fold + 5 .. fold + 77, as the paper's
    system does (Nguyen and Todorovic, ICCV 2019); "panet" takes the block of classes
    20 fold + 1 .. 20 fold + 20 (Wang et al., ICCV 2019). Results aren't comparable.

    Raises:
        InputError: there is no such fold or split.
    """
    if split not in ("fwb", "panet"):
        raise InputError(f"COCO-20i split {split!r}: choose 'fwb' or 'panet'")
    return fold_of(80, fold, rule="strided" if split == "fwb" else "blocks")


def _fold(classes: int, novel: Collection[int]) -> Fold:
    base = (c for c in range(1, classes + 1) if c not in novel)
    return Fold(base=tuple(base), novel=tuple(sorted(novel)))

"""Which classes are trained on and which are novel: PASCAL-5i and COCO-20i."""

from typing import NamedTuple

from qpenet_jax.errors import InputError

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


def pascal_fold(fold: int) -> Fold:
    """Return fold 0..3 of PASCAL-5i: novel classes are 5 fold + 1 .. 5 fold + 5.

    The procedural shapes have 20 classes as well and share these folds.

    Raises:
        InputError: there is no such fold.

    Source: Shaban et al., "One-Shot Learning for Semantic Segmentation", BMVC 2017.
    """
    return _fold(20, range(5 * fold + 1, 5 * fold + 6), fold)


def coco_fold(fold: int, split: str = "fwb") -> Fold:
    """Return fold 0..3 of COCO-20i: 60 base and 20 novel classes.

    "fwb" takes every fourth class, fold + 1, fold + 5 .. fold + 77, as the paper's
    system does (Nguyen and Todorovic, ICCV 2019); "panet" takes the block of classes
    20 fold + 1 .. 20 fold + 20 (Wang et al., ICCV 2019). Results aren't comparable.

    Raises:
        InputError: there is no such fold or split.
    """
    novel = {
        "fwb": range(fold + 1, 81, FOLDS),
        "panet": range(20 * fold + 1, 20 * fold + 21),
    }
    if split not in novel:
        raise InputError(f"COCO-20i split {split!r}: choose 'fwb' or 'panet'")
    return _fold(80, novel[split], fold)


def _fold(classes: int, novel: range, fold: int) -> Fold:
    if fold not in range(FOLDS):
        raise InputError(f"fold {fold}: choose 0, 1, 2 or 3")
    base = (c for c in range(1, classes + 1) if c not in novel)
    return Fold(base=tuple(base), novel=tuple(novel))

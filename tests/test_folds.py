import json

import pytest

from qpenet_jax.datasets.folds import (
    COCO_CLASSES,
    PASCAL_CLASSES,
    coco_fold,
    pascal_fold,
)
from qpenet_jax.errors import InputError


def named(classes, ids):
    return [classes[i - 1] for i in ids]


def test_class_lists():
    assert len(PASCAL_CLASSES) == len(set(PASCAL_CLASSES)) == 20
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert PASCAL_CLASSES[14] == "person"
    assert COCO_CLASSES[0] == "person"
    assert COCO_CLASSES[79] == "toothbrush"


def test_coco_names_are_those_of_the_official_annotations(shared_voc):
    path = shared_voc.parent / "coco/annotations/instances_train2017.json"
    categories = json.loads(path.read_text())["categories"]
    official = [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
    assert list(COCO_CLASSES) == official


def test_pascal_folds():
    novel = ["diningtable", "dog", "horse", "motorbike", "person"]
    assert named(PASCAL_CLASSES, pascal_fold(2).novel) == novel
    assert pascal_fold(0).novel == (1, 2, 3, 4, 5)
    assert pascal_fold(3).base == tuple(range(1, 16))


@pytest.mark.parametrize(
    ("fold_of", "classes"),
    [
        (pascal_fold, 20),
        (coco_fold, 80),
        (lambda fold: coco_fold(fold, "panet"), 80),
    ],
)
def test_folds_split_the_classes(fold_of, classes):
    novel = []
    for fold in range(4):
        base, held_out = fold_of(fold)
        assert sorted(base + held_out) == list(range(1, classes + 1))
        assert len(held_out) == classes // 4
        novel.extend(held_out)
    assert sorted(novel) == list(range(1, classes + 1))


def test_coco_splits():
    assert coco_fold(1).novel[:3] == (2, 6, 10)
    assert coco_fold(3).novel[-1] == 80
    assert coco_fold(1, "panet").novel == tuple(range(21, 41))


@pytest.mark.parametrize("fold", [-1, 4])
@pytest.mark.parametrize("fold_of", [pascal_fold, coco_fold])
def test_unknown_fold(fold_of, fold):
    with pytest.raises(InputError, match=f"fold {fold}: choose"):
        fold_of(fold)


def test_unknown_split():
    with pytest.raises(InputError, match="'hsnet': choose"):
        coco_fold(0, "hsnet")

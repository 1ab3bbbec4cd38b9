import functools
import itertools
import json

import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.folds import (
    COCO_CLASSES,
    PASCAL_CLASSES,
    coco_fold,
    fold_of,
    named_fold,
    pascal_fold,
)


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


def test_folds_by_hand():
    for fold in range(4):
        assert coco_fold(fold) == fold_of(80, fold, rule="strided")
        assert coco_fold(fold, "panet") == fold_of(80, fold)
        assert pascal_fold(fold) == fold_of(20, fold)
    assert coco_fold(1).novel[:3] == (2, 6, 10)
    assert coco_fold(3).novel[-1] == 80
    assert coco_fold(1, "panet").novel == tuple(range(21, 41))
    novel = ["diningtable", "dog", "horse", "motorbike", "person"]
    assert named(PASCAL_CLASSES, pascal_fold(2).novel) == novel
    assert pascal_fold(0).novel == (1, 2, 3, 4, 5)
    assert pascal_fold(3).base == tuple(range(1, 16))


@pytest.mark.parametrize("rule", ["blocks", "strided"])
@pytest.mark.parametrize(
    ("classes", "folds"),
    [(2, 2), (7, 3), (7, 7), (10, 4), (20, 4), (80, 4), (1000, 4)],
)
def test_any_number_of_classes(classes, folds, rule):
    parts = [fold_of(classes, fold, folds, rule) for fold in range(folds)]
    sizes = [len(part.novel) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == classes
    for base, novel in parts:
        assert list(novel) == sorted(novel)
        assert sorted(base + novel) == list(range(1, classes + 1))
        steps = {b - a for a, b in itertools.pairwise(novel)}
        assert steps <= {1 if rule == "blocks" else folds}
    assert {c for part in parts for c in part.novel} == set(range(1, classes + 1))


def test_uneven_folds_by_hand():
    blocks = [fold_of(10, fold).novel for fold in range(4)]
    assert blocks == [(1, 2), (3, 4, 5), (6, 7), (8, 9, 10)]
    strided = [fold_of(5, fold, 3, "strided").novel for fold in range(3)]
    assert strided == [(1, 4), (2, 5), (3,)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (functools.partial(fold_of, *args), f"fold {args[-1]}: choose")
            for fold_of in (pascal_fold, coco_fold)
            for args in ((-1,), (4,))
        ),
        *(
            (lambda c=c, f=f: fold_of(c, 0, f), f"{c} classes can't make {f} folds")
            for c, f in ((3, 4), (0, 4), (1, 1), (5, 0))
        ),
        (lambda: coco_fold(0, "hsnet"), "'hsnet': choose"),
        (lambda: fold_of(8, 0, rule="random"), r"rule 'random': choose 'blocks'"),
        (lambda: fold_of(8, 2, folds=2), r"fold 2: choose 0 to 1"),
        (
            lambda: named_fold(("ant", "bee"), ("emu", "bee", "fox")),
            r"called emu, fox; choose of ant, bee$",
        ),
        (lambda: named_fold(("ant", "bee"), ()), r"none given; choose of ant, bee$"),
    ],
)
def test_what_cant_be_a_fold(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_named_fold():
    classes = ("ant", "bee", "cow", "dog")
    assert named_fold(classes, ["dog", "bee"]) == ((1, 3), (2, 4))
    assert named_fold(classes, classes) == ((), (1, 2, 3, 4))
    assert named_fold(PASCAL_CLASSES, PASCAL_CLASSES[10:15]) == pascal_fold(2)

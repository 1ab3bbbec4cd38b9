"""PASCAL-5i from the two official archives: `qpenet prepare pascal`.

The field's lists of images are made by rule, never copied: VOC's own segmentation
images, and those that the Semantic Boundaries Dataset (SBD) adds to them.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from jaxtyping import UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.folds import PASCAL_CLASSES
from qpenet_jax.data.images import read_label
from qpenet_jax.data.prepare.archives import Archive, Member, fingerprint, open_archive
from qpenet_jax.data.prepare.builder import (
    LabelledImage,
    SegmentationBuilder,
    Source,
    prepare,
)
from qpenet_jax.data.sources.voc import read_ids

POOLS = {
    "main": (
        "VOC segmentation train, and the SBD images that are in VOC's "
        "ImageSets/Main/train; inferred from the count of the field's list of 5,953"
    ),
    "trainaug": "VOC segmentation train, and all SBD images but VOC's val",
}
"""The two rules for training images; a file of ids is the third way."""

EXPECTED_IMAGES = {"main": 5953, "trainaug": 10_582, "val": 1449}
"""How many images the rules give on the official archives."""

IMAGE_BYTES = 115_000
"""An average JPEG of VOC 2012."""

TRAIN_LIST = "ImageSets/Segmentation/train.txt"
SBD_LIST = "dataset/train.txt"
SBD_WANTED = re.compile(r"(.*/)?dataset/(cls/[^/]+\.mat|(train|val)\.txt)")


Ids = tuple[str, ...]
Splits = dict[str, Sequence[str]]


class Pascal5i(SegmentationBuilder, skip_registration=True):
    """PASCAL VOC 2012 with 20 classes, its training images extended by SBD."""

    name = "pascal5i"


def prepare_pascal(
    voc: str | Path,
    sbd: str | Path | None,
    out: str | Path,
    *,
    masks: str | Path | None = None,
    pool: str | Path = "main",
    expected: Mapping[str, int] = EXPECTED_IMAGES,
) -> Path:
    """Writes PASCAL-5i, splits "train" and "val", below `out` and returns its folder.

    `voc` and `sbd` are the official archives (or what was unpacked from them). VOC's
    own masks win where both have one; val is VOC's val and never in train. `masks` is
    a ready SegmentationClassAug, folder or archive, to take instead of SBD's masks;
    without `sbd` its images stand for SBD's.

    `pool` names a rule of `POOLS` or a file of ids, which are taken as they are. The
    rules list SBD's images in ascending order, then those that are VOC's alone.
    `expected` are the numbers of images that the rules and val must give.

    Raises:
        InputError: an archive that is missing, damaged or incomplete; a rule that
            gives another number of images than the field's; an id of the file that is
            in VOC's val or has no image or mask; a label that can't be used.
    """
    pool = _checked_pool(pool)
    with ExitStack() as stack:
        archive = stack.enter_context(open_archive(voc))
        root = _root(archive, TRAIN_LIST, "VOC 2012")
        images = archive.by_stem(f"{root}JPEGImages/", ".jpg")
        extra, candidates = _other_masks(sbd, masks, stack)
        labels = extra | archive.by_stem(f"{root}SegmentationClass/", ".png")
        splits = _splits(archive, f"{root}ImageSets", candidates, pool, expected)
        for name in (*splits["train"], *splits["val"]):
            _check_complete(name, images, labels, f"{archive.path}: {root}")
        facts = _facts({"voc": voc, "sbd": sbd, "masks": masks}, pool, splits["train"])

        def example(split: str, name: str) -> LabelledImage:
            del split
            image, mask = images[name], labels[name]
            label = _read_mask(mask)
            return LabelledImage(name, image.read(), label, str(image), str(mask))

        count = sum(map(len, splits.values()))
        source = Source(PASCAL_CLASSES, splits, example, IMAGE_BYTES * count, facts)
        config = pool if isinstance(pool, str) else f"pool-{facts['train_sha256'][:8]}"
        return prepare(Pascal5i, source, Path(out), config)


def _checked_pool(pool: str | Path) -> str | Path:
    """Returns the name of a rule or the path of a file."""
    if pool in POOLS:
        return str(pool)
    if not Path(pool).is_file():
        raise InputError(
            f"pool {str(pool)!r}: choose {' or '.join(POOLS)} or give a file of ids"
        )
    return Path(pool)


def _splits(
    archive: Archive,
    lists: str,
    candidates: frozenset[str],
    pool: str | Path,
    expected: Mapping[str, int],
) -> Splits:
    """Returns the images of both splits; the folder `lists` holds VOC's own lists.

    `candidates` are the images that a rule may add to VOC's.
    """
    val = _list(archive, f"{lists}/Segmentation/val.txt")
    if isinstance(pool, Path):
        return {"train": _ids_of_file(pool, val), "val": val}
    added = candidates - set(val)
    if pool == "main":
        added &= set(_list(archive, f"{lists}/Main/train.txt"))
    segmented = _list(archive, f"{lists}/Segmentation/train.txt")
    alone = set(segmented) - added - set(val)
    train = (*sorted(added), *sorted(alone))
    _check_count(pool, train, expected[pool])
    _check_count("val", val, expected["val"])
    return {"train": train, "val": val}


def _ids_of_file(path: Path, val: Ids) -> Ids:
    ids = read_ids(path)
    if leaked := sorted(set(ids) & set(val)):
        raise InputError(
            f"{path}: {leaked[0]} is an image of VOC's val ({len(leaked)} are); "
            "take them off the list"
        )
    return ids


def _check_count(what: str, ids: Ids, expected: int) -> None:
    if len(ids) != expected:
        raise InputError(
            f"{what}: {expected} images expected, {len(ids)} found: these aren't "
            "the official archives; fetch them again, or list the training images in "
            "a file and give it as --pool FILE"
        )


def _check_complete(
    name: str, images: dict[str, Member], labels: dict[str, Member], voc: str
) -> None:
    """Says now, rather than after minutes of writing, what can't be found."""
    if name not in images:
        raise InputError(
            f"{voc} has no image JPEGImages/{name}.jpg: is the archive whole, and the "
            "id right?"
        )
    if name not in labels:
        raise InputError(
            f"no mask of {name}: neither SegmentationClass/{name}.png in {voc} nor one "
            "of SBD's or the given masks; take it off the list or add its mask"
        )


def _facts(
    given: dict[str, str | Path | None], pool: str | Path, train: Sequence[str]
) -> dict[str, Any]:
    extra = "masks" if given["masks"] is not None else "SBD"
    return {
        "archives": {
            k: fingerprint(path) for k, path in given.items() if path is not None
        },
        "pool": POOLS[pool] if isinstance(pool, str) else "a file of ids",
        "train_sha256": hashlib.sha256("\n".join(train).encode()).hexdigest(),
        "labels": f"VOC SegmentationClass; where it has none, {extra}",
    }


def _other_masks(
    sbd: str | Path | None, masks: str | Path | None, stack: ExitStack
) -> tuple[dict[str, Member], frozenset[str]]:
    """Returns the masks for images that VOC hasn't segmented, and what a pool may add.

    That are the images of SBD's two lists, or those of all given masks.
    """
    if sbd is None and masks is None:
        raise InputError("give SBD's benchmark.tgz or a folder or archive of masks")
    members: dict[str, Member] = {}
    candidates: frozenset[str] = frozenset()
    if sbd is not None:
        archive = stack.enter_context(open_archive(sbd, _is_sbd))
        members, candidates = archive.by_stem("", ".mat"), _sbd_ids(archive)
    if masks is not None:
        ready = stack.enter_context(open_archive(masks, lambda n: n.endswith(".png")))
        members = ready.by_stem("", ".png")
    return members, candidates or frozenset(members)


def _is_sbd(member: str) -> bool:
    return SBD_WANTED.fullmatch(member) is not None


def _sbd_ids(archive: Archive) -> frozenset[str]:
    root = _root(archive, SBD_LIST, "SBD")
    lists = (_list(archive, f"{root}dataset/{half}.txt") for half in ("train", "val"))
    return frozenset().union(*lists)


def _root(archive: Archive, member: str, what: str) -> str:
    """Returns what stands before `member` in the archive's paths, "" or "folder/"."""
    found = [n for n in archive if f"/{n}".endswith(f"/{member}")]
    if len(found) == 1:
        return found[0].removesuffix(member)
    many = "no" if not found else f"{len(found)} times"
    raise InputError(
        f"{archive.path} holds {many} {member}: give {what} as it is published"
    )


def _list(archive: Archive, member: str) -> Ids:
    return tuple(archive[member].decode("utf-8-sig", "replace").split())


def _read_mask(mask: Member) -> UInt8[np.ndarray, "h w"]:
    """Returns the label map of a PNG, or of a .mat file of SBD: GTcls.Segmentation."""
    data, where = mask.read(), str(mask)
    if not mask.name.endswith(".mat"):
        return read_label(BytesIO(data), name=where)
    try:
        truth: Mapping[str, Any] = scipy.io.loadmat(
            BytesIO(data), variable_names="GTcls"
        )
        label = truth["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # scipy raises a dozen types on damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where}: no mask of SBD ({reason}); fetch the archive again"
        ) from None
    if label.ndim != 2 or label.dtype != np.uint8:
        raise InputError(
            f"{where}: GTcls.Segmentation is {label.dtype} of shape {label.shape}, not "
            "uint8 of height and width; fetch the archive again"
        )
    return label

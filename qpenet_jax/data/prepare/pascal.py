"""PASCAL-5i from the two official archives: `qpenet prepare pascal`.

The field's lists of images are made by rule, never copied: VOC's own segmentation
images, and those that the Semantic Boundaries Dataset (SBD) adds to them.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import scipy.io
from jaxtyping import UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.folds import PASCAL_CLASSES
from qpenet_jax.data.images import read_label
from qpenet_jax.data.prepare.archives import Archive, fingerprint, open_archive
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


class Masks(NamedTuple):
    """Where labels of images come from that VOC itself hasn't segmented."""

    archive: Archive
    members: dict[str, str]
    """Member of every image id."""
    ids: frozenset[str]
    """The images that a pool may draw from: SBD's two lists, or all masks."""

    def read(self, name: str) -> UInt8[np.ndarray, "h w"]:
        """Returns the label map of image `name`."""
        member = self.members[name]
        data, where = self.archive[member], self.archive.where(member)
        if member.endswith(".mat"):
            return _read_sbd(data, where)
        return read_label(BytesIO(data), name=where)


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
        files = VocFiles(stack.enter_context(open_archive(voc)))
        extra = _open_masks(sbd, masks, stack)
        splits = _splits(files, extra, pool, expected)
        facts = _facts({"voc": voc, "sbd": sbd, "masks": masks}, pool, splits["train"])
        source = Source(
            classes=PASCAL_CLASSES,
            splits=splits,
            example=lambda _, name: _example(files, extra, name),
            image_bytes=IMAGE_BYTES * sum(map(len, splits.values())),
            facts=facts,
        )
        config = pool if isinstance(pool, str) else f"pool-{facts['train_sha256'][:8]}"
        return prepare(Pascal5i, source, Path(out), config)


class VocFiles:
    """Lists, images and masks of VOC 2012, wherever its folder is in the archive."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self._root = _root(archive, TRAIN_LIST, "VOC 2012")

    def ids(self, name: str) -> Ids:
        """Returns the list ImageSets/`name`.txt."""
        return _list(self.archive, f"{self._root}ImageSets/{name}.txt")

    def jpeg(self, name: str) -> str:
        """Returns the member with the image."""
        return f"{self._root}JPEGImages/{name}.jpg"

    def mask(self, name: str) -> str:
        """Returns the member with the mask; only segmented images have one."""
        return f"{self._root}SegmentationClass/{name}.png"


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
    files: VocFiles, extra: Masks, pool: str | Path, expected: Mapping[str, int]
) -> Splits:
    """Returns the lists of both splits, sure that every image and mask is there."""
    val = files.ids("Segmentation/val")
    train = _train_ids(files, extra, val, pool)
    if isinstance(pool, str):
        _check_count(pool, train, expected[pool])
        _check_count("val", val, expected["val"])
    _check_complete(files, extra, (*train, *val))
    return {"train": train, "val": val}


def _train_ids(files: VocFiles, extra: Masks, val: Ids, pool: str | Path) -> Ids:
    if isinstance(pool, Path):
        ids = read_ids(pool)
        if leaked := sorted(set(ids) & set(val)):
            raise InputError(
                f"{pool}: {leaked[0]} is an image of VOC's val ({len(leaked)} are); "
                "take them off the list"
            )
        return ids
    added = extra.ids - set(val)
    if pool == "main":
        added &= set(files.ids("Main/train"))
    alone = set(files.ids("Segmentation/train")) - added - set(val)
    return (*sorted(added), *sorted(alone))


def _check_count(what: str, ids: Ids, expected: int) -> None:
    if len(ids) != expected:
        raise InputError(
            f"{what}: {expected} images expected, {len(ids)} found: these aren't "
            "the official archives; fetch them again, or list the training images in "
            "a file and give it as --pool FILE"
        )


def _check_complete(files: VocFiles, extra: Masks, names: Ids) -> None:
    """Says now, rather than after minutes of writing, what can't be found."""
    voc = files.archive
    for name in names:
        if files.jpeg(name) not in voc:
            raise InputError(
                f"{voc.path} has no image {files.jpeg(name)}: is the archive whole, "
                "and the id right?"
            )
        if files.mask(name) not in voc and name not in extra.members:
            raise InputError(
                f"no mask of {name}: neither {files.mask(name)} in {voc.path} nor one "
                f"in {extra.archive.path}; take it off the list or add its mask"
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


def _example(files: VocFiles, extra: Masks, name: str) -> LabelledImage:
    jpeg, mask, voc = files.jpeg(name), files.mask(name), files.archive
    if mask in voc:
        where = voc.where(mask)
        label = read_label(BytesIO(voc[mask]), name=where)
    else:
        where = extra.archive.where(extra.members[name])
        label = extra.read(name)
    return LabelledImage(name, voc[jpeg], label, voc.where(jpeg), where)


def _open_masks(
    sbd: str | Path | None, masks: str | Path | None, stack: ExitStack
) -> Masks:
    lists = masked = None
    if sbd is not None:
        lists = masked = stack.enter_context(open_archive(sbd, _is_sbd))
    if masks is not None:
        masked = stack.enter_context(open_archive(masks, lambda n: n.endswith(".png")))
    if masked is None:
        raise InputError("give SBD's benchmark.tgz or a folder or archive of masks")
    members = _by_stem(masked, ".mat" if masked is lists else ".png")
    ids = frozenset(members) if lists is None else _sbd_ids(lists)
    return Masks(masked, members, ids)


def _is_sbd(member: str) -> bool:
    return SBD_WANTED.fullmatch(member) is not None


def _by_stem(archive: Archive, ending: str) -> dict[str, str]:
    members: dict[str, str] = {}
    for member in archive:
        if not member.endswith(ending):
            continue
        twin = members.setdefault(PurePosixPath(member).stem, member)
        if twin != member:
            raise InputError(
                f"{archive.path} has two masks of one image, {twin} and {member}; "
                "give a folder or archive with one of them"
            )
    return members


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


def _read_sbd(data: bytes, where: str) -> UInt8[np.ndarray, "h w"]:
    """Returns the label map of a .mat file of SBD, GTcls.Segmentation."""
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

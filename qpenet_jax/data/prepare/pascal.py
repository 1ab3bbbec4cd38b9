"""PASCAL-5i from the two official archives: `qpenet prepare pascal`.

The field's lists of images are made by rule, never copied: VOC's own segmentation
images, and those that the Semantic Boundaries Dataset (SBD) adds to them.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import scipy.io
from jaxtyping import UInt8

from qpenet_jax.core.download import Published
from qpenet_jax.core.errors import InputError, refused_as
from qpenet_jax.data.folds import PASCAL_CLASSES
from qpenet_jax.data.images import read_label
from qpenet_jax.data.prepare.archives import (
    Archive,
    Member,
    fingerprint,
    open_archive,
    unique,
)
from qpenet_jax.data.prepare.builder import Source, prepare
from qpenet_jax.data.sources.voc import read_ids, refuse_missing

ARCHIVES = (
    Published(
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "md5:6cd6e144f989b92b3379bac3b3de84fd",
        1_999_639_040,
    ),
    Published(
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
        "semantic_contours/benchmark.tgz",
        "md5:82b4d87ceb2ed10f6038a1cba92111cb",
        1_420_000_000,
    ),
)
"""VOC 2012 and SBD, whose size is about that; torchvision publishes the MD5s."""

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

TRAIN_LIST = "ImageSets/Segmentation/train.txt"
SBD_LIST = "dataset/train.txt"


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
    rule = _rule(pool)
    given = {"voc": voc, "sbd": sbd, "masks": masks}
    paths = {what: path for what, path in given.items() if path is not None}
    with ExitStack() as stack:
        archives = {k: stack.enter_context(open_archive(p)) for k, p in paths.items()}
        archive = archives["voc"]
        root = _root(archive, TRAIN_LIST, "VOC 2012")
        extra, candidates = _other_masks(archives)
        images = _by_stem(archive, f"{root}JPEGImages/", ".jpg")
        labels = extra | _by_stem(archive, f"{root}SegmentationClass/", ".png")
        splits = _splits(archive, f"{root}ImageSets", candidates, pool, expected)
        names = [*splits["train"], *splits["val"]]
        # Now, rather than after minutes of writing.
        refuse_missing("image", names, images, f"{voc} or what was given with it")
        refuse_missing("mask", names, labels, f"{voc} or what was given with it")

        train_sha256 = hashlib.sha256("\n".join(splits["train"]).encode()).hexdigest()
        source = Source(
            name="pascal5i",
            config=str(pool) if rule else f"pool-{train_sha256[:8]}",
            classes=PASCAL_CLASSES,
            splits=splits,
            images=images,
            label=lambda name: (_read_mask(labels[name]), str(labels[name])),
            facts={
                "archives": {what: fingerprint(path) for what, path in paths.items()},
                "pool": rule or "a file of ids",
                "train_sha256": train_sha256,
                "labels": "VOC SegmentationClass; where it has none, "
                f"{'SBD' if masks is None else 'masks'}",
            },
        )
        return prepare(source, Path(out))


def _rule(pool: str | Path) -> str | None:
    """Returns what a rule for training images says, None for a file of ids."""
    rule = POOLS.get(pool) if isinstance(pool, str) else None
    if not rule and not Path(pool).is_file():
        raise InputError(
            f"pool {str(pool)!r}: choose {' or '.join(POOLS)} or give a file of ids"
        )
    return rule


def _splits(
    archive: Archive,
    lists: str,
    candidates: Iterable[str],
    pool: str | Path,
    expected: Mapping[str, int],
) -> dict[str, Sequence[str]]:
    """Returns the images of both splits; the folder `lists` holds VOC's own lists.

    `candidates` are the images that a rule may add to VOC's.
    """
    val = _ids(archive[f"{lists}/Segmentation/val.txt"])
    if pool not in POOLS:
        return {"train": read_ids(Path(pool)), "val": val}
    added = set(candidates) - set(val)
    if pool == "main":
        added &= set(_ids(archive[f"{lists}/Main/train.txt"]))
    segmented = _ids(archive[f"{lists}/Segmentation/train.txt"])
    train = (*sorted(added), *sorted(set(segmented) - added - set(val)))
    for what, ids in ((str(pool), train), ("val", val)):
        if len(ids) != expected[what]:
            raise InputError(
                f"{what}: {expected[what]} images expected, {len(ids)} found: these "
                "aren't the official archives; fetch them again, or list the training "
                "images in a file and give it as --pool FILE"
            )
    return {"train": train, "val": val}


def _other_masks(
    archives: Mapping[str, Archive],
) -> tuple[dict[str, Member], Iterable[str]]:
    """Returns the masks for images that VOC hasn't segmented, and what a pool may add.

    That are the images of SBD's two lists, or those of all given masks.
    """
    masks, listed = {}, set()
    if len(archives) == 1:
        raise InputError("give SBD's benchmark.tgz or a folder or archive of masks")
    if "sbd" in archives:
        sbd = archives["sbd"]
        root = _root(sbd, SBD_LIST, "SBD") + "dataset/"
        listed.update(*(_ids(sbd[f"{root}{half}.txt"]) for half in ("train", "val")))
        masks = _by_stem(sbd, f"{root}cls/", ".mat")
    if "masks" in archives:
        masks = _by_stem(archives["masks"], "", ".png")
    return masks, listed or masks


def _root(archive: Archive, member: str, what: str) -> str:
    """Returns what stands before `member` in the archive's paths, "" or "folder/"."""
    found = [path for path in archive if f"/{path}".endswith(f"/{member}")]
    if len(found) == 1:
        return found[0].removesuffix(member)
    many = "no" if not found else f"{len(found)} times"
    raise InputError(
        f"{archive.path} holds {many} {member}: give {what} as it is published"
    )


def _by_stem(archive: Archive, start: str, ending: str) -> dict[str, Member]:
    """Returns the members of a start and an ending, by their names without ending."""
    return unique(
        (PurePosixPath(path).stem, member)
        for path, member in archive.items()
        if path.startswith(start) and path.endswith(ending)
    )


def _ids(file: Member) -> Sequence[str]:
    return file.read().decode("utf-8-sig", "replace").split()


def _read_mask(mask: Member) -> UInt8[np.ndarray, "h w"]:
    """Returns the label map of a PNG, or of a .mat file of SBD: GTcls.Segmentation."""
    data, where = mask.read(), str(mask)
    if not where.endswith(".mat"):
        return read_label(BytesIO(data), name=where)
    # scipy raises a dozen types on damaged files.
    with refused_as(f"{where}: no mask of SBD", "fetch the archive again"):
        truth: Any = scipy.io.loadmat(BytesIO(data), variable_names="GTcls")
        label = truth["GTcls"]["Segmentation"][0, 0]
        if label.ndim != 2 or label.dtype != np.uint8:
            raise ValueError(f"it is {label.dtype} of {label.ndim} dimensions")
        return label

"""COCO-20i from COCO's own files: `qpenet prepare coco`.

The label maps of few-shot codes differ in crowds, holes and overlaps, and so do their
numbers. The choices made here are `LABEL_RULES`, and are kept with the data set.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.folds import COCO_CLASSES
from qpenet_jax.data.prepare.archives import Member, fingerprint, open_archive
from qpenet_jax.data.prepare.builder import (
    LabelledImage,
    SegmentationBuilder,
    Source,
    prepare,
)
from qpenet_jax.data.prepare.instances import Instances

LABEL_RULES = (
    "all polygons as pycocotools draws them; crowds skipped, and images that show "
    "nothing else; later annotations over earlier ones, in the order of the file; "
    "values are the ranks 1..80 of the categories' ids"
)

RELEASE_IMAGES = {
    "2014": {"train": 82_081, "val": 40_137},
    "2017": {"train": 117_266, "val": 4_952},
}
"""Images of a whole release with an annotation that is no crowd. Those of 2014 are the
lengths of few-shot codes' lists; both releases divide the same 122,218 images."""

SAMPLED_IMAGES = 100
"""Images whose size is looked at to estimate that of all."""


class Coco20i(SegmentationBuilder, skip_registration=True):
    """COCO images with the 80 classes of their instance annotations as label maps."""

    name = "coco20i"


def prepare_coco(
    images: Sequence[Path],
    annotations: Sequence[Path],
    out: Path,
    whole_releases: Mapping[str, Mapping[str, int]] = RELEASE_IMAGES,
) -> Path:
    """Writes COCO-20i below `out` and returns where it is.

    `images` are folders, zips or tars that hold the images at any depth, `annotations`
    are `instances_train2014.json` and `instances_val2014.json`, or those of 2017; one
    of the two alone makes a data set of one split. How the labels are drawn, and where
    the numbers of images aren't those of `whole_releases`, stands in the facts
    `rules` and `note` of its metadata; a whole release has no note.

    Raises:
        InputError: annotation files of an unknown name or of two releases, or with
            errors; an image that is missing, broken or of another size than annotated.
    """
    release, paths = _release(annotations)
    files = {split: Instances(path) for split, path in paths.items()}
    with contextlib.ExitStack() as stack:
        found = _find(images, files.values(), stack)

        def example(split: str, name: str) -> LabelledImage:
            instances = files[split]
            member = found[instances.files[name]]
            return LabelledImage(
                name,
                image=member.read(),
                label=instances.label(name),
                image_from=str(member),
                label_from=f"{instances.path}: {instances.files[name]}",
            )

        source = Source(
            classes=COCO_CLASSES,
            splits={split: list(file.files) for split, file in files.items()},
            example=example,
            image_bytes=_estimate(list(found.values())),
            facts=_facts(whole_releases[release], files, images),
        )
        return prepare(Coco20i, source, Path(out), config=release)


def _release(annotations: Sequence[Path]) -> tuple[str, dict[str, Path]]:
    """Returns the year and the file of each split, as the files' names say."""
    releases, paths = set(), {}
    for path in map(Path, annotations):
        match = re.fullmatch(r"instances_(train|val)(2014|2017)\.json", path.name)
        if not match:
            raise InputError(
                f"{path}: annotation files are instances_train2014.json and "
                "instances_val2014.json, or those of 2017"
            )
        split, release = match.groups()
        if split in paths:
            raise InputError(f"{paths[split]} and {path}: give one file for {split}")
        paths[split] = path
        releases.add(release)
    if len(releases) != 1:
        given = ", ".join(map(str, paths.values())) or "none given"
        raise InputError(f"annotation files of one release are needed: {given}")
    return releases.pop(), dict(sorted(paths.items()))


def _find(
    paths: Sequence[Path], files: Iterable[Instances], stack: contextlib.ExitStack
) -> dict[str, Member]:
    """Returns where every image is, by its file name; `stack` closes the archives."""
    needed = {file for instances in files for file in instances.files.values()}
    found: dict[str, Member] = {}
    for path in paths:
        archive = stack.enter_context(open_archive(path, lambda n: _last(n) in needed))
        for path_in_archive in archive:
            member = Member(archive, path_in_archive)
            twin = found.setdefault(_last(path_in_archive), member)
            if twin != member:
                raise InputError(
                    f"{twin} and {member} share a name; give only the folders or "
                    "archives that are needed"
                )
    missing = sorted(needed - found.keys())
    if missing:
        raise InputError(
            f"no image {missing[0]} in {', '.join(map(str, paths)) or 'no folder'} "
            f"({len(missing)} of {len(needed)} are missing); give the folders or "
            "archives that hold them"
        )
    return found


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _estimate(images: Sequence[Member]) -> int:
    """Returns about how many bytes all images have; sizes of members aren't listed."""
    sample = images[:: -(-len(images) // SAMPLED_IMAGES)]
    seen = sum(len(member.read()) for member in sample)
    return seen * len(images) // len(sample)


def _facts(
    whole: Mapping[str, int], files: Mapping[str, Instances], images: Sequence[Path]
) -> dict[str, Any]:
    counts = {split: len(instances.files) for split, instances in files.items()}
    differ = [
        f"{split} has {count:,} images, the whole release {whole[split]:,}"
        for split, count in counts.items()
        if count != whole[split]
    ]
    # A folder has no hash of its own, and reading 20 GB for one would take long.
    archives = [path for path in map(Path, images) if path.is_file()]
    note = {"note": "; ".join(differ)} if differ else {}
    return note | {
        "rules": LABEL_RULES,
        "images": counts,
        "annotations": [fingerprint(instances.path) for instances in files.values()],
        "archives": [fingerprint(path) for path in archives],
    }

"""COCO-20i from COCO's own files: `qpenet prepare coco`.

The label maps of few-shot codes differ in crowds, holes and overlaps, and so do their
numbers. The choices made here are `LABEL_RULES`, and are kept with the data set.
"""

import contextlib
import re
import zipfile
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8

from qpenet_jax.core.download import Published
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.folds import COCO_CLASSES
from qpenet_jax.data.prepare.archives import Member, fingerprint, open_archive, unique
from qpenet_jax.data.prepare.builder import Source, prepare
from qpenet_jax.data.prepare.instances import Instances
from qpenet_jax.data.sources.voc import refuse_missing

SERVER = "http://images.cocodataset.org"
ARCHIVES = {
    "2014": (
        Published(
            f"{SERVER}/zips/train2014.zip",
            "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
            13_510_573_713,
        ),
        Published(
            f"{SERVER}/zips/val2014.zip",
            "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
            6_645_013_297,
        ),
        Published(
            f"{SERVER}/annotations/annotations_trainval2014.zip",
            "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
            252_872_794,
        ),
    ),
    "2017": (
        Published(
            f"{SERVER}/zips/train2017.zip",
            "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
            19_336_861_798,
        ),
        Published(
            f"{SERVER}/zips/val2017.zip",
            "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
            815_585_330,
        ),
        Published(
            f"{SERVER}/annotations/annotations_trainval2017.zip",
            "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
            252_907_541,
        ),
    ),
}
"""Images of both splits and annotations, with the SHA-256 that TFDS publishes."""

ANNOTATIONS = r"instances_(train|val)(2014|2017)\.json"
"""Names of the files with annotations: split and release."""

LABEL_RULES = (
    "all polygons as pycocotools draws them; crowds skipped, and images that show "
    "nothing else; later annotations over earlier ones, in the order of the file; "
    "values are the ranks 1..80 of the categories' ids"
)


def prepare_coco(
    images: Sequence[Path], annotations: Sequence[Path], out: Path
) -> Path:
    """Writes COCO-20i below `out` and returns where it is.

    `images` are folders, zips or tars that hold the images at any depth, `annotations`
    are `instances_train2014.json` and `instances_val2014.json`, or those of 2017; one
    of the two alone makes a data set of one split. How the labels are drawn stands in
    the facts `rules` of its metadata.

    Raises:
        InputError: annotation files of an unknown name or of two releases, or with
            errors; an image that is missing, broken or of another size than annotated.
    """
    release, paths = _release(annotations)
    files = {split: Instances(path) for split, path in paths.items()}
    instances = {name: file for file in files.values() for name in file.files}
    needed = {file for read in files.values() for file in read.files.values()}
    # A folder has no hash of its own, and reading 20 GB for one would take long.
    archives = [path for path in map(Path, images) if path.is_file()]
    with contextlib.ExitStack() as stack:
        found = _find(images, needed, stack)

        def label(name: str) -> tuple[UInt8[np.ndarray, "h w"], str]:
            annotated = instances[name]
            return annotated.label(name), f"{annotated.path}: {annotated.files[name]}"

        source = Source(
            name="coco20i",
            config=release,
            classes=COCO_CLASSES,
            splits={split: list(file.files) for split, file in files.items()},
            images={name: found[each.files[name]] for name, each in instances.items()},
            label=label,
            facts={
                "rules": LABEL_RULES,
                "images": {split: len(file.files) for split, file in files.items()},
                "annotations": [fingerprint(path) for path in paths.values()],
                "archives": [fingerprint(path) for path in archives],
            },
        )
        return prepare(source, Path(out))


def unpack_annotations(archive: Path) -> list[Path]:
    """Writes COCO's annotation files of train and val below the folder of their zip."""
    with zipfile.ZipFile(archive) as pack:
        names = [n for n in pack.namelist() if n.startswith("annotations/instances_")]
        return [Path(pack.extract(name, archive.parent)) for name in sorted(names)]


def _release(annotations: Sequence[Path]) -> tuple[str, dict[str, Path]]:
    """Returns the year and the file of each split, as the files' names say."""
    paths = [*map(Path, annotations)]
    matches = [re.fullmatch(ANNOTATIONS, path.name) for path in paths]
    found = {m[1]: path for m, path in zip(matches, paths, strict=True) if m}
    releases = {match[2] for match in matches if match}
    if len(found) < len(paths) or len(releases) != 1:
        raise InputError(
            f"annotations {', '.join(map(str, paths)) or '(none)'}: give "
            "instances_train2014.json and instances_val2014.json, or those of 2017"
        )
    return releases.pop(), dict(sorted(found.items()))


def _find(
    paths: Sequence[Path], needed: AbstractSet[str], stack: contextlib.ExitStack
) -> dict[str, Member]:
    """Returns where every image is, by its file name; `stack` closes the archives."""
    archives = [stack.enter_context(open_archive(path)) for path in paths]
    files = (file for archive in archives for file in archive.items())
    named = ((PurePosixPath(path).name, member) for path, member in files)
    found = unique((name, member) for name, member in named if name in needed)
    refuse_missing("image", sorted(needed), found, ", ".join(map(str, paths)))
    return found

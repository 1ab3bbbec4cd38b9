"""COCO-20i from COCO's own files: `qpenet prepare coco`.

The label maps of few-shot codes differ in crowds, holes and overlaps, and so do their
numbers. The choices made here are `LABEL_RULES`, and are kept with the data set.
"""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from pycocotools.coco import COCO

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.folds import COCO_CLASSES
from qpenet_jax.data.prepare.archives import Archive, fingerprint, open_archive
from qpenet_jax.data.prepare.builder import (
    Example,
    SegmentationBuilder,
    Source,
    prepare,
)

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


class Instances:
    """One annotation file: which images show something, and their label maps."""

    def __init__(self, path: Path):
        """Read and check the file; nothing is drawn yet.

        Raises:
            InputError: no such file, broken JSON, missing keys, other categories than
                COCO's 80, an annotation of an unknown image or category.
        """
        self.path = path
        with _format_errors(path):
            self._coco = _read(path)
            self._ranks = _ranks(path, self._coco)
            self.files = self._shown_files()

    def label(self, name: str) -> UInt8[np.ndarray, "h w"]:
        """Draw the label map of an image: 0 background, 1..80.

        Raises:
            InputError: an annotation that pycocotools can't draw.
        """
        # pycocotools' masks are in column order as well; assigning is then faster.
        label = np.zeros(self._sizes[name], np.uint8, order="F")
        for annotation in self._coco.imgToAnns[self._ids[name]]:
            if annotation["iscrowd"]:
                continue
            try:
                mask = _draw(self._coco, annotation)
                label[mask] = self._ranks[annotation["category_id"]]
            except Exception as error:  # pycocotools raises many types, even bare ones.
                raise InputError(
                    f"{self.path}: annotation {annotation['id']} of {name} can't be "
                    f"drawn ({_reason(error)}); correct it or take it out"
                ) from None
        return np.ascontiguousarray(label)

    def _shown_files(self) -> dict[str, str]:
        """Return the file names of images with more than crowds, by their names."""
        coco = self._coco
        shown = {a["image_id"] for a in coco.dataset["annotations"] if not a["iscrowd"]}
        images = [image for image in coco.imgs.values() if image["id"] in shown]
        if not images:
            raise InputError(f"{self.path}: no image has an annotation but crowds")
        self._ids = {PurePosixPath(i["file_name"]).stem: i["id"] for i in images}
        if len(self._ids) < len(images):
            raise InputError(f"{self.path}: two images have one name; rename one")
        sizes = ((int(i["height"]), int(i["width"])) for i in images)
        self._sizes = dict(zip(self._ids, sizes, strict=True))
        files = (_last(i["file_name"]) for i in images)
        return dict(zip(self._ids, files, strict=True))


def prepare_coco(
    images: Sequence[Path], annotations: Sequence[Path], out: Path
) -> Path:
    """Write COCO-20i below `out` and return where it is.

    `images` are folders, zips or tars that hold the images at any depth, `annotations`
    are `instances_train2014.json` and `instances_val2014.json`, or those of 2017; one
    of the two alone makes a data set of one split. How the labels are drawn, and where
    the numbers of images aren't those of the whole release, stands in the facts
    `rules` and `note` of its metadata; a whole release has no note.

    Raises:
        InputError: annotation files of an unknown name or of two releases, or with
            errors; an image that is missing, broken or of another size than annotated.
    """
    release, paths = _release(annotations)
    files = {split: Instances(path) for split, path in paths.items()}
    with contextlib.ExitStack() as stack:
        found = _find(images, files.values(), stack)

        def example(split: str, name: str) -> Example:
            instances = files[split]
            archive, member = found[instances.files[name]]
            return Example(
                name,
                image=archive[member],
                label=instances.label(name),
                image_from=archive.where(member),
                label_from=f"{instances.path}: {instances.files[name]}",
            )

        source = Source(
            classes=COCO_CLASSES,
            splits={split: list(file.files) for split, file in files.items()},
            example=example,
            image_bytes=_estimate(list(found.values())),
            facts=_facts(release, files, images),
        )
        return prepare(Coco20i, source, Path(out), config=release)


def _release(annotations: Sequence[Path]) -> tuple[str, dict[str, Path]]:
    """Return the year and the file of each split, told by the files' names."""
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


def _read(path: Path) -> COCO:
    with contextlib.redirect_stdout(None):  # pycocotools tells how long it takes.
        coco = COCO(str(path))
    for key in ("images", "annotations", "categories"):
        _ = coco.dataset[key]
    unknown = coco.imgToAnns.keys() - coco.imgs.keys()
    if unknown:
        annotation = coco.imgToAnns[min(unknown)][0]
        raise InputError(
            f"{path}: annotation {annotation['id']} is of image {min(unknown)}, which "
            "isn't in the file; fetch it again"
        )
    return coco


def _ranks(path: Path, coco: COCO) -> dict[int, int]:
    """Return the rank 1..80 of every category id; COCO's own ids run to 90."""
    ids = sorted(coco.cats)
    if tuple(coco.cats[i]["name"] for i in ids) != COCO_CLASSES:
        raise InputError(
            f"{path}: its categories aren't COCO's 80 in their order; label maps of "
            "other classes can be prepared as a folder"
        )
    unknown = {a["category_id"] for a in coco.dataset["annotations"]} - coco.cats.keys()
    if unknown:
        raise InputError(f"{path}: no category has the id {min(unknown)}; correct it")
    return {category: rank for rank, category in enumerate(ids, 1)}


def _draw(coco: COCO, annotation: Any) -> Bool[np.ndarray, "h w"]:
    with warnings.catch_warnings():
        # Of pycocotools' own arrays under NumPy 2; the user can do nothing about it.
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco.annToMask(annotation).view(bool)


@contextlib.contextmanager
def _format_errors(path: Path) -> Iterator[None]:
    """Turn what reading a file of another format raises into one InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            f"{path} isn't an instances file of COCO ({_reason(error)}); fetch it again"
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error} in it"
    return " ".join(str(error).split()) or type(error).__name__


def _find(
    paths: Sequence[Path], files: Iterable[Instances], stack: contextlib.ExitStack
) -> dict[str, tuple[Archive, str]]:
    """Return archive and member of every image; `stack` closes the archives."""
    needed = {file for instances in files for file in instances.files.values()}
    found: dict[str, tuple[Archive, str]] = {}
    for path in paths:
        archive = stack.enter_context(open_archive(path, lambda n: _last(n) in needed))
        for member in archive:
            if _last(member) in found:
                first, where = found[_last(member)]
                raise InputError(
                    f"{first.where(where)} and {archive.where(member)} share a name; "
                    "give only the folders or archives that are needed"
                )
            found[_last(member)] = archive, member
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


def _estimate(images: Sequence[tuple[Archive, str]]) -> int:
    """Return about how many bytes all images have; sizes of members aren't listed."""
    sample = images[:: -(-len(images) // SAMPLED_IMAGES)]
    seen = sum(len(archive[member]) for archive, member in sample)
    return seen * len(images) // len(sample)


def _facts(
    release: str, files: Mapping[str, Instances], images: Sequence[Path]
) -> dict[str, Any]:
    counts = {split: len(instances.files) for split, instances in files.items()}
    whole = RELEASE_IMAGES[release]
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

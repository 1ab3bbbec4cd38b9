"""The official archives of PASCAL-5i and COCO-20i: `qpenet prepare ... --download`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qpenet_jax.core.download import check_download_room, download
from qpenet_jax.core.files import locked, write_whole
from qpenet_jax.data.prepare.archives import open_archive

COCO_SERVER = "http://images.cocodataset.org"


class Published(NamedTuple):
    """An archive that its authors publish."""

    url: str
    checksum: str
    size: int
    """Bytes."""


PASCAL_ARCHIVES = (
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

COCO_ARCHIVES = {
    "2014": (
        Published(
            f"{COCO_SERVER}/zips/train2014.zip",
            "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
            13_510_573_713,
        ),
        Published(
            f"{COCO_SERVER}/zips/val2014.zip",
            "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
            6_645_013_297,
        ),
        Published(
            f"{COCO_SERVER}/annotations/annotations_trainval2014.zip",
            "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
            252_872_794,
        ),
    ),
    "2017": (
        Published(
            f"{COCO_SERVER}/zips/train2017.zip",
            "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
            19_336_861_798,
        ),
        Published(
            f"{COCO_SERVER}/zips/val2017.zip",
            "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
            815_585_330,
        ),
        Published(
            f"{COCO_SERVER}/annotations/annotations_trainval2017.zip",
            "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
            252_907_541,
        ),
    ),
}
"""Images of both splits and annotations, with the SHA-256 that TFDS publishes."""


def download_archives(folder: Path, archives: Sequence[Published]) -> list[Path]:
    """Fetches archives into `folder` under their own names; resumes a download.

    Raises:
        InputError: too little free disk, another process is downloading into `folder`,
            or as `qpenet_jax.core.download.download`.
    """
    paths = [folder / archive.url.rpartition("/")[2] for archive in archives]
    # Two processes would append to the same half-fetched files.
    busy = (
        f"{folder}: another process is downloading into this folder; wait until it "
        "has finished, or choose another --out"
    )
    with locked(folder / ".lock", busy):
        sizes = (archive.size for archive in archives)
        check_download_room(dict(zip(paths, sizes, strict=True)))
        for path, archive in zip(paths, archives, strict=True):
            download(archive.url, path, archive.checksum)
    return paths


def unpack_annotations(archive: Path) -> list[Path]:
    """Writes COCO's annotation files of train and val beside their archive."""
    with open_archive(archive) as members:
        names = [n for n in sorted(members) if n.startswith("annotations/instances_")]
        paths = [archive.with_name(Path(name).name) for name in names]
        for path, name in zip(paths, names, strict=True):
            write_whole(path, members[name])
    return paths

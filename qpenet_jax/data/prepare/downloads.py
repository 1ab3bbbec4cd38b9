"""The official archives of PASCAL-5i and COCO-20i: `qpenet prepare ... --download`."""

import contextlib
from pathlib import Path

from qpenet_jax.core.download import check_download_room, download
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import locked, write_whole
from qpenet_jax.data.prepare.archives import open_archive

PASCAL_ARCHIVES = {
    "VOCtrainval_11-May-2012.tar": (
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "md5:6cd6e144f989b92b3379bac3b3de84fd",
        1_999_639_040,
    ),
    "benchmark.tgz": (
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
        "semantic_contours/benchmark.tgz",
        "md5:82b4d87ceb2ed10f6038a1cba92111cb",
        1_420_000_000,
    ),
}
"""URL, MD5 (as torchvision publishes it) and bytes (SBD: about) of VOC 2012 and SBD."""

COCO_SERVER = "http://images.cocodataset.org"

COCO_ARCHIVES = {
    "2014": {
        "zips/train2014.zip": (
            13_510_573_713,
            "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        ),
        "zips/val2014.zip": (
            6_645_013_297,
            "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
        ),
        "annotations/annotations_trainval2014.zip": (
            252_872_794,
            "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
        ),
    },
    "2017": {
        "zips/train2017.zip": (
            19_336_861_798,
            "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        ),
        "zips/val2017.zip": (
            815_585_330,
            "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        ),
        "annotations/annotations_trainval2017.zip": (
            252_907_541,
            "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        ),
    },
}
"""Bytes and SHA-256 of the official files, as TFDS publishes them."""


def download_pascal(folder: str | Path) -> tuple[Path, Path]:
    """Fetches the official archives, 2.0 and 1.4 GB, into `folder` and returns both.

    Raises:
        InputError: as `qpenet_jax.core.download.download`; another process is
            downloading into `folder`.
    """
    folder = Path(folder)
    with _alone(folder):
        archives = PASCAL_ARCHIVES
        check_download_room({folder / name: a[2] for name, a in archives.items()})
        voc, sbd = (
            download(url, folder / name, checksum)
            for name, (url, checksum, _) in archives.items()
        )
    return voc, sbd


def download_coco(folder: Path, release: str) -> tuple[list[Path], list[Path]]:
    """Fetches what `prepare_coco` needs of "2014" or "2017"; resumes a download.

    Returns the zips of images, which needn't be unpacked, and the annotation files.

    Raises:
        InputError: no such release, too little free disk, another process is
            downloading into `folder`, or as `download`.
    """
    if release not in COCO_ARCHIVES:
        known = " or ".join(COCO_ARCHIVES)
        raise InputError(f"COCO release {release!r}: choose {known}")
    folder = Path(folder)
    table = COCO_ARCHIVES[release]
    archives = {folder / Path(name).name: name for name in table}
    with _alone(folder):
        check_download_room({path: table[name][0] for path, name in archives.items()})
        for path, name in archives.items():
            download(f"{COCO_SERVER}/{name}", path, f"sha256:{table[name][1]}")
        *images, annotations = archives
        unpacked = _unpacked(annotations, folder, release)
    return images, unpacked


def _unpacked(annotations: Path, folder: Path, release: str) -> list[Path]:
    """Writes the annotation files of both splits out of their archive."""
    paths = [folder / f"instances_{split}{release}.json" for split in ("train", "val")]
    with open_archive(annotations) as archive:
        for path in paths:
            write_whole(path, archive[f"annotations/{path.name}"])
    return paths


def _alone(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps another process from appending to the same half-fetched files."""
    return locked(
        folder / ".lock",
        f"{folder}: another process is downloading into this folder; wait until it "
        "has finished, or choose another --out",
    )

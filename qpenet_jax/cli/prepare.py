"""Make a data set from the official archives or from your own images.

`data/README.md` describes the result.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpenet_jax.cli.options import add, add_flag, add_path
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import refuse_overwriting
from qpenet_jax.core.markdown import table

DOWNLOAD = "first download the official archives into FOLDER/archives"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    kinds = parser.add_subparsers(required=True, metavar="KIND", dest="kind")
    _add_pascal(kinds)
    _add_coco(kinds)
    _add_folder(kinds)


def _add_pascal(kinds) -> None:
    parser = _add_kind(kinds, "pascal", "PASCAL-5i from VOC 2012 and SBD")
    add_path(parser, "--voc", "PATH", "VOCtrainval_11-May-2012.tar, or its folder")
    add_path(parser, "--sbd", "PATH", "benchmark.tgz, or its folder")
    text = "SegmentationClassAug as a folder or an archive, instead of SBD's masks"
    add_path(parser, "--masks", "PATH", text)
    text = (
        "training images: main (5,953 images), trainaug (10,582 images), or a text "
        "file with one image name per line"
    )
    add_path(parser, "--pool", "POOL", text, default="main")
    add_flag(parser, "--download", DOWNLOAD)


def _add_coco(kinds) -> None:
    parser = _add_kind(kinds, "coco", "COCO-20i from COCO's images")
    text = "folders or zip archives with the images"
    add_path(parser, "--images", "PATH", text, nargs="+", default=[])
    text = "the files instances_train*.json and instances_val*.json"
    add_path(parser, "--annotations", "FILE", text, nargs="+", default=[])
    text = "which release --download fetches"
    add(parser, "--release", text, default="2014", choices=("2014", "2017"))
    add_flag(parser, "--download", DOWNLOAD)


def _add_folder(kinds) -> None:
    parser = _add_kind(kinds, "folder", "your own images, masks and class names")
    text = "it holds images/, masks/ and classes.txt"
    add_path(parser, "folder", "FOLDER", text)
    add(parser, "--name", "name of the data set; default: the folder's")


def _add_kind(kinds, name: str, text: str) -> argparse.ArgumentParser:
    description = f"Make {text} into a data set."
    parser = kinds.add_parser(name, help=text, description=description)
    text = "folder below which the data set is written"
    add_path(parser, "--out", "FOLDER", text, default="data")
    return parser


def run(args: argparse.Namespace) -> None:
    """Makes the data set and prints what is in it."""
    make = {"pascal": _pascal, "coco": _coco, "folder": _folder}[args.kind]
    _print_prepared(make(args))


def _pascal(args: argparse.Namespace) -> Path:
    from qpenet_jax.core.download import download_all
    from qpenet_jax.data.prepare.pascal import ARCHIVES, prepare_pascal

    voc, sbd = args.voc, args.sbd
    if args.download:
        voc, sbd = download_all(Path(args.out) / "archives", ARCHIVES)
    if not voc or not (sbd or args.masks):
        raise InputError("give --voc and --sbd (or --masks), or --download")
    _refuse_inputs(args.out, [voc, sbd, args.masks, args.pool])
    return prepare_pascal(voc, sbd, Path(args.out), masks=args.masks, pool=args.pool)


def _coco(args: argparse.Namespace) -> Path:
    from qpenet_jax.core.download import download_all
    from qpenet_jax.data.prepare.coco import ARCHIVES, prepare_coco, unpack_annotations

    images, annotations = [*map(Path, args.images)], [*map(Path, args.annotations)]
    if args.download:
        folder = Path(args.out) / "archives"
        *images, packed = download_all(folder, ARCHIVES[args.release])
        annotations = unpack_annotations(packed)
    if not images or not annotations:
        raise InputError("give --images and --annotations, or --download")
    _refuse_inputs(args.out, [*images, *annotations])
    return prepare_coco(images, annotations, Path(args.out))


def _folder(args: argparse.Namespace) -> Path:
    from qpenet_jax.data.prepare.image_folder import prepare_folder

    folder, out = Path(args.folder), Path(args.out)
    _refuse_inputs(out, [folder / "images", folder / "masks"])
    return prepare_folder(folder, out, name=args.name)


def _refuse_inputs(out: str | Path, inputs: Sequence[str | Path | None]) -> None:
    """Refuses to write a data set among the files that it is made of."""
    refuse_overwriting([Path(out)], [Path(given) for given in inputs if given])


def _print_prepared(folder: Path) -> None:
    """Prints what is in a data set, what is odd about it, and its hash."""
    from qpenet_jax.data.prepare.archives import fingerprint
    from qpenet_jax.data.sources.prepared import Prepared, read_metadata
    from qpenet_jax.data.versions import shared_photos

    metadata = read_metadata(folder)
    # pyright takes a cached_property for no match of a protocol's property.
    splits: dict[str, Any] = {s: Prepared(folder, s) for s in metadata["index"]}
    for split, data in splits.items():
        print(f"{split}: {len(data):,} images")
    for name, value in metadata["facts"].items():
        if name not in ("images", "classes"):  # they stand above and below
            print(f"{name}: {value}")
    print(_class_table(metadata["classes"], splits))
    pixels: Any = sum(data.counts.sum(axis=0) for data in splits.values())
    counted = zip(metadata["classes"], pixels, strict=True)
    absent = [name for name, count in counted if not count]
    if absent:
        print(f"warning: no pixel of {', '.join(absent)}")
    train, val = splits.get("train"), splits.get("val")
    if train and val and (shared := shared_photos(train, val)):
        print(
            f"warning: {len(shared)} image(s) of val are in train as well, such as "
            f"{' = '.join(shared[0])}"
        )
    print(f"sha256: {fingerprint(folder)['sha256']}")
    print(f"prepared; use it with --config.dataset.root={folder}")


def _class_table(classes: Sequence[str], splits: Mapping[str, Any]) -> str:
    """Returns a table: a row a class, images that show it and pixels in each split."""
    head = ["class", *(f"{s} {what}" for s in splits for what in ("images", "pixels"))]
    columns: list[Any] = []
    for data in splits.values():
        columns += [(data.counts > 0).sum(axis=0), data.counts.sum(axis=0)]
    rows = zip(enumerate(classes, 1), *columns, strict=True)
    cells = [[f"{i} {name}", *(f"{n:,}" for n in row)] for (i, name), *row in rows]
    return table(head, cells, numbers=True)

"""`qpenet predict`."""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qpenet_jax.cli.options import WORKDIR, add_overrides, path
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import (
    local_path,
    refuse_overwriting,
    walk,
    write_whole,
)

if TYPE_CHECKING:
    import numpy as np


def add_parser(commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "predict",
        help="segment images, given annotated examples",
        description="Segment in images the object that is marked in annotated "
        "examples. Writes one mask and one overlay for each image.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--workdir", required=True, type=path, metavar="FOLDER", help=WORKDIR
    )
    parser.add_argument(
        "--support",
        required=True,
        action="append",
        metavar="IMAGE:MASK",
        help="an example image and its mask; give the option again for more examples. "
        "The mask is an 8-bit grey or palette image: 0 is background, one other value "
        "is the object. If that value isn't 255, pixels of 255 are ignored",
    )
    parser.add_argument(
        "--query",
        required=True,
        nargs="+",
        type=path,
        metavar="PATH",
        help="images to segment, or folders of images",
    )
    parser.add_argument(
        "--recursive",
        action="store_true",
        help="also segment what lies in subfolders, into subfolders of --out",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=path,
        metavar="FOLDER",
        help="folder for masks and overlays",
    )
    add_overrides(parser)


class Query(NamedTuple):
    """An image to segment, and what its results are called: a path without ending."""

    image: Path
    name: Path


def run(args: argparse.Namespace) -> None:
    """Segment every query image."""
    from tqdm import tqdm

    from qpenet_jax.data.images import image_size, read_image
    from qpenet_jax.evaluation.pictures import overlay
    from qpenet_jax.segmenter import load

    segment = load(args.workdir, args.overrides)
    files = [_support_files(text) for text in args.support]
    supports, masks = zip(*(_read_support(*pair) for pair in files), strict=True)
    queries = _queries(args.query, args.recursive)
    for query in queries:
        image_size(query.image)  # what is no image is told before anything is written
    out = Path(args.out)
    read = [*(file for pair in files for file in pair), *(q.image for q in queries)]
    _refuse_inputs(out, queries, read, args)
    task = segment.learn(supports, masks)
    with tqdm(queries, desc="segmenting", unit="image") as bar:
        for query in bar:
            image = read_image(query.image)
            mask = task(image)
            _save(255 * mask, out / f"{query.name}.png")
            _save(overlay(image, mask), out / f"{query.name}_overlay.jpg")
    print(f"{len(queries)} mask(s) and overlay(s) in {out}")


def _refuse_inputs(
    out: Path, queries: Sequence[Query], read: Sequence[Path], args: argparse.Namespace
) -> None:
    """Refuse results in the place of an image or a mask, or among the queries."""
    results = [
        out / f"{query.name}{ending}"
        for query in queries
        for ending in (".png", "_overlay.jpg")
    ]
    folders = [Path(given) for given in args.query if Path(given).is_dir()]
    for folder in folders:
        if out.exists() and out.samefile(folder):
            raise InputError(
                f"--out {out} is a folder of --query, whose images the results would "
                "replace or join: choose another folder"
            )
    refuse_overwriting(results, [*read, *(folders if args.recursive else [])])


def _save(pixels: "np.ndarray", path: Path) -> None:
    """Write an image whole or not at all."""
    from PIL import Image

    content = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(content, Image.registered_extensions()[path.suffix])
    write_whole(path, content.getvalue())


def _support_files(text: str) -> tuple[Path, Path]:
    image, colon, mask = text.rpartition(":")
    if not colon:
        raise InputError(f"--support {text}: give IMAGE:MASK, such as a.jpg:a.png")
    return local_path(image), local_path(mask)


def _read_support(image: Path, mask: Path) -> tuple["np.ndarray", "np.ndarray"]:
    from qpenet_jax.data.images import (
        check_same_size,
        read_image,
        read_mask,
        warn_of_turn,
    )

    pixels, marked = read_image(image), read_mask(mask)
    check_same_size(marked, pixels.shape[:2], mask)
    warn_of_turn(image, mask)
    return pixels, marked


def _queries(arguments: Sequence[str], recursive: bool) -> list[Query]:
    """Return all images to segment; none of two would be called alike."""
    found = [
        query
        for argument in arguments
        for query in _queries_at(Path(argument), recursive)
    ]
    name, times = Counter(query.name for query in found).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"two query images are called {str(name)!r}: their masks would overwrite "
            "each other; rename one"
        )
    return found


def _queries_at(path: Path, recursive: bool) -> list[Query]:
    """Return an image file, or the image files of a folder; tell what is left out."""
    from qpenet_jax.data.images import IMAGE_SUFFIXES

    if not path.exists():
        raise InputError(f"{path}: no such image or folder")
    if not path.is_dir():
        return [Query(path, Path(path.stem))]
    files = list(walk(path, recursive).values())
    folders = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    skipped = Counter(file.suffix.lower() or "without ending" for file in files)
    for suffix in IMAGE_SUFFIXES:
        skipped.pop(suffix, None)
    told = [f"{count} x {suffix}" for suffix, count in sorted(skipped.items())]
    if folders and not recursive:
        told.append(f"{len(folders)} folder(s): give --recursive")
    hints = [f"left out: {', '.join(told)}"] if told else []
    if not images:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError("; ".join([f"{path} holds no image ({known})", *hints]))
    for hint in hints:
        print(f"{path}: {hint}", file=sys.stderr)
    return [Query(file, file.relative_to(path).with_suffix("")) for file in images]

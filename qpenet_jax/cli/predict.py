"""`qpenet predict`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qpenet_jax.cli.options import WORKDIR, add_overrides
from qpenet_jax.core.errors import InputError

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
    parser.add_argument("--workdir", required=True, metavar="FOLDER", help=WORKDIR)
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
        metavar="PATH",
        help="images to segment, or folders of images",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder for masks and overlays"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Segment every query image."""
    from tqdm import tqdm

    from qpenet_jax.data.images import image_size, read_image
    from qpenet_jax.evaluation.pictures import overlay
    from qpenet_jax.segmenter import load

    segment = load(args.workdir, args.overrides)
    supports, masks = zip(*map(_read_support, args.support), strict=True)
    queries = _query_files(args.query)
    for path in queries:
        image_size(path)  # a file that is no image is told before anything is written
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(queries, desc="segmenting", unit="image") as bar:
        for path in bar:
            query = read_image(path)
            mask = segment(query, supports, masks)
            _save(255 * mask, out / f"{path.stem}.png")
            _save(overlay(query, mask), out / f"{path.stem}_overlay.jpg")
    print(f"{len(queries)} mask(s) and overlay(s) in {out}")


def _save(pixels: "np.ndarray", path: Path) -> None:
    """Write an image whole or not at all."""
    from PIL import Image

    part = path.with_name(f".part_{path.name}")
    Image.fromarray(pixels).save(part)
    part.replace(path)


def _read_support(text: str) -> tuple["np.ndarray", "np.ndarray"]:
    from qpenet_jax.data.images import read_image, read_mask

    image, colon, mask = text.rpartition(":")
    if not colon:
        raise InputError(f"--support {text}: give IMAGE:MASK, such as a.jpg:a.png")
    pixels, marked = read_image(image), read_mask(mask)
    if marked.shape != pixels.shape[:2]:
        raise InputError(
            f"{mask}: mask of {marked.shape[1]}x{marked.shape[0]} pixels for an image "
            f"of {pixels.shape[1]}x{pixels.shape[0]}; make them equal"
        )
    return pixels, marked


def _query_files(arguments: Sequence[str]) -> list[Path]:
    files = [file for argument in arguments for file in _images_at(Path(argument))]
    stems = [file.stem for file in files]
    for stem in stems:
        if stems.count(stem) > 1:
            raise InputError(
                f"two query images are called {stem!r}: their masks would overwrite "
                "each other; rename one"
            )
    return files


def _images_at(path: Path) -> list[Path]:
    """Return an image file, or the image files of a folder."""
    from qpenet_jax.data.images import IMAGE_SUFFIXES

    if not path.exists():
        raise InputError(f"{path}: no such image or folder")
    if not path.is_dir():
        return [path]
    found = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{path} holds no image ({known})")
    return sorted(found)

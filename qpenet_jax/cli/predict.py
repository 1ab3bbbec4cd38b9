"""Segment in images what is marked in annotated examples.

Writes a mask and an overlay for each image, and predictions.json, a summary with a
score for each mask.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qpenet_jax.cli.options import (
    about_segmenter,
    add,
    add_flag,
    add_overrides,
    add_path,
    add_segmenter,
    load_segmenter,
    names,
)
from qpenet_jax.core.choices import MASK_FORMATS
from qpenet_jax.core.errors import InputError, check_choice

if TYPE_CHECKING:
    from qpenet_jax.segmenter import Segmenter


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_segmenter(parser)
    parser.add_argument_group("examples").add_argument(
        "--support",
        required=True,
        action="append",
        metavar="[NAME=]IMAGE:MARKS",
        help="an example image and what is marked in it; give the option again for "
        "more examples, and with other names for several classes. MARKS is a mask "
        "(8-bit grey or palette image: 0 is background, one other value the object; "
        "if that value isn't 255, pixels of 255 are ignored); a JSON file of labelme "
        "or COCO, of which the label NAME is taken, or the only one; "
        "polygon=X,Y,X,Y,...; or box=X,Y,WIDTH,HEIGHT. Polygon and box are in pixels "
        "from the top left corner of the image",
    )
    _add_images(parser.add_argument_group("images to segment"))
    _add_results(parser.add_argument_group("results"))
    add_overrides(parser)


def _add_images(group) -> None:
    text = (
        "images to segment, folders of images, or videos (mp4, avi, mov, mkv), whose "
        "frames are segmented one by one"
    )
    add_path(group, "--query", "PATH", text, required=True, nargs="+")
    text = "also segment what lies in subfolders, into subfolders of --out"
    add_flag(group, "--recursive", text)
    text = (
        "for large images with small objects: segment overlapping squares of so many "
        "pixels of the image, instead of the whole image scaled down"
    )
    add(group, "--tiles", text, int, metavar="PIXELS")
    text = "how much of its side a tile shares with the next"
    add(group, "--tile-overlap", text, float, default=0.25)


def _add_results(group) -> None:
    add_path(group, "--out", "FOLDER", "folder for masks and overlays", required=True)
    text = (
        "png: NAME.png with 0 and 255, or of several classes a palette image, class i "
        "in the order of --support; voc: a palette image in VOC's colours, in the "
        "folder SegmentationClass; coco: coco.json for all images, with run lengths; "
        "coco_polygons: coco_polygons.json, the same with polygons; labelme: NAME.json "
        "with polygons. Several may be given: png,coco"
    )
    add(group, "--format", text, names, default=("png",))
    text = "let masks follow the edges of the image, by a guided filter on colours"
    add_flag(group, "--refine", text)
    text = (
        "also write how probable each class is at every pixel, as grey images of 16 "
        "bits (65535 is 1)"
    )
    add_flag(group, "--probability", text)


def run(args: argparse.Namespace) -> None:
    """Segments every query image by the network or method that is chosen."""
    for name in args.format:
        check_choice("--format ", name, MASK_FORMATS)
    segment(args, load_segmenter(args))


def segment(args: argparse.Namespace, segmenter: "Segmenter") -> None:
    """Segments every query image by a segmenter."""
    from tqdm import tqdm

    from qpenet_jax.masks.annotations import parse_support, read_supports
    from qpenet_jax.masks.queries import find_queries
    from qpenet_jax.masks.tasks import Tiles
    from qpenet_jax.masks.writers import MaskWriter, segment_files

    tiles = Tiles(args.tiles, args.tile_overlap) if args.tiles is not None else None
    supports = [parse_support(text) for text in args.support]
    examples = read_supports(supports)
    queries = find_queries(args.query, args.recursive)
    out, kept = Path(args.out), {"probabilities": args.probability}
    places = [Path(given).resolve() for given in args.query]
    if out.resolve() in places:
        raise InputError(
            f"--out {out} is a folder of --query, whose images the results would "
            "replace or join: choose another folder"
        )
    results = MaskWriter(
        out, tuple(examples), args.format, **kept, about=about_segmenter(args)
    )
    files = [file for support in supports for file in support.files]
    files += [query.path for query in queries]
    # Nothing is written into subfolders whose images are segmented as well.
    files += places if args.recursive else []
    results.refuse_clashes(queries, files)
    tasks = segmenter.learn_classes(examples)

    def find(pixels):
        return tasks.find(pixels, tiles, refine=args.refine, **kept)

    with tqdm(queries, desc="segmenting", unit="image") as bar:
        count = segment_files(find, bar, results)
    print(f"{count} mask(s) and overlay(s) in {out}")

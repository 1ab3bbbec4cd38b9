"""`qpenet convert | describe | evaluate | predict`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.linen.summary import tabulate
from PIL import Image
from tqdm import tqdm

from qpenet_jax.allocator import keep_freed_memory
from qpenet_jax.datasets.images import image_size, read_image, read_mask
from qpenet_jax.errors import InputError, exit_on_input_error
from qpenet_jax.evaluator import Evaluator
from qpenet_jax.experiment import open_run
from qpenet_jax.models.backbone import BACKBONES, backbone
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.segmenter import load
from qpenet_jax.visualize import overlay
from qpenet_jax.weights import convert

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; bad input is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    keep_freed_memory()
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what read-only implies
    with exit_on_input_error():
        args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("qpenet", description="Few-shot segmentation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("convert", _convert, "Convert pretrained backbone weights.")
    sub.add_argument("weights", nargs="?", help=".pth or .safetensors; or downloaded")
    sub.add_argument("--backbone", required=True, choices=BACKBONES)
    sub.add_argument("--out", default="data/weights", help="folder (%(default)s)")

    sub = command("describe", _describe, "Print the layers of QPENet.")
    sub.add_argument("--backbone", default="resnet50", choices=BACKBONES)
    sub.add_argument("--shots", type=int, default=1)
    sub.add_argument("--side", type=int, default=473, help="pixels, 8 n + 1")

    sub = command("evaluate", _evaluate, "Score a run on its novel classes.")
    sub.add_argument("--workdir", required=True, help="of train.py")
    sub.add_argument("--shots", type=_numbers, default=(1,), help="such as 1,5")
    sub.add_argument("--episodes", type=int, help="a seed; default: the config's")
    sub.add_argument("--seeds", type=_numbers, help="such as 0,1,2,3,4")
    sub.add_argument("--scoring", choices=("original", "input", "exact"))
    sub.add_argument(
        "--references",
        action="store_true",
        help="also score the untrained network and the training-free cosine baseline",
    )
    sub.add_argument("--out", help="folder of the results; default: WORKDIR/evaluate")

    sub = command("predict", _predict, "Segment images by annotated examples.")
    sub.add_argument("--workdir", required=True, help="of train.py")
    sub.add_argument(
        "--support",
        required=True,
        action="append",
        metavar="IMAGE:MASK",
        help="an image and its mask, 8-bit grey or palette: one value is the object, "
        "255 beside it is left out; repeat for more shots",
    )
    sub.add_argument("--query", required=True, nargs="+", help="images or a folder")
    sub.add_argument("--out", required=True, help="folder of masks and overlays")
    return parser


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give whole numbers such as 1,5"
        ) from None


def _convert(args: argparse.Namespace) -> None:
    print(convert(args.backbone, args.weights, out_dir=args.out))


def _describe(args: argparse.Namespace) -> None:
    if args.side % 8 != 1 or args.side < 17:
        raise InputError(f"--side {args.side} must be 8 n + 1 and at least 17")
    grid, channels = args.side // 8 + 1, backbone(args.backbone).channels
    support = jnp.zeros((1, args.shots, grid, grid, channels))
    masks = jnp.zeros((1, args.shots, args.side, args.side), jnp.int32)
    describe = tabulate(
        QPENet(),
        jax.random.key(0),
        depth=2,
        console_kwargs={"width": 120, "force_terminal": False},
    )
    print(describe(support, masks, support[:, 0]))


def _evaluate(args: argparse.Namespace) -> None:
    experiment, params = open_run(args.workdir)
    weights = experiment.backbone_weights()
    chosen = {
        "episodes": args.episodes,
        "seeds": args.seeds,
        "scoring": args.scoring,
    }
    changes = {name: value for name, value in chosen.items() if value is not None}
    out = Path(args.out or Path(args.workdir) / "evaluate")
    for shots in args.shots:
        protocol = experiment.protocol(shots=shots, **changes)
        folder = out / f"{shots}shot"
        folder.mkdir(parents=True, exist_ok=True)
        evaluator = Evaluator(experiment, weights, folder, protocol)
        print(f"protocol: {protocol}")
        if args.references:
            evaluator.references()
        evaluator(params)
        print(evaluator.report())
        print(f"written to {folder}")


def _predict(args: argparse.Namespace) -> None:
    segment = load(args.workdir)
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


def _save(pixels: np.ndarray, path: Path) -> None:
    """Write an image whole or not at all."""
    part = path.with_name(f".part_{path.name}")
    Image.fromarray(pixels).save(part)
    part.replace(path)


def _read_support(text: str) -> tuple[np.ndarray, np.ndarray]:
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
    files = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
            if not found:
                raise InputError(f"{path} holds no image ({', '.join(sorted(IMAGES))})")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"{path}: no such image or folder")
    twice = {p.stem for p in files if sum(q.stem == p.stem for q in files) > 1}
    if twice:
        raise InputError(
            f"two queries are called {sorted(twice)[0]!r}: their masks would overwrite "
            "each other; rename one"
        )
    return files


if __name__ == "__main__":
    main()

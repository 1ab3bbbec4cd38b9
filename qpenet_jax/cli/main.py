"""The command `qpenet`: all that isn't training."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.linen.summary import tabulate
from PIL import Image
from tqdm import tqdm

from qpenet_jax.backbones.convert import convert
from qpenet_jax.backbones.registry import BACKBONES, backbone
from qpenet_jax.benchmark.measure import TWIN_VARIANTS
from qpenet_jax.core.errors import InputError, exit_on_input_error
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.runtime import keep_compilations, keep_freed_memory
from qpenet_jax.data.episode_lists import export_episodes, read_episodes
from qpenet_jax.data.episodes import Order, Targets
from qpenet_jax.data.images import IMAGE_SUFFIXES, image_size, read_image, read_mask
from qpenet_jax.data.sources.prepared import read_metadata
from qpenet_jax.data.transforms import Resize
from qpenet_jax.evaluation.compare import compare_results, comparison_table
from qpenet_jax.evaluation.pictures import overlay
from qpenet_jax.evaluation.protocols import (
    PRESETS,
    Scoring,
    check_side,
    of_dataset,
)
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.paper.figures import draw_figures
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.evaluator import Evaluator, folder_name
from qpenet_jax.runs.experiment import Experiment
from qpenet_jax.runs.folder import open_run
from qpenet_jax.segmenter import load


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; bad input is one line on stderr and exit code 2."""
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    args.overrides = overrides
    if overrides and not getattr(args, "config", None):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    keep_freed_memory()
    keep_compilations()
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what read-only implies
    try:
        with exit_on_input_error():
            args.run(args)
    except KeyboardInterrupt:
        print("\nstopped; nothing half-made is left", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("qpenet", description="Few-shot segmentation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("prepare", _prepare_pascal, "Make a data set out of archives.")
    _prepare_parsers(sub)

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
    _protocol_arguments(sub)
    sub.add_argument("--shots", type=_numbers, help="such as 1,5; default: 1")
    sub.add_argument("--episode-list", help="score exactly the episodes of this CSV")
    sub.add_argument(
        "--references",
        action="store_true",
        help="also score the untrained network and the training-free cosine baseline",
    )
    sub.add_argument("--out", help="folder of the results; default: WORKDIR/evaluate")

    sub = command("episodes", _export, "Freeze the episodes of a protocol as CSV.")
    sub.add_argument("action", choices=["export"])
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="of train.py")
    source.add_argument("--config", help="such as configs/pascal_fold0.py")
    _protocol_arguments(sub)
    sub.add_argument("--shots", type=int, default=1)
    sub.add_argument("--out", required=True, help="the file to write")

    sub = command("compare", _compare, "Compare two results on common episodes.")
    sub.add_argument("results", nargs=2, metavar="results.json")
    sub.add_argument(
        "--different-protocols",
        action="store_true",
        help="compare what the protocols have in common",
    )
    sub.add_argument("--out", help="also write this JSON file")

    sub = command("reproduce", _reproduce, "Train and score a table of the paper.")
    sub.add_argument("table", choices=[f"table{i}" for i in range(1, 6)])
    sub.add_argument("--config", required=True, help="the settings of every row")
    sub.add_argument("--workdir", required=True, help="folder of all its runs")
    sub.add_argument("--seeds", type=_numbers, help="of training, such as 0,1,2")
    sub.add_argument("--rows", type=_names, default=(), help="only these variants")
    sub.add_argument("--backbones", type=_names, default=("resnet50", "resnet101"))
    sub.add_argument("--folds", type=_numbers, default=(0, 1, 2, 3))
    sub.add_argument("--dry-run", action="store_true", help="tell the plan and cost")

    sub = command("benchmark", _benchmark, "Measure speed on this machine.")
    kinds = "eval, train, backbone, protocol, data; comma between (eval,train)"
    sub.add_argument("kinds", nargs="?", type=_names, metavar="what", help="as --what")
    sub.add_argument("--what", type=_names, default=("eval", "train"), help=kinds)
    sub.add_argument("--shots", type=_numbers, default=(1,))
    sub.add_argument("--batch", type=_numbers, default=(1, 4), help="episodes a step")
    sub.add_argument("--size", type=int, default=473, help="of the images, in pixels")
    sub.add_argument("--dtype", type=_names, default=("float32",))
    sub.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    sub.add_argument("--weights", default="", help="converted; default: drawn")
    sub.add_argument("--against", choices=["torch"], help="also time PyTorch")
    sub.add_argument(
        "--variants",
        type=_names,
        default=tuple(TWIN_VARIANTS),
        help="of PyTorch, of which the fastest counts; compile takes minutes "
        f"(default: {','.join(TWIN_VARIANTS)})",
    )
    sub.add_argument("--config", help="protocol and data: its images; default: drawn")
    sub.add_argument("--episodes", type=int, help="protocol: so many a seed")
    sub.add_argument(
        "--workers", type=_numbers, default=(0, 1, 2), help="data: so many"
    )
    sub.add_argument("--seconds", type=float, default=20.0, help="a measurement")
    sub.add_argument("--out", help="folder of benchmark.md, .json and .png")

    sub = command("figures", _figures, "Draw episodes: predictions, prototypes, maps.")
    sub.add_argument("--workdir", required=True, nargs="+", help="one run or more")
    sub.add_argument("--episodes", type=_numbers, help="such as 3,17; default: drawn")
    sub.add_argument("--count", type=int, default=6, help="of drawn episodes")
    sub.add_argument("--seed", type=int, default=0, help="of the drawing")
    sub.add_argument("--shots", type=int, default=1)
    sub.add_argument("--out", required=True, help="folder of the figures")

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


def _protocol_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the choice of a protocol, and its fields that may be overridden."""
    sub.add_argument(
        "--protocol", choices=PRESETS, help="default: that of the run's config"
    )
    sub.add_argument("--episodes", type=int, help="a seed")
    sub.add_argument("--seeds", type=_numbers, help="such as 0,1,2,3,4")
    sub.add_argument("--scoring", choices=get_args(Scoring))
    sub.add_argument("--order", choices=get_args(Order), help="of the queries")
    sub.add_argument("--targets", choices=get_args(Targets))
    sub.add_argument("--resize", choices=get_args(Resize))
    sub.add_argument("--side", type=int, help="of the network's input, 8 n + 1")


def _protocol_changes(args: argparse.Namespace) -> dict[str, Any]:
    fields = ("episodes", "seeds", "scoring", "order", "targets", "resize", "side")
    given = {name: getattr(args, name) for name in fields}
    return {name: value for name, value in given.items() if value is not None}


def _prepare_parsers(prepare: argparse.ArgumentParser) -> None:
    """Add `qpenet prepare pascal | coco | folder`."""
    kinds = prepare.add_subparsers(required=True, metavar="KIND")

    def kind(name: str, run: Callable[[argparse.Namespace], None], text: str):
        sub = kinds.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--out", default="data", help="folder (%(default)s)")
        return sub

    sub = kind("pascal", _prepare_pascal, "PASCAL-5i from VOC 2012 and SBD.")
    sub.add_argument("--voc", help="VOCtrainval_11-May-2012.tar, or its folder")
    sub.add_argument("--sbd", help="benchmark.tgz, or its folder")
    sub.add_argument("--masks", help="SegmentationClassAug, folder or archive, for SBD")
    sub.add_argument(
        "--pool",
        default="main",
        help="training images: main (5,953), trainaug (10,582) or a file of ids",
    )
    _download_argument(sub)

    sub = kind("coco", _prepare_coco, "COCO-20i from images and instances.")
    sub.add_argument("--images", nargs="+", default=[], help="folders or zips")
    sub.add_argument("--annotations", nargs="+", default=[], help="instances_*.json")
    sub.add_argument("--release", choices=("2014", "2017"), default="2014")
    _download_argument(sub)

    sub = kind("folder", _prepare_folder, "Your own images, masks and classes.txt.")
    sub.add_argument("folder", help="holds images/, masks/ and classes.txt")
    sub.add_argument("--name", help="default: the folder's")
    sub.add_argument("--val-share", type=float, default=0.2, help="without val.txt")


def _download_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--download",
        action="store_true",
        help="fetch the official archives into OUT/archives first",
    )


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


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _convert(args: argparse.Namespace) -> None:
    print(convert(args.backbone, args.weights, out_dir=args.out))


def _describe(args: argparse.Namespace) -> None:
    check_side(args.side)
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


# What only `prepare` needs (TFDS, scipy, pycocotools) is imported there: a second less
# for all other commands.


def _prepare_pascal(args: argparse.Namespace) -> None:
    from qpenet_jax.data.prepare.pascal import download_pascal, prepare_pascal

    voc, sbd = args.voc, args.sbd
    if args.download:
        voc, sbd = download_pascal(Path(args.out) / "archives")
    if not voc or not (sbd or args.masks):
        raise InputError("give --voc and --sbd (or --masks), or --download")
    folder = prepare_pascal(voc, sbd, Path(args.out), masks=args.masks, pool=args.pool)
    _tell_prepared(folder)


def _prepare_coco(args: argparse.Namespace) -> None:
    from qpenet_jax.data.prepare.coco import download_coco, prepare_coco

    images, annotations = map(Path, args.images), map(Path, args.annotations)
    if args.download:
        images, annotations = download_coco(Path(args.out) / "archives", args.release)
    images, annotations = list(images), list(annotations)
    if not images or not annotations:
        raise InputError("give --images and --annotations, or --download")
    _tell_prepared(prepare_coco(images, annotations, Path(args.out)))


def _prepare_folder(args: argparse.Namespace) -> None:
    from qpenet_jax.data.prepare.folder import prepare_folder

    folder, out = Path(args.folder), Path(args.out)
    _tell_prepared(
        prepare_folder(folder, out, name=args.name, val_share=args.val_share)
    )


def _tell_prepared(folder: Path) -> None:
    metadata = read_metadata(folder)
    for split, index in metadata["index"].items():
        print(f"{split}: {len(index['names']):,} images")
    for name, value in metadata["facts"].items():
        if name != "images":  # their numbers stand above
            print(f"{name}: {value}")
    print(f"prepared; use it with --config.dataset.root={folder}")


def _evaluate(args: argparse.Namespace) -> None:
    experiment, params, step = open_run(args.workdir)
    weights = experiment.backbone_weights()
    val = experiment.dataset("val")
    out = Path(args.out or Path(args.workdir) / "evaluate")
    changes = _protocol_changes(args)
    frozen = None
    if args.episode_list:
        frozen = read_episodes(Path(args.episode_list), val)
        _refuse_overrides(args, ("shots", "episodes", "seeds", "order", "targets"))
    for shots in (1,) if frozen else args.shots or (1,):
        protocol = experiment.protocol(args.protocol, **changes | {"shots": shots})
        folder = out / folder_name(protocol, frozen)
        evaluator = Evaluator(experiment, weights, folder, val, protocol, frozen)
        print(evaluator.describe())
        if args.references:
            evaluator.references()
        evaluator(params, step=step)
        print(evaluator.report())
        print(f"written to {folder}")


def _refuse_overrides(args: argparse.Namespace, names: Sequence[str]) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise InputError(f"--{name} can't be changed: --episode-list settles it")


def _export(args: argparse.Namespace) -> None:
    if args.config:
        experiment = Experiment(load_config(args.config, args.overrides))
    else:
        experiment, *_ = open_run(args.workdir)
    val = experiment.dataset("val")
    changes = _protocol_changes(args) | {"shots": args.shots}
    protocol = experiment.protocol(args.protocol, **changes)
    samplers = experiment.eval_samplers(val, protocol)
    digest = export_episodes(Path(args.out), val, samplers, protocol.episodes)
    print(f"protocol: {of_dataset(protocol, val)}")
    print(f"{len(samplers) * protocol.episodes} episodes in {args.out}")
    print(f"sha256 {digest}")


def _compare(args: argparse.Namespace) -> None:
    a, b = map(Path, args.results)
    result = compare_results(a, b, different_protocols=args.different_protocols)
    print(comparison_table(result))
    if args.out:
        write_json(Path(args.out), result)


def _reproduce(args: argparse.Namespace) -> None:
    from qpenet_jax.paper.reproduce import reproduce  # locks its runs as Unix alone can

    reproduce(
        args.table,
        args.config,
        args.workdir,
        seeds=args.seeds,
        overrides=args.overrides,
        rows=args.rows,
        backbones=args.backbones,
        folds=args.folds,
        dry_run=args.dry_run,
    )


def _figures(args: argparse.Namespace) -> None:
    paths = draw_figures(
        [Path(workdir) for workdir in args.workdir],
        Path(args.out),
        episodes=args.episodes,
        count=args.count,
        seed=args.seed,
        shots=args.shots,
    )
    print(*paths, sep="\n")


def _benchmark(args: argparse.Namespace) -> None:
    from qpenet_jax.benchmark.speed import benchmark
    from qpenet_jax.benchmark.tables import chart, markdown

    experiment = None
    if args.config:
        experiment = Experiment(load_config(args.config, args.overrides))
    result = benchmark(
        args.kinds or args.what,
        shots=args.shots,
        batch=args.batch,
        size=args.size,
        dtype=args.dtype,
        backbone=args.backbone,
        weights=args.weights,
        against=args.against,
        variants=args.variants,
        experiment=experiment,
        episodes=args.episodes,
        workers=args.workers,
        seconds=args.seconds,
    )
    text = markdown(result)
    print(text)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "benchmark.md", text + "\n")
        write_json(out / "benchmark.json", result)
        if result["cases"]:
            chart(result, out / "benchmark.png")


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
            found = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                known = ", ".join(sorted(IMAGE_SUFFIXES))
                raise InputError(f"{path} holds no image ({known})")
            files += sorted(found)
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

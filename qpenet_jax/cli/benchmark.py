"""`qpenet benchmark`."""

import argparse
from pathlib import Path
from typing import Any

from qpenet_jax.cli.options import BACKBONES, add_overrides, names, numbers, path
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import refuse_overwriting
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.datasets import files_read

FILES = ("benchmark.md", "benchmark.json", "benchmark.png")

TORCH_VARIANTS = ("eager", "channels_last", "compile")


def add_parser(commands) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "benchmark",
        help="measure speed and memory on this machine",
        description="Measure speed and memory on this machine, on request beside "
        "PyTorch.",
    )
    parser.set_defaults(run=run)
    kinds = "eval, train, backbone, protocol, data, memory, runtimes, predict"
    parser.add_argument(
        "kinds",
        nargs="?",
        type=names,
        metavar="WHAT",
        help=f"what to measure, separated by commas: {kinds}; default: eval,train",
    )
    parser.add_argument(
        "--what",
        type=names,
        default=("eval", "train"),
        metavar="WHAT",
        help="the same, written as an option",
    )
    _add_sizes(parser)
    _add_torch(parser)
    _add_data(parser)
    parser.add_argument(
        "--out",
        type=path,
        metavar="FOLDER",
        help=f"folder for {', '.join(FILES)}",
    )
    add_overrides(parser)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shots",
        type=numbers,
        default=(1,),
        metavar="K,...",
        help="numbers of support images; default: 1",
    )
    parser.add_argument(
        "--batch",
        type=numbers,
        default=(1, 4),
        metavar="N,...",
        help="numbers of episodes in one step; default: 1,4",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=473,
        metavar="PIXELS",
        help="side of the images; default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        type=names,
        default=("float32",),
        metavar="NAME,...",
        help="number formats: float32, tf32, bfloat16; default: float32",
    )
    parser.add_argument(
        "--backbone",
        choices=BACKBONES,
        default="resnet50",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--released",
        action="store_true",
        help="measure the network that the authors released, not the paper's",
    )
    parser.add_argument(
        "--weights",
        type=path,
        metavar="FILE",
        help="converted weights of the backbone; default: random numbers",
    )


def _add_torch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", choices=["torch"], help="also measure the same network in PyTorch"
    )
    parser.add_argument(
        "--variants",
        type=names,
        default=TORCH_VARIANTS,
        metavar="NAME,...",
        help="ways of running PyTorch, of which the fastest is compared; compile takes "
        f"minutes; default: {','.join(TORCH_VARIANTS)}",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="shortest time for comparing one case; default: %(default)s",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help="protocol and data: a config whose images are used; default: made-up "
        "images",
    )
    parser.add_argument(
        "--episodes",
        type=int,
        metavar="N",
        help="protocol: number of episodes for each seed",
    )
    parser.add_argument(
        "--workers",
        type=numbers,
        default=(0, 1, 2),
        metavar="N,...",
        help="data: numbers of loading processes; default: 0,1,2",
    )
    parser.add_argument(
        "--workdir",
        type=path,
        metavar="FOLDER",
        help="predict: folder of a run; default: the starter",
    )
    parser.add_argument(
        "--photos",
        type=int,
        default=100,
        metavar="N",
        help="predict: number of made-up photos; default: %(default)s",
    )


def run(args: argparse.Namespace) -> None:
    """Measures, print a table, and write it if asked to."""
    from qpenet_jax.benchmark.settings import Settings
    from qpenet_jax.benchmark.speed import benchmark

    settings = Settings(
        args.kinds or args.what,
        shots=args.shots,
        batch=args.batch,
        size=args.size,
        dtype=args.dtype,
        backbone=args.backbone,
        weights=args.weights or "",
        released=args.released,
        against=args.against,
        variants=args.variants,
        episodes=args.episodes,
        workers=args.workers,
        workdir=args.workdir or "",
        photos=args.photos,
        seconds=args.seconds,
    )
    config = _config(args)
    if args.out:
        read = [args.config, args.weights, *(files_read(config) if config else ())]
        results = [Path(args.out) / name for name in FILES]
        refuse_overwriting(results, [Path(given) for given in read if given])
    _tell(benchmark(settings, config), args.out)


def _config(args: argparse.Namespace) -> Any:
    from qpenet_jax.runs.config_files import load_config

    if args.config:
        return complete(load_config(args.config, args.overrides))
    if args.overrides:
        raise InputError(f"{args.overrides[0]} changes a config: give --config as well")
    return None


def _tell(result: dict[str, Any], folder: str | None) -> None:
    from qpenet_jax.benchmark.chart import bar_chart
    from qpenet_jax.benchmark.speed_tables import benchmark_report
    from qpenet_jax.core.files import write_whole
    from qpenet_jax.evaluation.report import write_json

    text = benchmark_report(result)
    if folder:
        report, numbers, chart = (Path(folder) / name for name in FILES)
        write_whole(report, text + "\n")
        write_json(numbers, result)
        if result["cases"]:
            bar_chart(result, chart)
    print(text)

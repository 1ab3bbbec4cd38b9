"""Draw what trained runs do with some episodes: predictions, prototypes and activation
maps, as in the paper's Figs 4 to 6."""

import argparse
from pathlib import Path

from qpenet_jax.cli.options import (
    WORKDIR,
    add_overrides,
    add_path,
    add_shots,
    numbers,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_path(
        parser,
        "--workdir",
        "FOLDER",
        f"{WORKDIR}; several runs are drawn side by side",
        required=True,
        nargs="+",
    )
    parser.add_argument(
        "--episodes",
        type=numbers,
        metavar="N,...",
        help="which episodes, such as 3,17; default: random ones",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=6,
        metavar="N",
        help="how many random episodes; default: %(default)s",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed for choosing random episodes; default: %(default)s",
    )
    add_shots(parser)
    add_path(parser, "--out", "FOLDER", "folder for the figures", required=True)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Draws the figures and prints their paths."""
    from qpenet_jax.paper.figures import draw_figures

    paths = draw_figures(
        [Path(workdir) for workdir in args.workdir],
        Path(args.out),
        episodes=args.episodes,
        count=args.count,
        seed=args.seed,
        shots=args.shots,
        overrides=args.overrides,
    )
    print(*paths, sep="\n")

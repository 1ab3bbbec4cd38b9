"""`qpenet figures`."""

import argparse
from pathlib import Path

from qpenet_jax.cli.options import WORKDIR, add_overrides, add_shots, numbers, path


def add_parser(commands) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "figures",
        help="draw what trained runs do with some episodes",
        description="Draw what trained runs do with some episodes: predictions, "
        "prototypes and activation maps, as in the paper's Figs 4 to 6.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--workdir",
        required=True,
        nargs="+",
        type=path,
        metavar="FOLDER",
        help=f"{WORKDIR}; several runs are drawn side by side",
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
    parser.add_argument(
        "--out",
        required=True,
        type=path,
        metavar="FOLDER",
        help="folder for the figures",
    )
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

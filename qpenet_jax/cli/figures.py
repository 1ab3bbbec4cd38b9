"""Draw what trained runs do with some episodes: predictions, prototypes and activation
maps, as in the paper's Figs 4 to 6."""

import argparse
from pathlib import Path

from qpenet_jax.cli.options import (
    WORKDIR,
    add,
    add_overrides,
    add_path,
    add_shots,
    numbers,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    text = f"{WORKDIR}; several runs are drawn side by side"
    add_path(parser, "--workdir", "FOLDER", text, required=True, nargs="+")
    text = "which episodes, such as 3,17; default: random ones"
    add(parser, "--episodes", text, numbers)
    add(parser, "--count", "how many random episodes", int, default=6)
    add(parser, "--seed", "seed for choosing random episodes", int, default=0)
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

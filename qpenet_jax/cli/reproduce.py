"""Train and score every row of a table of the paper.

The same command goes on after a stop and trains only what is missing.
"""

import argparse
import signal

from qpenet_jax.cli.options import add_overrides, add_path, names, numbers


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("table", choices=[f"table{i}" for i in range(1, 6)])
    add_path(parser, "--config", "FILE", "config that all rows share", required=True)
    add_path(parser, "--workdir", "FOLDER", "folder for all its runs", required=True)
    parser.add_argument(
        "--seeds",
        type=numbers,
        metavar="N,...",
        help="training seeds; default: 0,1,2 for tables 3 to 5, 0 for tables 1 and 2",
    )
    parser.add_argument(
        "--rows",
        type=names,
        default=(),
        metavar="NAME,...",
        help="tables 3 to 5: train only these rows; default: all",
    )
    parser.add_argument(
        "--backbones",
        type=names,
        default=("resnet50", "resnet101"),
        metavar="NAME,...",
        help="tables 1 and 2: default: resnet50,resnet101",
    )
    parser.add_argument(
        "--folds",
        type=numbers,
        default=(0, 1, 2, 3),
        metavar="N,...",
        help="tables 1 and 2: default: 0,1,2,3",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print which runs there would be and how long they would take",
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Trains and scores what is missing, then writes the table."""
    from qpenet_jax.paper.plan import Plan
    from qpenet_jax.paper.reproduce import reproduce

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    plan = Plan(
        args.table,
        args.config,
        args.workdir,
        seeds=args.seeds or (),
        overrides=args.overrides,
        rows=args.rows,
        backbones=args.backbones,
        folds=args.folds,
    )
    reproduce(plan, dry_run=args.dry_run)

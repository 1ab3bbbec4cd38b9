"""`qpenet reproduce`."""

import argparse

from qpenet_jax.cli.options import add_overrides, names, numbers, path


def add_parser(commands) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "reproduce",
        help="train and score a table of the paper",
        description="Train and score every row of a table of the paper. The same "
        "command goes on after a stop and trains only what is missing.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("table", choices=[f"table{i}" for i in range(1, 6)])
    parser.add_argument(
        "--config",
        required=True,
        type=path,
        metavar="FILE",
        help="config that all rows share",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=path,
        metavar="FOLDER",
        help="folder for all its runs",
    )
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

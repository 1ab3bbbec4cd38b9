"""Train and score every row of a table of the paper.

The same command goes on after a stop and trains only what is missing.
"""

import argparse
import dataclasses
import signal

from qpenet_jax.cli.options import (
    add,
    add_flag,
    add_overrides,
    add_path,
    names,
    numbers,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("table", choices=[f"table{i}" for i in range(1, 6)])
    add_path(parser, "--config", "FILE", "config that all rows share", required=True)
    add_path(parser, "--workdir", "FOLDER", "folder for all its runs", required=True)
    text = "training seeds; default: 0,1,2 for tables 3 to 5, 0 for tables 1 and 2"
    add(parser, "--seeds", text, numbers, default=())
    text = "tables 3 to 5: train only these rows; default: all"
    add(parser, "--rows", text, names, default=())
    backbones = ("resnet50", "resnet101")
    add(parser, "--backbones", "tables 1 and 2", names, default=backbones)
    add(parser, "--folds", "tables 1 and 2", numbers, default=(0, 1, 2, 3))
    text = "only print which runs there would be and how long they would take"
    add_flag(parser, "--dry-run", text)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Trains and scores what is missing, then writes the table."""
    from qpenet_jax.paper.plan import Plan
    from qpenet_jax.paper.reproduce import reproduce

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    plan = Plan(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Plan)})
    reproduce(plan, dry_run=args.dry_run)

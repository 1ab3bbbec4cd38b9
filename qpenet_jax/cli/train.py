"""Train a network and score it on its novel classes.

The same command goes on with a run that was stopped.
"""

import argparse
import sys
from pathlib import Path

from qpenet_jax.cli.options import add, add_cluster, add_flag, add_overrides, add_path
from qpenet_jax.core.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    text = "Python file that describes the run, such as configs/quickstart.py"
    add_path(parser, "--config", "FILE", text, required=True)
    text = "folder for checkpoints and results; default: runs/NAME-OF-THE-CONFIG"
    add_path(parser, "--workdir", "FOLDER", text)
    text = (
        "only train for 200 steps, write nothing, and say whether a long run may "
        "start: exit code 0 for yes, 1 for no"
    )
    add_flag(parser, "--check", text)
    text = (
        "also write a trace of so many steps into the workdir, which TensorBoard (its "
        "profile plugin) or xprof opens"
    )
    add(parser, "--profile", text, int, default=0, metavar="STEPS")
    add_cluster(parser)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Trains, or checks the first steps."""
    from qpenet_jax.runs.config_files import load_config

    if args.profile < 0 or (args.profile and args.check):
        raise InputError(
            f"--profile {args.profile}: give the number of steps to trace, 1 or more, "
            "and no --check, which writes nothing"
        )
    config = load_config(args.config, args.overrides)  # before seconds of imports
    from qpenet_jax.core.runtime import keep_compilations
    from qpenet_jax.training import preflight
    from qpenet_jax.training.train import train

    if config.keep_compilations:
        keep_compilations()
    if args.check:
        sys.exit(0 if preflight.check(config) else 1)
    workdir = Path(args.workdir or f"runs/{Path(args.config).stem}")
    train(config, workdir, args.profile)

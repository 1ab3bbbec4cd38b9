"""Measure speed and memory on this machine, on request beside PyTorch."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpenet_jax.benchmark.settings import WHAT, Settings
from qpenet_jax.cli.options import (
    add,
    add_flag,
    add_overrides,
    add_path,
    names,
    numbers,
    path,
)
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import refuse_overwriting

FILES = ("benchmark.md", "benchmark.json")

OPTIONS = [field for field in dataclasses.fields(Settings) if "help" in field.metadata]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "kinds",
        nargs="?",
        type=names,
        metavar="WHAT",
        help=f"what to measure, separated by commas: {', '.join(WHAT)}; default: "
        "eval,train",
    )
    for field in OPTIONS:
        name, text, default = f"--{field.name}", field.metadata["help"], field.default
        if default is False:
            add_flag(parser, name, text)
        else:
            add(parser, name, text, _kind(default), default=default, metavar="VALUE")
    add_path(
        parser,
        "--config",
        "FILE",
        "protocol and data: a config whose images are used; default: made-up images",
    )
    add_path(parser, "--out", "FOLDER", f"folder for {' and '.join(FILES)}")
    add_overrides(parser)


def _kind(default: Any) -> Callable[[str], Any]:
    """Returns how a value is read, by the default of its option."""
    if isinstance(default, tuple):
        return numbers if default and isinstance(default[0], int) else names
    return path if default is None else type(default)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the tables, and writes them if asked to."""
    from qpenet_jax.benchmark.speed import benchmark, benchmark_report
    from qpenet_jax.core.files import write_whole
    from qpenet_jax.evaluation.report import write_json
    from qpenet_jax.runs.datasets import files_read

    given = {field.name: getattr(args, field.name) for field in OPTIONS}
    given |= {"what": args.kinds} if args.kinds else {}
    config = _config(args)
    settings = Settings(**given, config=config)
    if args.out:
        results = [Path(args.out) / name for name in FILES]
        read = [Path(args.config), *files_read(config)] if config else []
        refuse_overwriting(results, read)
    result = benchmark(settings)
    text = benchmark_report(result)
    if args.out:
        report, numbers_file = results
        write_whole(report, text + "\n")
        write_json(numbers_file, result)
    print(text)


def _config(args: argparse.Namespace) -> Any:
    from qpenet_jax.runs.build import complete
    from qpenet_jax.runs.config_files import load_config

    if args.config:
        return complete(load_config(args.config, args.overrides))
    if args.overrides:
        raise InputError(f"{args.overrides[0]} changes a config: give --config as well")
    return None

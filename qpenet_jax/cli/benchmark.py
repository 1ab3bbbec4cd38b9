"""Measure speed and memory on this machine, on request beside PyTorch."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from qpenet_jax.benchmark.settings import WHAT, Settings
from qpenet_jax.cli.options import add_overrides, add_path, names, numbers, path
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import refuse_overwriting

FILES = ("benchmark.md", "benchmark.json", "benchmark.png")

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
        parser.add_argument(f"--{field.name}", **_argument(field))
    add_path(
        parser,
        "--config",
        "FILE",
        "protocol and data: a config whose images are used; default: made-up images",
    )
    add_path(parser, "--out", "FOLDER", f"folder for {', '.join(FILES)}")
    add_overrides(parser)


def _argument(field: dataclasses.Field) -> dict[str, Any]:
    """Returns how argparse reads a field, by the kind of its default."""
    default, text = field.default, field.metadata["help"]
    # Without a value of its own the field has its default.
    found: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if default is False:
        return found | {"action": "store_true"}
    if isinstance(default, tuple):
        kind = numbers if default and isinstance(default[0], int) else names
        default = ",".join(map(str, default))
    else:
        kind = path if default == "" else type(default)
    if default:
        found["help"] = f"{text}; default: {default}"
    return found | {"type": kind, "metavar": "VALUE"}


def run(args: argparse.Namespace) -> None:
    """Measures, prints the tables, and writes them if asked to."""
    from qpenet_jax.benchmark.speed import bar_chart, benchmark, benchmark_report
    from qpenet_jax.core.files import write_whole
    from qpenet_jax.evaluation.report import write_json
    from qpenet_jax.runs.datasets import files_read

    given = {f.name: getattr(args, f.name) for f in OPTIONS if f.name in args}
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
        report, table, chart = results
        write_whole(report, text + "\n")
        write_json(table, result)
        bar_chart(result, chart)
    print(text)


def _config(args: argparse.Namespace) -> Any:
    from qpenet_jax.runs.build import complete
    from qpenet_jax.runs.config_files import load_config

    if args.config:
        return complete(load_config(args.config, args.overrides))
    if args.overrides:
        raise InputError(f"{args.overrides[0]} changes a config: give --config as well")
    return None

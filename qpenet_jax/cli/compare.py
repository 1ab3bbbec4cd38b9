"""Compare two results on the episodes that both scored: paired differences with their
confidence intervals."""

import argparse
from pathlib import Path

from qpenet_jax.cli.options import add_path
from qpenet_jax.core.files import refuse_overwriting


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_path(
        parser,
        "results",
        "results.json",
        "file that training or `qpenet evaluate` has written",
        nargs=2,
    )
    parser.add_argument(
        "--different-protocols",
        action="store_true",
        help="allow results of different protocols",
    )
    add_path(parser, "--out", "FILE", "also write the comparison to this JSON file")


def run(args: argparse.Namespace) -> None:
    """Prints the comparison."""
    from qpenet_jax.evaluation.compare import (
        compare_results,
        comparison_table,
        files_of,
    )
    from qpenet_jax.evaluation.report import write_json

    a, b = map(Path, args.results)
    result = compare_results(a, b, different_protocols=args.different_protocols)
    if args.out:
        out = Path(args.out)
        refuse_overwriting([out], [*files_of(a), *files_of(b)])
        write_json(out, result)
    print(comparison_table(result))

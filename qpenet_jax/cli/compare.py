"""Compare two results on the episodes that both scored: paired differences with their
confidence intervals."""

import argparse
from pathlib import Path

from qpenet_jax.cli.options import add_flag, add_path
from qpenet_jax.core.files import refuse_overwriting


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    text = "file that training or `qpenet evaluate` has written"
    add_path(parser, "results", "results.json", text, nargs=2)
    text = "allow results of different protocols"
    add_flag(parser, "--different-protocols", text)
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

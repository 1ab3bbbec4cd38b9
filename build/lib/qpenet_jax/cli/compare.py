"""`qpenet compare`."""

import argparse
from pathlib import Path


def add_parser(commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "compare",
        help="compare two results on the episodes that both scored",
        description="Compare two results on the episodes that both scored: paired "
        "differences with their confidence intervals.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "results",
        nargs=2,
        metavar="results.json",
        help="file that training or `qpenet evaluate` has written",
    )
    parser.add_argument(
        "--different-protocols",
        action="store_true",
        help="allow results of different protocols",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="also write the comparison to this JSON file"
    )


def run(args: argparse.Namespace) -> None:
    """Print the comparison."""
    from qpenet_jax.evaluation.compare import compare_results, comparison_table
    from qpenet_jax.evaluation.report import write_json

    a, b = map(Path, args.results)
    result = compare_results(a, b, different_protocols=args.different_protocols)
    print(comparison_table(result))
    if args.out:
        write_json(Path(args.out), result)

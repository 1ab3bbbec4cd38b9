"""`qpenet export`."""

import argparse

from qpenet_jax.cli.options import EXPORTED, WORKDIR, add_overrides, numbers, path


def add_parser(commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "export",
        help="write a run's network for other run times",
        description="Write a run's network, with its weights, for other run times. "
        "docs/export.md shows how the files are used.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--workdir", required=True, type=path, metavar="FOLDER", help=WORKDIR
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=EXPORTED,
        help="stablehlo, which JAX alone runs on CPU, GPU and TPU, or onnx",
    )
    parser.add_argument(
        "--shots",
        type=numbers,
        default=(1,),
        metavar="K,...",
        help="numbers of support images; each has a file of its own; default: 1",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=path,
        metavar="FOLDER",
        help="folder to write; it must be empty or new",
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Export and print what was written."""
    from qpenet_jax.runs.export import export

    folder = export(
        args.workdir,
        args.out,
        format=args.format,
        shots=args.shots,
        overrides=args.overrides,
    )
    for file in sorted(folder.iterdir()):
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")

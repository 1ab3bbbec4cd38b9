"""Write a run's network, with its weights, for other run times.

docs/export.md shows how the files are used.
"""

import argparse

from qpenet_jax.cli.options import (
    add,
    add_new_folder,
    add_overrides,
    add_workdir,
    numbers,
)
from qpenet_jax.core.choices import EXPORT_FORMATS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_workdir(parser)
    text = "stablehlo, which JAX alone runs on CPU, GPU and TPU, or onnx"
    add(parser, "--format", text, required=True, choices=EXPORT_FORMATS)
    text = "numbers of support images; each has a file of its own"
    add(parser, "--shots", text, numbers, default=(1,))
    add_new_folder(parser)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Exports and prints what was written."""
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

"""Write a run as a folder that can be shared: parameters, config and model card, in the
layout of the Hugging Face hub.

Every command takes the folder as its --workdir.
"""

import argparse

from qpenet_jax.cli.options import (
    add,
    add_checkpoint,
    add_flag,
    add_new_folder,
    add_workdir,
)
from qpenet_jax.core.choices import STORED_DTYPES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_workdir(parser)
    add_new_folder(parser)
    text = (
        "how the parameters are stored: float32 is exact; in 16 bits they take half "
        "the room and are rounded"
    )
    add(parser, "--dtype", text, default="float32", choices=STORED_DTYPES)
    add_checkpoint(parser)
    text = (
        "also put the backbone's weights into the folder; default: their hash, unless "
        "the run has its own"
    )
    add_flag(parser, "--with-backbone", text)
    text = (
        "licence of the parameters as the hub calls it, such as apache-2.0; default: "
        "the card says that none is stated"
    )
    add(parser, "--license", text, default="")


def run(args: argparse.Namespace) -> None:
    """Publishes and prints where the result is."""
    from qpenet_jax.runs.publish import publish

    folder = publish(
        args.workdir,
        args.out,
        dtype=args.dtype,
        selection=args.checkpoint,
        with_backbone=args.with_backbone,
        license=args.license,
    )
    print(f"{folder}: `hf upload ORG/NAME {folder}` shares it")

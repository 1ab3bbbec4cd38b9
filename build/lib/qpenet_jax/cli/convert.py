"""`qpenet convert`."""

import argparse

from qpenet_jax.cli.options import BACKBONES


def add_parser(commands) -> None:
    """Add the command and its options."""
    text = "convert pretrained backbone weights"
    parser = commands.add_parser(
        "convert", help=text, description=f"{text.capitalize()} from PyTorch to JAX."
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "weights",
        nargs="?",
        help="a .pth or .safetensors file; without it the official file is downloaded",
    )
    parser.add_argument("--backbone", required=True, choices=BACKBONES)
    parser.add_argument(
        "--out",
        default="data/weights",
        metavar="FOLDER",
        help="folder for the converted file; default: %(default)s",
    )


def run(args: argparse.Namespace) -> None:
    """Convert and print where the result is."""
    from qpenet_jax.backbones.convert import convert

    print(convert(args.backbone, args.weights, out_dir=args.out))

"""Print the layers of the network with their shapes and parameters."""

import argparse

from qpenet_jax.cli.options import add, add_shots
from qpenet_jax.core.choices import BACKBONES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    text = "the frozen network below it"
    add(parser, "--backbone", text, default="resnet50", choices=BACKBONES)
    text = (
        "full, released (its authors' network), or a row of the paper's Tables III to "
        "V, such as baseline"
    )
    add(parser, "--variant", text, default="full")
    add_shots(parser)
    text = "side of the square input, 8 n + 1"
    add(parser, "--side", text, int, default=473, metavar="PIXELS")


def run(args: argparse.Namespace) -> None:
    """Prints the table of layers."""
    import jax
    import jax.numpy as jnp
    from flax.linen.summary import tabulate

    from qpenet_jax.backbones.registry import backbone
    from qpenet_jax.core.errors import check_choice
    from qpenet_jax.data.transforms import check_side
    from qpenet_jax.models.released import network as released
    from qpenet_jax.models.variants import VARIANTS

    check_side(args.side)
    check_choice("--variant ", args.variant, (*VARIANTS, released.NAME))
    if args.variant == released.NAME:
        model = released.ReleasedQPENet(backbone(args.backbone).deep)
    else:
        variant = VARIANTS[args.variant]
        model = variant.network(**variant.fields)
    grid, channels = args.side // 8 + 1, backbone(args.backbone).channels
    support = jnp.zeros((1, args.shots, grid, grid, channels))
    masks = jnp.zeros((1, args.shots, args.side, args.side), jnp.int32)
    describe = tabulate(
        model,
        jax.random.key(0),
        depth=2,
        console_kwargs={"width": 120, "force_terminal": False},
    )
    print(describe(support, masks, support[:, 0]))

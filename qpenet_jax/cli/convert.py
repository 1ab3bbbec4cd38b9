"""Convert pretrained backbone weights, or a checkpoint of QPENet's authors, from
PyTorch to JAX.

With --as-run the file is a checkpoint of the released QPENet, which becomes a run that
`qpenet evaluate`, `predict` and the other commands take.
"""

import argparse

from qpenet_jax.cli.options import add, add_overrides, add_path
from qpenet_jax.core.choices import BACKBONES, CHECKPOINT_DATASETS
from qpenet_jax.core.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    text = (
        "a .pth or .safetensors file; without it the official file of the backbone is "
        "downloaded"
    )
    add_path(parser, "weights", "FILE", text, nargs="?")
    add(parser, "--backbone", "what the weights belong to", choices=BACKBONES)
    text = "folder for the converted file; default: data/weights"
    add_path(parser, "--out", "FOLDER", text)
    text = "folder of the run to be made of an authors' checkpoint"
    add_path(parser, "--as-run", "FOLDER", text)
    text = "fold that the checkpoint was trained on, with --as-run"
    add(parser, "--fold", text, int, choices=range(4))
    text = "data set of the checkpoint, with --as-run; default: pascal"
    add(parser, "--dataset", text, choices=CHECKPOINT_DATASETS)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Converts and prints where the result is."""
    as_run = args.as_run is not None
    for name in ("backbone", "out") if as_run else ("fold", "dataset", "overrides"):
        if getattr(args, name) not in (None, []):
            option = args.overrides[0] if name == "overrides" else f"--{name}"
            relation = "can't be given with" if as_run else "belongs to"
            remedy = "leave it out" if as_run else "give both, or neither"
            raise InputError(f"{option} {relation} --as-run: {remedy}")
    if as_run:
        _as_run(args)
        return
    if args.backbone is None:
        raise InputError(
            "give the --backbone that the weights belong to, or --as-run FOLDER for a "
            "checkpoint of QPENet's authors"
        )
    from qpenet_jax.backbones.convert import convert

    print(convert(args.backbone, args.weights, out_dir=args.out or "data/weights"))


def _as_run(args: argparse.Namespace) -> None:
    if args.weights is None or args.fold is None:
        raise InputError("--as-run needs the checkpoint's file and its --fold")
    from qpenet_jax.runs.released_checkpoint import import_checkpoint

    folder = import_checkpoint(
        args.weights,
        args.as_run,
        fold=args.fold,
        dataset=args.dataset or "pascal",
        overrides=args.overrides,
    )
    print(f"{folder}: a run of the released network, with its own backbone")

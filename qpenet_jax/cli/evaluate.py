"""Score a trained run on its novel classes by any protocol."""

import argparse
from pathlib import Path
from typing import Any

from qpenet_jax.cli.options import (
    add,
    add_checkpoint,
    add_cluster,
    add_flag,
    add_overrides,
    add_path,
    add_protocol,
    add_workdir,
    numbers,
    protocol_changes,
)
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import refuse_overwriting


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_workdir(parser)
    text = "numbers of support images, such as 1,5; default: 1"
    add(parser, "--shots", text, numbers)
    text = (
        "score exactly the episodes of this file, written by `qpenet episodes export`, "
        "instead of drawing them"
    )
    add_path(parser, "--episode-list", "FILE", text)
    add_checkpoint(parser)
    text = "also score the untrained network and the training-free cosine baseline"
    add_flag(parser, "--references", text)
    text = "folder for the results; default: the folder evaluate/ of the run"
    add_path(parser, "--out", "FOLDER", text)
    add_protocol(parser)
    add_cluster(parser)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Scores the run once for each number of shots."""
    from qpenet_jax.data.episode_lists import read_episodes
    from qpenet_jax.runs.build import network_name
    from qpenet_jax.runs.datasets import build_dataset, build_protocol, files_read
    from qpenet_jax.runs.evaluator import Evaluator, folder_name
    from qpenet_jax.runs.folder import open_run
    from qpenet_jax.runs.published import is_on_hub
    from qpenet_jax.training.interruptions import read_retries

    if is_on_hub(args.workdir) and not args.out:
        raise InputError(
            f"--workdir {args.workdir} is no folder here: give --out, a folder for the "
            "results"
        )
    opened = open_run(args.workdir, args.overrides, args.checkpoint)
    config, retries = opened.config, read_retries(opened.folder)
    val = build_dataset(config, "val")
    out = Path(args.out or Path(args.workdir) / "evaluate")
    read, frozen = files_read(config), None
    if args.episode_list:
        read = [*read, Path(args.episode_list)]
        frozen = read_episodes(Path(args.episode_list), val)
        for name in ("shots", "episodes", "seeds", "order", "targets"):
            if getattr(args, name) is not None:
                raise InputError(
                    f"--{name} can't be given together with --episode-list, which "
                    "already fixes it: leave out one of the two"
                )
    for shots in (1,) if frozen else args.shots or (1,):
        changes = protocol_changes(args) | {"shots": shots}
        protocol = build_protocol(config, args.protocol, **changes)
        folder = out / folder_name(protocol, frozen)
        if network_name(config, shots) == "fixed QPENet":
            folder = folder.with_name(f"{folder.name}_fixed")
        evaluator = Evaluator(config, opened.weights, folder, val, protocol, frozen)
        if args.checkpoint:
            evaluator = evaluator.of_selection(args.checkpoint)
        refuse_overwriting(evaluator.files, read)
        print(evaluator.describe())
        if args.references:
            evaluator.references()
        facts: dict[str, Any] = {"step": opened.step, "shared": opened.shared}
        facts |= {"retries": retries} if retries else {}
        evaluator.write(evaluator.score(opened.params, **facts))
        print(evaluator.report())
        print(f"written to {folder}")

"""Write the episodes of a protocol into a CSV file, so that other programs can score
the same ones."""

import argparse
from pathlib import Path

from qpenet_jax.cli.options import (
    WORKDIR,
    add_overrides,
    add_path,
    add_protocol,
    add_shots,
    protocol_changes,
)
from qpenet_jax.core.files import refuse_overwriting


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("action", choices=["export"])
    source = parser.add_mutually_exclusive_group(required=True)
    add_path(source, "--workdir", "FOLDER", WORKDIR)
    text = "a config instead of a run, such as configs/pascal_fold0.py"
    add_path(source, "--config", "FILE", text)
    add_shots(parser)
    add_path(parser, "--out", "FILE", "file to write", required=True)
    add_protocol(parser)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Draws the episodes, writes them, prints the protocol and the file's hash."""
    from qpenet_jax.data.episode_lists import export_episodes
    from qpenet_jax.evaluation.protocols import of_dataset
    from qpenet_jax.runs.build import complete
    from qpenet_jax.runs.config_files import load_config
    from qpenet_jax.runs.datasets import (
        build_dataset,
        build_eval_samplers,
        build_protocol,
        files_read,
    )
    from qpenet_jax.runs.folder import CONFIG_FILE, open_run

    out = Path(args.out)
    if args.config:
        config = complete(load_config(args.config, args.overrides))
    else:
        config = open_run(args.workdir, args.overrides).config
    described = Path(args.config or Path(args.workdir) / CONFIG_FILE)
    refuse_overwriting([out], [described, *files_read(config)])
    val = build_dataset(config, "val")
    changes = protocol_changes(args) | {"shots": args.shots}
    protocol = build_protocol(config, args.protocol, **changes)
    samplers = build_eval_samplers(config, val, protocol)
    digest = export_episodes(out, val, samplers, protocol.episodes)
    print(f"protocol: {of_dataset(protocol, val)}")
    print(f"{len(samplers) * protocol.episodes} episodes in {out}")
    print(f"sha256 {digest}")

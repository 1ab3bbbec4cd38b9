"""The command `qpenet`; each of its commands has a file of its own beside this one."""

import argparse
import gc
import importlib
import io
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from qpenet_jax import __version__
from qpenet_jax.cli.options import split_overrides
from qpenet_jax.core.errors import InputWarning, exit_on_input_error

COMMANDS = {
    "train": "train a network and score it",
    "prepare": "make a data set from the official archives or from your own images",
    "convert": "convert pretrained backbone weights, or a checkpoint of QPENet's "
    "authors",
    "describe": "print the layers of the network",
    "evaluate": "score a trained run on its novel classes",
    "episodes": "write the episodes of a protocol into a file",
    "compare": "compare two results on the episodes that both scored",
    "reproduce": "train and score a table of the paper",
    "benchmark": "measure speed and memory on this machine",
    "figures": "draw what trained runs do with some episodes",
    "predict": "segment images, given annotated examples",
    "demo": "a page to mark and segment photos in the browser",
    "publish": "write a run as a folder that can be shared",
    "export": "write a run's network for other run times",
}
"""The modules beside this one and their help; only that of the command is imported.

Each has `add_options(parser)` and `run(args)`; its docstring is its description.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; bad input is one line on stderr and exits code 2."""
    _set_up_terminal()
    try:
        with exit_on_input_error():
            args = parse(sys.argv[1:] if argv is None else argv)
            _set_up_process(args)
            args.run(args)
    except KeyboardInterrupt as stop:
        again = "stopped; no half-written file is left: the command can be run again"
        print(f"\n{str(stop) or again}", file=sys.stderr)
        sys.exit(130)


def program(argv: Sequence[str] | None = None) -> None:
    """Runs one command as all that this process does; see `main`."""
    status: Any = 1  # of an error that nobody foresaw
    try:
        main(argv)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
        raise
    finally:
        # All is done. A Ctrl-C while Python ends would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        gc.collect()  # what a stop cut off in the middle, such as shared memory
        if cluster := sys.modules.get("qpenet_jax.core.cluster"):
            cluster.leave(status)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns a command line's options; bad ones are one line and exit code 2."""
    words, overrides = split_overrides(argv)
    parser = _parser(words)
    args = parser.parse_args(words)
    if overrides and "overrides" not in args:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    args.overrides = overrides
    return args


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser("qpenet", description="Few-shot segmentation with QPENet in JAX.")
    version, text = f"qpenet {__version__}", "show the version and exit"
    parser.add_argument("--version", action="version", version=version, help=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name in [word for word in words[:1] if word in COMMANDS] or COMMANDS:
        module = importlib.import_module(f"qpenet_jax.cli.{name}")
        command = commands.add_parser(
            name, help=COMMANDS[name], description=module.__doc__
        )
        command.set_defaults(run=module.run)
        module.add_options(command)
    return parser


def _set_up_terminal() -> None:
    """Prints what its encoding can't hold as "?", and our warnings as one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    warnings.formatwarning = format_warning


def format_warning(message, category, *place, **line) -> str:
    """Returns a warning as it is printed: one line, if it is about the input."""
    if issubclass(category, InputWarning):
        return f"warning: {message}\n"
    if "PIL" in Path(place[0]).parts:  # of an image whose metadata are damaged
        return f"warning: an image: {message}\n"
    return _python_format(message, category, *place, **line)


_python_format = warnings.formatwarning


def _set_up_process(args: argparse.Namespace) -> None:
    import jax
    from absl import logging

    from qpenet_jax.core import cluster
    from qpenet_jax.core.runtime import (
        check_platform,
        keep_compilations,
        keep_freed_memory,
    )

    jax.config.update("jax_enable_x64", False)  # all that is computed is float32
    keep_freed_memory()
    if "coordinator" in args:  # several processes may share the command
        cluster.join(args.coordinator, args.processes, args.process)
    check_platform()
    if args.command != "train":  # where the config says whether to keep them
        keep_compilations()
    # Orbax reports every step of a save, and logs with its traceback what it raises.
    logging.set_verbosity(logging.FATAL)


class _Parser(argparse.ArgumentParser):
    """Prints what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

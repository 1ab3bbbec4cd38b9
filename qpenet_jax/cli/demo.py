"""Show a page on this machine (127.0.0.1) on which photos are marked with a brush or a
click, and others are segmented.

Needs `pip install 'qpenet-jax[demo]'`.
"""

import argparse

from qpenet_jax.cli.options import (
    about_segmenter,
    add,
    add_flag,
    add_overrides,
    add_segmenter,
    load_segmenter,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_segmenter(parser)
    group = parser.add_argument_group("page")
    add(group, "--port", "where the page is", port, default=7860, metavar="N")
    add_flag(group, "--open", "open the page in the browser")
    add_overrides(parser)


def port(text: str) -> int:
    """Returns a port's number."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 1 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> None:
    """Shows the page until Ctrl-C."""
    from qpenet_jax.demo.serve import check_gradio, serve

    check_gradio()  # before a network is loaded in vain
    segmenter = load_segmenter(args)
    about = about_segmenter(args)
    serve(segmenter, about, port=args.port, open_browser=args.open)

"""Options that several commands share.

Only light modules are imported here and at the top of the commands: with JAX, `qpenet
--help` would take seconds. So the choices of an option are in `core/choices.py`.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from qpenet_jax.core import choices
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path

if TYPE_CHECKING:
    from qpenet_jax.segmenter import Segmenter

WORKDIR = (
    "folder of a trained run, as given to `qpenet train` or written by `qpenet "
    "publish`, or its name on the Hugging Face hub, org/name or org/name@revision"
)

OVERRIDE = re.compile(r"--?(no)?config\.")


def path(text: str) -> str:
    """Returns the path of a file or folder of this machine, `~` written out."""
    try:
        return str(local_path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def numbers(text: str) -> tuple[int, ...]:
    """Returns whole numbers that are separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give whole numbers such as 1,5"
        ) from None


def names(text: str) -> tuple[str, ...]:
    """Returns words that are separated by commas."""
    return tuple(text.split(","))


METAVARS = {int: "N", float: "SHARE", str: "NAME", numbers: "N,...", names: "NAME,..."}


def add(
    parser: argparse._ActionsContainer,
    name: str,
    text: str,
    kind: Callable[[str], Any] = str,
    **more: Any,
) -> None:
    """Adds an option or argument; the help also shows its default, where it has one."""
    default = more.get("default", ())
    if default not in (None, (), [], ""):
        words = default if isinstance(default, tuple) else (default,)
        text += f"; default: {','.join(map(str, words))}"
    if "choices" not in more:
        more = {"metavar": METAVARS.get(kind)} | more
    parser.add_argument(name, type=kind, help=text, **more)


def add_flag(parser: argparse._ActionsContainer, name: str, text: str) -> None:
    """Adds an option without a value."""
    parser.add_argument(name, action="store_true", help=text)


def add_path(
    parser: argparse._ActionsContainer,
    name: str,
    metavar: str,
    text: str,
    **options: Any,
) -> None:
    """Adds an option, or an argument, whose value is a file or folder."""
    add(parser, name, text, path, metavar=metavar, **options)


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the run a command works on."""
    add_path(parser, "--workdir", "FOLDER", WORKDIR, required=True)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of a run's checkpoint."""
    text = (
        "last, or another selection that config.select_on names, such as novel; "
        "default: the checkpoint that is the run's result"
    )
    add(parser, "--checkpoint", text)


def add_shots(parser: argparse.ArgumentParser) -> None:
    """Adds the number of support images of one episode."""
    add(parser, "--shots", "number of support images", int, default=1)


def add_new_folder(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names a folder which the command makes."""
    text = "folder to write; it must be empty or new"
    add_path(parser, "--out", "FOLDER", text, required=True)


def add_segmenter(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of what segments: a run's network, the starter, prototypes."""
    group = parser.add_argument_group("what segments")
    add_path(group, "--workdir", "FOLDER", f"{WORKDIR}; default: none")
    methods = (
        "qpenet, the trained network of a run, the default with --workdir; starter, "
        "the default without, a small network that comes with this program, in the "
        "mean with prototype; or prototype, which needs no training: a pixel is of the "
        "object if its feature is closer to the mean of the marked pixels than to the "
        "mean of the others"
    )
    add(group, "--method", methods, choices=choices.METHODS)
    backbones = (
        "without --workdir, of method prototype: the network that the features are of: "
        f"{', '.join(choices.BACKBONES)} (the last is the default)"
    )
    group.add_argument(
        "--backbone", choices=choices.BACKBONES, metavar="NAME", help=backbones
    )
    weights = (
        "the weights of --backbone, as `qpenet convert` writes them; "
        "efficientnet_lite0 has its own"
    )
    add_path(group, "--weights", "FILE", weights)


def load_segmenter(args: argparse.Namespace) -> "Segmenter":
    """Returns what `add_segmenter`'s options choose; raises InputError as `load`."""
    from qpenet_jax.segmenter import load

    return load(
        args.workdir,
        args.overrides,
        method=args.method,
        backbone=args.backbone,
        weights=args.weights,
    )


def about_segmenter(args: argparse.Namespace) -> dict[str, str | None]:
    """Returns what a summary says about how its results were made."""
    from qpenet_jax import __version__
    from qpenet_jax.segmenter import chosen_method

    method = chosen_method(args.method, args.workdir, args.backbone or args.weights)
    about = {"version": __version__, "method": method, "run": args.workdir}
    if args.workdir is None:
        about["backbone"] = args.backbone or choices.DEFAULT_BACKBONE
    return about


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of an evaluation protocol, and of its fields."""
    group = parser.add_argument_group(
        "evaluation protocol", "how episodes are drawn and scored"
    )
    text = "a published protocol; default: config.eval.protocol of the run"
    add(group, "--protocol", text, choices=choices.PROTOCOLS)
    add(group, "--episodes", "number of episodes for each seed", int)
    text = "seeds for drawing the episodes, such as 0,1,2,3,4"
    add(group, "--seeds", text, numbers)
    chosen = {
        "--scoring": ("image size at which pixels are counted", choices.Scoring),
        "--order": ("order in which query images are drawn", choices.Order),
        "--targets": (
            "which classes of a query image may be asked for: those with many pixels "
            "(large), or any",
            choices.Targets,
        ),
        "--resize": (
            "how an image is made square: by padding it, or by squashing it",
            choices.Resize,
        ),
    }
    for name, (text, literal) in chosen.items():
        add(group, name, text, choices=get_args(literal))
    text = "side of the network's square input, 8 n + 1, such as 473"
    add(group, "--side", text, int, metavar="PIXELS")


def protocol_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the protocol's fields that were given."""
    fields = ("episodes", "seeds", "scoring", "order", "targets", "resize", "side")
    given = {name: getattr(args, name) for name in fields}
    return {name: value for name, value in given.items() if value is not None}


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Lets a command take fields of the config, as `split_overrides` finds them."""
    parser.set_defaults(overrides=[])
    parser.epilog = (
        "Every field of the config can be changed as well, for example "
        "--config.dataset.root=FOLDER. `qpenet_jax/config.py` describes all fields."
    )


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a process that is one of several."""
    group = parser.add_argument_group(
        "several processes",
        "started by SLURM, Open MPI, on a TPU pod or as a job of Kubernetes, they find "
        "each other; elsewhere each is given all three (docs/scale.md)",
    )
    text = "host of process 0, and a port that is free there"
    add(group, "--coordinator", text, metavar="HOST:PORT")
    add(group, "--processes", "number of processes", int)
    add(group, "--process", "number of this one, from 0 on", int, metavar="I")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words of a command line, and apart from them all `--config.x=y`.

    The value may also be the next word: `--config.x y`.
    """
    rest: list[str] = []
    overrides: list[str] = []
    waiting = False  # the word before was an override without its value
    for word in words:
        is_override = OVERRIDE.match(word) is not None
        is_value = waiting and not word.startswith("--")
        (overrides if is_override or is_value else rest).append(word)
        waiting = is_override and "=" not in word
    return rest, overrides

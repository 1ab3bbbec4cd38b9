"""Runs by the names of a Hugging Face hub: org/name, or org/name@revision."""

import importlib.util
import re
from pathlib import Path

from qpenet_jax.core.errors import InputError

NAME = re.compile(r"([\w.-]+)/[\w.-]+(@[\w./-]+)?")

FILES = ("*.json", "*.safetensors", "*.md")
"""What is fetched; a repository may hold anything beside it."""


def is_on_hub(workdir: str | Path) -> bool:
    """Whether a run is named as on a hub, and there is no such folder here.

    A wrong name in a folder of this machine, such as runs/, is no name of a hub.
    """
    path = Path(workdir)
    match = NAME.fullmatch(path.as_posix())
    return match is not None and not path.exists() and not Path(match[1]).exists()


def run_folder(workdir: str | Path) -> Path:
    """Returns the folder of a run of this machine, or of a copy of one on the hub.

    What was fetched before is not fetched again, and does without a connection.

    Raises:
        InputError: it can't be had from the hub.
    """
    if not is_on_hub(workdir):
        return Path(workdir)
    name, _, revision = Path(workdir).as_posix().partition("@")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"{workdir}: no such folder; to look for it on the Hugging Face hub, run "
            "`pip install huggingface_hub`"
        )
    import huggingface_hub

    try:
        fetched = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=[*FILES]
        )
        return Path(str(fetched))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{workdir}: no such folder, and the Hugging Face hub doesn't give it "
            f"({reason}); check the name, the connection, and whether `hf auth login` "
            "is needed"
        ) from None

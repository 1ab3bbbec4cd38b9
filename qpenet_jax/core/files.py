"""Write files whole or not at all, and look for room first."""

import shutil
from pathlib import Path

from qpenet_jax.core.errors import InputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name, then rename it; makes its folder.

    Raises:
        InputError: the folder can't be made or written to.
    """
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror})") from None


def check_room(folder: Path, needed: int, remedy: str) -> None:
    """Make a folder where `needed` bytes can be written.

    Raises:
        InputError: there is less free space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are "
            f"needed; {remedy}"
        )

"""Paths and files: checked, written whole or not at all, listed, locked."""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock
import platformdirs

from qpenet_jax.core.errors import MAKE_ROOM, NO_ROOM, InputError

ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/")
"""The start of gs://..., https://... and the like; a drive has one letter."""


def local_path(path: str | Path) -> Path:
    """Returns a path of this machine, in which a leading `~` is the home folder.

    Raises:
        InputError: an empty path, an address such as gs://..., or no such home folder.
    """
    text = os.fspath(path)
    if not text:
        raise InputError("a path is empty: give a file or a folder")
    if ADDRESS.match(text):
        raise InputError(
            f"{text}: only files of this machine can be used; copy or mount it"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(
            f"{text}: no such home folder is known; write the whole path"
        ) from None


def refuse_overwriting(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuses to write a file that is read, by whatever name or link it is called.

    An input may be a folder: nothing may be written into it then.

    Raises:
        InputError: naming both.
    """
    read = {_identity(path): path for path in inputs if _identity(path)}
    for output in outputs:
        real = output.resolve()
        for place in (real, *real.parents):
            if source := read.get(_identity(place)):
                raise InputError(
                    f"{output} would be written over the input {source}: choose "
                    "another place for the output"
                    if place == real
                    else f"{output} would be written into {source}, which is read: "
                    "choose another place for the output"
                )


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns what all names of a file or folder share; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all, and makes its folder.

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
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        remedy = f"; {MAKE_ROOM}"
        raise InputError(
            f"{path}: can't be written ({error.strerror})"
            f"{remedy if error.errno in NO_ROOM else ''}"
        ) from None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `folder` when all went well.

    Raises:
        InputError: it exists and isn't empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and isn't empty: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        yield made
        if folder.exists():
            folder.rmdir()
        shutil.move(made, folder)


def walk(folder: Path, recursive: bool = True) -> dict[str, Path]:
    """Returns the files of a folder by their path in it ("sub/a.jpg"), in order.

    With `recursive` also those of the folders in it. Links are followed, to folders
    too; a folder that holds a link to itself is entered once. Hidden files are left
    out (macOS adds "._x.png" beside "x.png").

    Raises:
        InputError: a folder that can't be read, a link to nothing, or a name that isn't
            Unicode.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: can't be read ({error.strerror}); make it readable"
        ) from None

    found = {}
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here, top = Path(place), Path(place).relative_to(folder)
        above = {os.path.realpath(folder / each) for each in (top, *top.parents)}
        folders[:] = [
            name
            for name in folders
            if recursive and os.path.realpath(here / name) not in above
            if not name.startswith(".")
        ]
        for path in (here / name for name in files if not name.startswith(".")):
            name = path.relative_to(folder).as_posix()
            if name != name.encode(errors="ignore").decode():
                raise InputError(f"{name!r} in {folder}: rename it, this isn't Unicode")
            if not path.exists():
                raise InputError(f"{path} is a link to nothing; restore its file")
            if path.is_file():
                found[name] = path
    return dict(sorted(found.items(), key=lambda item: Path(item[0]).parts))


def check_room(folder: Path, needed: int, remedy: str) -> None:
    """Makes a folder, and checks that `needed` bytes are free there.

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


@contextlib.contextmanager
def locked(path: Path, message: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path` for as long as the `with` lasts; makes its folder.

    The operating system frees it when the process ends, however it ends, so a file that
    was left behind locks nobody out. With `wait`, a lock that another process holds is
    waited for, and `message` printed to the standard error.

    Raises:
        InputError: `message`, if another process holds it, without `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise InputError(message) from None
        print(message, file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def cache_folder(name: str) -> Path:
    """Returns the folder where this user's files of one kind are kept between runs.

    The operating system's place for caches (on Linux XDG_CACHE_HOME, or ~/.cache); a
    process without a home folder gets one among the temporary files.
    """
    try:
        base = platformdirs.user_cache_path("qpenet_jax", appauthor=False)
    except RuntimeError:
        base = Path("~")
    if not base.is_absolute():
        base = Path(tempfile.gettempdir()) / "qpenet_jax"
    return base / name

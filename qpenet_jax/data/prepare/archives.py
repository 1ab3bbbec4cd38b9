"""The files of a folder, a tar, a compressed tar or a zip, by their paths.

Nothing is extracted: bytes go from the archive to the reader of the image or label,
so a member's path, whatever it is, never names a file on this disk.
"""

import contextlib
import functools
import gzip
import hashlib
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, TypeVar

from qpenet_jax.core.download import sha256
from qpenet_jax.core.errors import InputError, refused_as
from qpenet_jax.core.files import walk

File = TypeVar("File")

CHUNK = 1 << 20
GZIP_START, ZIP_START = b"\x1f\x8b", b"PK"
DAMAGE_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    RuntimeError,  # zipfile's, for passwords and unknown compressions
    KeyError,  # tarfile's, for a link to what isn't there
)
"""What the standard library raises on archives that are cut off or damaged."""


class Member(NamedTuple):
    """A file in a folder or in an archive: its size and its bytes.

    As a string, how messages name it: a file's whole path, or "archive: a/b.png".
    """

    size: int
    where: str
    load: Callable[[], bytes]

    def read(self) -> bytes:
        """Returns the bytes of the file.

        Raises:
            InputError: it is damaged.
        """
        with _damage_named(self.where):
            return self.load()

    def __str__(self) -> str:
        """Returns how messages name the file."""
        return self.where


class Archive(dict[str, Member]):
    """The files of a folder or an archive by their paths."""

    path: Path

    def __missing__(self, path: str) -> Member:
        """Refuses a path that isn't there.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{self.path} has no member {path}; is it the right and whole archive?"
        )


def unique(named: Iterable[tuple[str, File]]) -> dict[str, File]:
    """Returns files by their names.

    Raises:
        InputError: two have one name, and the second would hide the first.
    """
    found: dict[str, File] = {}
    for name, file in named:
        twin = found.setdefault(name, file)
        if twin is not file:
            raise InputError(f"{twin} and {file} share a name; keep one of them")
    return found


@contextlib.contextmanager
def open_archive(path: str | Path) -> Iterator[Archive]:
    """Opens a folder, .tar, .tar.gz/.tgz or .zip; its files are read when asked for.

    All are read by random access. A compressed tar has none: it is uncompressed into
    a temporary file. Hidden files are left out (macOS adds
    "._x.png" beside "x.png").

    Raises:
        InputError: nothing there; no archive; cut off or damaged; two members of one
            path.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        with _damage_named(str(path)):
            members = _members(path, stack)
            shown = ((n, m) for n, m in members if PurePosixPath(n).name[:1] != ".")
            archive = Archive(unique(shown))
        archive.path = path
        yield archive


def fingerprint(path: str | Path) -> dict[str, str]:
    """Returns the name and SHA-256 of an archive, for the facts of a data set.

    A folder's SHA-256 is that of its files' paths and SHA-256s, hidden files left out.

    Raises:
        InputError: no such folder, or one that can't be read.
    """
    path = Path(path).resolve()
    if path.is_file():
        return {"name": path.name, "sha256": sha256(path)}
    total = hashlib.sha256()
    for name, file in walk(path).items():
        total.update(f"{name}\0{sha256(file)}\n".encode())
    return {"name": path.name, "sha256": total.hexdigest()}


def _members(path: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, Member]]:
    """Yields all files and their paths; `stack` closes what they are read from."""
    if path.is_dir():
        for name, file in walk(path).items():
            yield name, Member(file.stat().st_size, str(file), file.read_bytes)
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder; check the path")
    # The file's name isn't asked: browsers unpack a .tgz and keep its name.
    with path.open("rb") as file:
        start = file.read(2)
    if start == ZIP_START:
        pack = stack.enter_context(zipfile.ZipFile(path))
        for info in pack.infolist():
            name, load = info.filename, functools.partial(pack.read, info)
            if not info.is_dir():
                yield name, Member(info.file_size, f"{path}: {name}", load)
        return
    content: IO[bytes] = stack.enter_context(path.open("rb"))
    if start == GZIP_START:
        with gzip.open(content) as packed:
            content = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            shutil.copyfileobj(packed, content, CHUNK)
        content.seek(0)
    tar = tarfile.TarFile(fileobj=content)
    for info in tar:
        name, load = info.name.removeprefix("./"), functools.partial(_load, tar, info)
        if info.isfile() or info.islnk():  # A hard link is a file by another name.
            yield name, Member(info.size, f"{path}: {name}", load)


def _load(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _damage_named(where: str) -> contextlib.AbstractContextManager[None]:
    """Turns what the standard library raises on damage into one InputError."""
    fault = f"{where}: no archive, cut off or damaged"
    return refused_as(fault, "fetch it again", DAMAGE_ERRORS)

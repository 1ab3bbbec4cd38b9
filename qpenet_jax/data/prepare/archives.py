"""The files of a folder, a tar, a compressed tar or a zip, by their paths.

Nothing is extracted: bytes go from the archive to the reader of the image or label,
so a member's path, whatever it is, never names a file on this disk.
"""

import contextlib
import functools
import gzip
import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from qpenet_jax.core.download import sha256
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import walk

T = TypeVar("T")

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


class Archive:
    """The members of an archive by their paths ("a/b.png"), read when asked for."""

    def __init__(self, path: Path, readers: Mapping[str, Callable[[], bytes]]):
        """Holds a function for every member; `open_archive` makes these."""
        self.path = path
        self._readers = readers

    def __getitem__(self, name: str) -> bytes:
        """Returns the bytes of a member.

        Raises:
            InputError: it is missing or damaged.
        """
        if name not in self._readers:
            raise InputError(
                f"{self.path} has no member {name}; is it the right and whole archive?"
            )
        with _damage_named(self.where(name)):
            return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        """Iterates over the paths of all members; `in` finds one of them."""
        return iter(self._readers)

    def __contains__(self, name: str) -> bool:
        """Returns whether there is such a member."""
        return name in self._readers

    def where(self, name: str) -> str:
        """Returns "archive: member", as messages name a member."""
        return f"{self.path}: {name}"

    def by_stem(self, start: str, ending: str) -> "dict[str, Member]":
        """Returns the members of a start and an ending, by their names without ending.

        Raises:
            InputError: two of one name.
        """
        found: dict[str, Member] = {}
        for name in self:
            if not (name.startswith(start) and name.endswith(ending)):
                continue
            twin = found.setdefault(PurePosixPath(name).stem, Member(self, name))
            if twin.name != name:
                raise InputError(
                    f"{self.path} has two files of one image, {twin.name} and {name}; "
                    "give a folder or archive with one of them"
                )
        return found


class Member(NamedTuple):
    """A file in an archive; as a string "archive: member"."""

    archive: Archive
    name: str

    def read(self) -> bytes:
        """Returns the bytes of the file."""
        return self.archive[self.name]

    def __str__(self) -> str:
        """Returns how messages name the file."""
        return self.archive.where(self.name)


@contextlib.contextmanager
def open_archive(
    path: str | Path, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[Archive]:
    """Opens a folder, .tar, .tar.gz/.tgz or .zip; `wanted(path)` chooses its members.

    Tar and zip are read by random access. A compressed tar has none: it is read once,
    with a progress bar, and the wanted members stay in memory. Hidden files are left
    out (macOS adds "._x.png" beside "x.png").

    Raises:
        InputError: nothing there; no archive; cut off or damaged.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        with _damage_named(str(path)):
            readers = _readers(path, wanted, stack)
        yield Archive(path, readers)


def fingerprint(path: str | Path) -> dict[str, str]:
    """Returns the name and SHA-256 of an archive, for the facts of a data set.

    A folder's SHA-256 is that of its files' paths and SHA-256s, hidden files left out.

    Raises:
        InputError: nothing there.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if path.is_file():
        return {"name": path.name, "sha256": sha256(path)}
    total = hashlib.sha256()
    for name, file in walk(path).items():
        total.update(f"{name}\0{sha256(file)}\n".encode())
    return {"name": path.name, "sha256": total.hexdigest()}


def _readers(
    path: Path, wanted: Callable[[str], bool], stack: contextlib.ExitStack
) -> dict[str, Callable[[], bytes]]:
    """Returns a reader for every wanted member; `stack` closes what they read from."""
    if path.is_dir():
        files = _chosen(path, walk(path).items(), wanted)
        return {name: file.read_bytes for name, file in files}
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder; check the path")
    # The file's name isn't asked: browsers unpack a .tgz and keep its name.
    with path.open("rb") as file:
        start = file.read(2)
    if start == ZIP_START:
        pack = stack.enter_context(zipfile.ZipFile(path))
        infos = ((i.filename, i) for i in pack.infolist() if not i.is_dir())
        members = _chosen(path, infos, wanted)
        return {name: functools.partial(pack.read, info) for name, info in members}
    if start == GZIP_START:
        kept = _read_compressed_tar(path, wanted)
        return {name: functools.partial(bytes, data) for name, data in kept.items()}
    tar = stack.enter_context(tarfile.TarFile(path))
    members = _chosen(path, _files(tar), wanted)
    return {name: functools.partial(_read_member, tar, info) for name, info in members}


def _read_compressed_tar(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    size = path.stat().st_size
    bar = tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True)
    with path.open("rb") as file, bar, gzip.open(file) as unpacked:
        with tarfile.open(fileobj=unpacked, mode="r|") as tar:
            kept = {}
            for name, member in _chosen(path, _files(tar), wanted):
                bar.update(file.tell() - bar.n)
                target = member.linkname.removeprefix("./")
                same = kept.get(target) if member.islnk() else None
                kept[name] = same or _read_member(tar, member)
        while unpacked.read(CHUNK):  # gzip's CRC and length stand at the very end.
            pass
        bar.update(size - bar.n)
    return kept


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yields name and member of all files; a hard link is one by another name."""
    for member in tar:
        if member.isfile() or member.islnk():
            yield member.name.removeprefix("./"), member


def _chosen(
    path: Path, members: Iterable[tuple[str, T]], wanted: Callable[[str], bool]
) -> Iterator[tuple[str, T]]:
    """Yields the wanted members that aren't hidden.

    Raises:
        InputError: two have one name, and the second would hide the first.
    """
    seen = set()
    for name, member in members:
        if name.rpartition("/")[2].startswith(".") or not wanted(name):
            continue
        if name in seen:
            raise InputError(f"{path} has two members {name}; take one of them out")
        seen.add(name)
        yield name, member


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if member.isfile() and len(data) != member.size:
        raise EOFError(f"{len(data)} of {member.size} bytes")
    return data


@contextlib.contextmanager
def _damage_named(where: str) -> Iterator[None]:
    """Turns what the standard library raises on damage into one InputError."""
    try:
        yield
    except DAMAGE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where}: no archive, cut off or damaged ({reason}); fetch it again"
        ) from None

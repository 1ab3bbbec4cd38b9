"""Downloads that go on where an earlier try broke off, with a check of the hash."""

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import check_room, locked

ATTEMPTS = 5
CHUNK = 1 << 16
BAR_BYTES = 50_000_000
"""Hashing a file from this size on, a quarter of a second, shows a progress bar."""


class Published(NamedTuple):
    """An archive that its authors publish, with its size in bytes."""

    url: str
    checksum: str
    size: int


def download_all(folder: Path, archives: Sequence[Published]) -> list[Path]:
    """Fetches archives into `folder` under their own names; resumes a download.

    Raises:
        InputError: too little free disk, another process is downloading into `folder`,
            or as `download`.
    """
    paths = [folder / archive.url.rpartition("/")[2] for archive in archives]
    # Two processes would append to the same half-fetched files.
    busy = (
        f"{folder}: another process is downloading into this folder; wait until it "
        "has finished, or choose another --out"
    )
    with locked(folder / ".lock", busy):
        have = sum(_size(path) + _size(_part(path)) for path in paths)
        needed = sum(archive.size for archive in archives) - have
        check_room(folder, needed, "make room or choose another --out")
        for path, archive in zip(paths, archives, strict=True):
            download(archive.url, path, archive.checksum)
    return paths


def download(url: str, dest: str | Path, checksum: str) -> Path:
    """Fetches `url` into the file `dest`, going on where an earlier try broke off.

    `checksum` is "sha256:..." or "md5:..." in hexadecimal, the start of it being
    enough. The bytes gather in `<dest>.part` until they are whole and right; a file
    with another hash is deleted. A `dest` that is right isn't fetched again.

    Raises:
        InputError: no connection, an HTTP error, or a wrong hash.
    """
    dest = Path(dest)
    algorithm, _, expected = checksum.partition(":")
    if dest.exists() and digest(dest, algorithm).startswith(expected):
        return dest
    part = _part(dest)
    part.parent.mkdir(parents=True, exist_ok=True)
    if not any(_fetch(url, part) for _ in range(ATTEMPTS)):
        raise InputError(
            f"{url} broke off {ATTEMPTS} times, at {_size(part)} bytes now: "
            "run the same command again to go on from there"
        )
    found = digest(part, algorithm)
    if not found.startswith(expected):
        part.unlink()
        raise InputError(
            f"{url}: {algorithm} is {found}, not {expected}; deleted, try again or "
            "give the file yourself"
        )
    os.replace(part, dest)
    return dest


def _fetch(url: str, part: Path) -> bool:
    """Appends what is missing to `part`; returns whether the end was reached."""
    have = _size(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=30
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            part.unlink()  # it isn't the start of this file: begin again
            return False
        raise InputError(f"{url}: HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        raise InputError(
            f"cannot reach {url} ({reason}): get the file in another way and give it"
        ) from None
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server ignores Range and starts again
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True)
        with bar, part.open("ab" if have else "wb") as file:
            for chunk in _received(response):
                file.write(chunk)  # An error of the disk, say a full one, is raised.
                bar.update(len(chunk))
    return total is None or _size(part) == total


def _received(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yields what arrives, until the response ends or breaks off."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while chunk := response.read(CHUNK):
            yield chunk


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    return digest(path, "sha256")


def digest(path: Path, algorithm: str) -> str:
    """Returns the hash of a file in hexadecimal, with a progress bar if it is large."""
    hasher, size = hashlib.new(algorithm, usedforsecurity=False), path.stat().st_size
    title, small = f"hashing {path.name}", size < BAR_BYTES
    with (
        path.open("rb") as file,
        tqdm.wrapattr(file, "read", total=size, desc=title, disable=small) as shown,
    ):
        while chunk := shown.read(16 * CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()

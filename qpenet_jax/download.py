"""Download a file that has a known hash, going on where an earlier try broke off."""

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from qpenet_jax.errors import InputError

ATTEMPTS = 5


def download(
    url: str, dest: str | Path, sha256_prefix: str, progress: bool = True
) -> Path:
    """Fetch `url` into the file `dest`, going on where an earlier try broke off.

    The bytes gather in `<dest>.part` until the SHA-256 starts with `sha256_prefix`;
    a file with another one is deleted. A `dest` that is right is not fetched again.
    Raises InputError without a connection, for HTTP errors and for a wrong hash.
    """
    dest = Path(dest)
    if dest.exists() and sha256(dest).startswith(sha256_prefix):
        return dest
    part = dest.with_name(dest.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if not any(_fetch(url, part, progress) for _ in range(ATTEMPTS)):
        raise InputError(
            f"{url} broke off {ATTEMPTS} times, at {part.stat().st_size} bytes now: "
            "run the same command again to go on from there"
        )
    digest = sha256(part)
    if not digest.startswith(sha256_prefix):
        part.unlink()
        raise InputError(
            f"{url}: SHA-256 is {digest}, not {sha256_prefix}...; deleted, try again "
            "or give the file yourself"
        )
    os.replace(part, dest)
    return dest


def _fetch(url: str, part: Path, progress: bool) -> bool:
    """Append what is missing to `part`; tell whether the end was reached."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=30
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return True  # nothing is left to fetch; the hash will tell
        raise InputError(f"{url}: HTTP {error.code} {error.reason}") from None
    except OSError as error:  # URLError is one
        reason = getattr(error, "reason", error)
        raise InputError(
            f"cannot reach {url} ({reason}): get the file in another way and give it"
        ) from None
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server ignores Range and starts again
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        _copy(response, part, have, total, progress)
    return total is None or part.stat().st_size == total


def _copy(response, part: Path, have: int, total: int | None, progress: bool) -> None:
    """Write the response behind the first `have` bytes, until it ends or breaks."""
    shown = {"desc": part.stem, "unit": "B", "unit_scale": True}
    bar = tqdm(**shown, initial=have, total=total, disable=not progress)
    # a broken connection leaves a short file: the next attempt goes on from there
    broken = contextlib.suppress(OSError, http.client.HTTPException)
    with bar, part.open("ab" if have else "wb") as file, broken:
        while chunk := response.read(1 << 16):
            file.write(chunk)
            bar.update(len(chunk))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

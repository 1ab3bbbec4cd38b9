"""What the tests of `qpenet prepare` share: archives, facts, refusals."""

import io
import json
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from qpenet_jax.core.errors import InputError

Files = dict[str, bytes]


def pack(path: Path, members: Files | Iterable[tuple[str, bytes]]) -> Path:
    """Write a folder, .zip, .tar or .tgz; a list of pairs may name a member twice."""
    pairs = members.items() if isinstance(members, dict) else members
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of names that occur twice
            for name, data in pairs:
                archive.writestr(name, data)
    elif path.suffix:
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
            for name, data in pairs:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in pairs:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def lines(names: Iterable[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def change_a_byte(path: Path) -> None:
    """Replace a file by one of the same size and time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def facts(folder: Path) -> dict:
    return json.loads((folder / "metadata.json").read_text())["facts"]


def pixels_of_classes(label: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(label.ravel(), minlength=256)[1 : classes + 1]


def refusal(prepare: Callable[..., Path], *given, out: Path, **options) -> str:
    """Return the one line that stops preparing, which leaves no data set behind."""
    with pytest.raises(InputError) as error:
        prepare(*given, out=out, **options)
    assert "\n" not in str(error.value)
    assert not list(out.glob("*/*/1.0.0*"))
    return str(error.value)

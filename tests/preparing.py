"""What the tests of `qpenet prepare` share: archives, facts, refusals."""

import hashlib
import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.sources.prepared import Prepared

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


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def lines(names: Iterable[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def change_a_byte(path: Path) -> None:
    """Replace a file by one of the same size and time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write(path: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / path).write_bytes(content)


def cut_off(path: str, end: int) -> Callable[[Path], object]:
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:end])


def without(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).rename(root / "elsewhere")


def facts(folder: Path) -> dict:
    return json.loads((folder / "metadata.json").read_text())["facts"]


def pixels_of_classes(label: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(label.ravel(), minlength=256)[1 : classes + 1]


def check_split(
    folder: Path, split: str, labels: dict[str, np.ndarray], images: Files
) -> Prepared:
    """Compare a split with its labels and image files, its hash with the documented.

    What is compared was pickled, as workers get it, by an object that had read.
    """
    opened, total = Prepared(folder, split), hashlib.sha256()
    opened.image(0)
    data = pickle.loads(pickle.dumps(opened))
    assert data.names == tuple(labels)
    for index, (name, label) in enumerate(labels.items()):
        np.testing.assert_array_equal(data.label(index), label)
        pixels = pixels_of_classes(label, len(data.classes))
        np.testing.assert_array_equal(data.counts[index], pixels)
        with Image.open(io.BytesIO(images[name])) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        np.testing.assert_array_equal(data.image(index), np.array(upright))
        photo = hashlib.sha256(images[name]).hexdigest()
        drawn = hashlib.sha256(label.tobytes()).hexdigest()
        total.update(f"{name}\n{photo}\n{drawn} {label.shape}\n".encode())
        assert data.photos[index] == photo[:16]
    assert data.content == total.hexdigest()
    return data


def refused(message: str, prepare: Callable[..., Path], *given, out: Path, **options):
    """Check the one line that stops preparing, which leaves no data set behind."""
    with pytest.raises(InputError, match=message) as error:
        prepare(*given, out=out, **options)
    assert "\n" not in str(error.value)
    assert not list(out.glob("*/*/1.0.0*"))

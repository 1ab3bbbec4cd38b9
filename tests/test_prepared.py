"""Prepared data sets: what is written is what is read, whole or not at all."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image
from preparing import check_split, refused
from tensorflow_datasets.core import shuffle

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.images import encode_mask
from qpenet_jax.data.prepare import builder
from qpenet_jax.data.prepare.archives import Member
from qpenet_jax.data.prepare.builder import Source, check_user, prepare
from qpenet_jax.data.sources.prepared import Prepared

EXIF_ORIENTATION = 0x0112


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """Images of 30x40, 40x30 upright, in the forms that users have."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)).resize((40, 30))
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = 6
    return {
        "jpeg": encoded(image, "JPEG"),
        "progressive": encoded(image, "JPEG", progressive=True, subsampling=0),
        "grey": encoded(image.convert("L"), "JPEG"),
        "turned": encoded(image.resize((30, 40)), "JPEG", exif=turned),
        "png": encoded(image, "PNG"),
        "grey png": encoded(image.convert("L"), "PNG"),
        "alpha": encoded(image.convert("RGBA"), "PNG"),
        "palette": encoded(image.convert("P"), "PNG"),
    }


def label_of(name: str) -> np.ndarray:
    """Return a label that shows class 1, class 2 and the border, by the name."""
    first = sum(name.encode()) % 20
    label = np.zeros((30, 40), np.uint8)
    label[first : first + 5] = 1
    label[:, first : first + 3] = 2
    label[29] = 255
    return label


def halves(images: dict[str, bytes]) -> dict[str, list[str]]:
    """Two splits; the last two images are for validation."""
    return {"train": list(images)[:-2], "val": list(images)[-2:]}


def member(name: str, data: bytes, size: int = 0) -> Member:
    return Member(size or len(data), name, lambda: data)


def source(photos: dict[str, bytes], **changes) -> Source:
    given = {
        "name": "tiny",
        "config": "main",
        "classes": ("cat", "dog"),
        "splits": halves(photos),
        "images": {name: member(name, data) for name, data in photos.items()},
        "label": lambda name: (label_of(name), name),
        "facts": {"rule": "all", "archives": {"a": "1"}},
    }
    return Source(**given | changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return prepare(source(pictures()), tmp_path_factory.mktemp("data"))


def check_whole(folder: Path, images: dict[str, bytes]) -> None:
    for split, names in halves(images).items():
        check_split(folder, split, {name: label_of(name) for name in names}, images)


def test_read_as_written(tiny, tmp_path):
    """Also where the folder was moved to."""
    check_whole(shutil.copytree(tiny, tmp_path / "elsewhere"), pictures())
    data = Prepared(tiny, "train")
    assert isinstance(data, SegmentationDataset)
    assert len(data) == len(pictures()) - 2
    assert data.classes == ("cat", "dog")
    assert data.version == "tiny/main/1.0.0"
    # The stored bytes are those that came.
    stored = tfds.builder_from_directory(str(tiny)).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    for record, name in zip(stored, data.names, strict=True):
        assert record["name"] == name.encode()
        assert record["image"] == pictures()[name]
    # Any reader gets the numbers of classes: a mask is a grey PNG.
    label = np.arange(256, dtype=np.uint8).reshape(8, 32)
    with Image.open(io.BytesIO(encode_mask(label))) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.array(image), label)


def test_shards_keep_the_order(monkeypatch, tmp_path):
    images = {f"{i}": pictures()["png"] for i in range(13)}
    # As large as if a file held two images of these.
    half = builder.SHARD_BYTES // 2
    large = {name: member(name, data, half) for name, data in images.items()}
    # TFDS's sorting of examples, which needs TensorFlow for large sets, isn't used.
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    folder = prepare(source(images, images=large), tmp_path)
    check_whole(folder, images)
    records = sorted(path.name for path in folder.glob("*train*"))
    assert records == [f"tiny-train.array_record-{i:05d}-of-00006" for i in range(6)]


KILLED = """
import os, signal, sys
from pathlib import Path
from test_prepared import pictures, prepare, source

def label(name):
    if name == "png":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole.label(name)

whole = source(pictures())
prepare(source(pictures(), label=label), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", KILLED, tmp_path]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths})
    assert killed.returncode == -signal.SIGKILL
    left = list((tmp_path / "tiny/main").iterdir())
    assert [path.name[:11] for path in left] == ["incomplete."]
    with pytest.raises(InputError, match="no prepared data set"):
        Prepared(left[0], "train")
    folder = prepare(source(pictures()), tmp_path)
    check_whole(folder, pictures())
    assert list((tmp_path / "tiny/main").iterdir()) == [folder]


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("bad image")])
def test_interrupted_leaves_nothing(error, tmp_path):
    def label(name):
        if name == "png":
            raise error
        return source(pictures()).label(name)

    with pytest.raises(error if isinstance(error, type) else InputError) as raised:
        prepare(source(pictures(), label=label), tmp_path)
    assert "bad image" in str(raised.value) or error is KeyboardInterrupt
    assert list((tmp_path / "tiny/main").iterdir()) == []


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["a", "b", "a"]}, "image a is listed for train and for train"),
        ({"train": ["a"], "val": []}, "split 'val' has no image"),
        (
            {"train": ["b", "a"], "val": ["a"]},
            "image a is listed for train and for val",
        ),
        ({"train": ["a\udce9"]}, r"image 'a\\udce9': rename it"),
    ],
)
def test_bad_splits(splits, message, tmp_path):
    refused(message, prepare, source(pictures(), splits=splits), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_estimate_of_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8))
    data = encoded(image, "JPEG", quality=60)
    big = np.kron(label_of("a"), np.ones((10, 10), np.uint8))
    images = {f"{i}": data for i in range(60)}  # A file is filled up to 64 KiB.
    made = source(
        images,
        splits={"train": list(images)},
        label=lambda name: (big, name),
    )
    folder = prepare(made, tmp_path)
    used = sum(path.stat().st_size for path in folder.iterdir())
    assert made.image_bytes < used < builder.DISK_SPARE * made.image_bytes
    # More than any disk has: nothing is written.
    large = source(pictures()).images | {"png": member("png", b"", 10**18)}
    needy = source(pictures(), images=large)
    with pytest.raises(InputError, match=r"GB are free, 1100000000\.0 GB are needed"):
        prepare(needy, tmp_path / "large")
    assert list((tmp_path / "large").glob("**/*.*")) == []


def test_tfds_is_silent(tmp_path, caplog, capfd):
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # the default; the CLI, in a test, lowers it
    prepare(source(pictures()), tmp_path)
    assert caplog.records == []
    out, bars = capfd.readouterr()
    assert out == ""
    assert {bar.partition(" ")[0] for bar in bars.split("\r") if bar} == {"writing"}
    assert logging.get_verbosity() == logging.WARNING
    logging.set_verbosity(before)


def test_a_user_without_a_name_is_one_line(tmp_path):
    check_user(os.geteuid(), os.getegid())
    for ids in ((987_654_321, os.getegid()), (os.geteuid(), 987_654_321)):
        with pytest.raises(
            InputError, match=r"id 987654321\).* has no name, which TFDS"
        ):
            check_user(*ids)


def test_opening_what_is_not_there(tiny, tmp_path):
    with pytest.raises(InputError, match="no split 'test', only train, val"):
        Prepared(tiny, "test")
    for text in (None, "{", "[]", json.dumps({"classes": []})):
        if text is not None:
            (tmp_path / "metadata.json").write_text(text)
        with pytest.raises(InputError, match="no prepared data set; make it with"):
            Prepared(tmp_path, "train")


def test_lost_and_damaged_records(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "data")
    (records,) = folder.glob("*train*")
    whole = records.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:70_000] + b"?" * 999, None):
        records.unlink()
        if damaged:
            records.write_bytes(damaged)
        with pytest.raises(InputError, match="prepare it again"):
            [Prepared(folder, "train").image(i) for i in range(6)]

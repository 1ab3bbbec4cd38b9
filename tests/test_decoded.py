"""Decoded images: what is mapped is what is decoded, whole or made anew."""

import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from preparing import change_a_byte

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import locked
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.sources.decoded import PIXELS_FILE, SIZES_FILE, Decoded
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.data.versions import dataset_content, dataset_version

CLASSES = ("first", "second", "third")


@pytest.fixture
def dataset(tmp_path, write_voc) -> VOCLayout:
    """20 images of different sizes."""
    return VOCLayout(
        write_voc(tmp_path / "voc", 20, 3), tmp_path / "voc/ids.txt", CLASSES
    )


class Unreadable:
    """A data set of which few images may be decoded."""

    def __init__(self, dataset, readable=()):
        self.classes, self.names = dataset.classes, dataset.names
        self.counts, self._dataset = dataset.counts, dataset
        self._readable = readable

    def __len__(self):
        return len(self.names)

    def image(self, index):
        assert index in self._readable
        return self._dataset.image(index)

    def label(self, index):
        assert index in self._readable
        return self._dataset.label(index)


def equal(decoded, dataset) -> bool:
    return all(
        np.array_equal(decoded.image(i), dataset.image(i))
        and np.array_equal(decoded.label(i), dataset.label(i))
        for i in range(len(dataset))
    )


def folder_of(dataset, root):
    version = dataset_version(dataset)
    return root / "cache" / f"{version}-{dataset_content(dataset)[:16]}"


def test_it_is_the_data_set(dataset, tmp_path):
    """Also as workers get it: a small pickle that maps the file."""
    decoded = Decoded(dataset, tmp_path / "cache")
    assert isinstance(decoded, SegmentationDataset)
    assert len(decoded) == 20
    assert (decoded.classes, decoded.names) == (CLASSES, dataset.names)
    assert (decoded.counts == dataset.counts).all()
    assert dataset_version(decoded) == dataset_version(dataset)
    assert equal(decoded, dataset)
    sizes = [dataset.label(i).shape for i in range(20)]
    assert decoded.sizes.tolist() == list(map(list, sizes))
    bytes_ = sum(4 * height * width for height, width in sizes)
    assert (folder_of(dataset, tmp_path) / PIXELS_FILE).stat().st_size == bytes_
    with pytest.raises(ValueError, match="read-only"):
        decoded.image(3)[0, 0] = 0
    pickled = pickle.dumps(decoded)
    assert len(pickled) < 10_000  # One image has more bytes.
    assert equal(pickle.loads(pickled), dataset)


def test_a_second_opening_decodes_nothing(dataset, tmp_path):
    Decoded(dataset, tmp_path / "cache")
    many = Shapes("train", 100, 32)
    Decoded(many, tmp_path / "cache")  # Beside the other.
    assert equal(Decoded(Unreadable(many), tmp_path / "cache"), many)
    assert equal(Decoded(dataset, tmp_path / "cache"), dataset)


def test_replaced_images_are_decoded(dataset, tmp_path):
    """Under the same name, of the same size and time."""
    first = Decoded(dataset, tmp_path / "cache")
    change_a_byte(tmp_path / "voc/JPEGImages/im_003.jpg")
    replaced = VOCLayout(tmp_path / "voc", tmp_path / "voc/ids.txt", CLASSES)
    decoded = Decoded(replaced, tmp_path / "cache")
    assert equal(decoded, replaced)
    assert not np.array_equal(decoded.image(3), first.image(3))
    # A run that goes on with the older ones isn't disturbed.
    worker = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(worker.image(3), first.image(3))


def test_an_interrupted_run_leaves_nothing_that_is_taken_for_whole(tmp_path):
    dataset, cache = Shapes("train", 40, 40), tmp_path / "cache"
    with pytest.raises(AssertionError):  # The sample can be read, image 5 can't.
        Decoded(Unreadable(dataset, (*range(5), *range(6, 40))), cache)
    folder = folder_of(dataset, tmp_path)
    assert [file.name for file in cache.iterdir()] == [f".{folder.name}.lock"]
    killed = folder.with_name(f".{folder.name}.part")
    killed.mkdir()
    (killed / PIXELS_FILE).write_bytes(b"0")
    assert equal(Decoded(dataset, cache), dataset)
    assert not killed.exists()
    assert sorted(file.name for file in folder.iterdir()) == [PIXELS_FILE, SIZES_FILE]


def test_a_second_process_waits_for_the_first(tmp_path, capfd):
    """It deletes nothing of it, and decodes a sample alone, to find the size."""
    dataset = Shapes("train", 40, 40)
    folder = folder_of(dataset, tmp_path)
    written = Decoded(dataset, tmp_path / "first").folder
    with ThreadPoolExecutor(1) as pool:
        with locked(folder.with_name(f".{folder.name}.lock"), "held"):
            second = pool.submit(
                Decoded, Unreadable(dataset, range(0, 40, 2)), tmp_path / "cache"
            )
            said = ""
            while "waiting for another process" not in said:
                assert not second.done()
                time.sleep(0.01)
                said += capfd.readouterr().err
            shutil.copytree(written, folder)  # The first writes it meanwhile.
        assert equal(second.result(), dataset)


class Large(Unreadable):
    """Labels of terabytes, all of one byte."""

    def label(self, index):
        return np.broadcast_to(np.uint8(0), (10**6, 10**6))


def test_limits_and_what_cant_be_written_are_one_line(dataset, tmp_path):
    with pytest.raises(InputError, match=r"would take .* limit of 0\.0 GB") as error:
        Decoded(dataset, tmp_path / "cache", limit=10_000)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match=r"GB are free.*augment_on=host"):
        Decoded(Large(dataset), tmp_path / "cache", limit=10**15)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"can't be written \(.*augment_on=host"):
        Decoded(dataset, tmp_path / "file")
    dataset.label = lambda index: np.zeros((7, 9), np.uint8)
    with pytest.raises(InputError, match=r"im_000: mask of 9x7 pixels for an image"):
        Decoded(dataset, tmp_path / "cache")
    assert all(file.name.endswith(".lock") for file in (tmp_path / "cache").iterdir())

"""Decoded images: what is mapped is what is decoded, whole or made anew."""

import contextlib
import functools
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.data.loader import load_episode, training_batches
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


def test_a_second_opening_decodes_a_sample_alone(dataset, tmp_path):
    Decoded(dataset, tmp_path / "cache")
    many = Shapes("train", 100, 32)
    Decoded(many, tmp_path / "cache")  # Beside the other.
    sample = range(0, 100, 6)
    assert equal(Decoded(Unreadable(many, sample), tmp_path / "cache"), many)
    assert equal(Decoded(dataset, tmp_path / "cache"), dataset)


@pytest.mark.parametrize("damage", ["no sizes", "broken sizes", "cut", "longer"])
def test_an_incomplete_file_is_made_anew(dataset, tmp_path, damage):
    folder = folder_of(dataset, tmp_path)
    Decoded(dataset, tmp_path / "cache")
    if damage == "no sizes":
        (folder / SIZES_FILE).unlink()
    elif damage == "broken sizes":
        (folder / SIZES_FILE).write_bytes((folder / SIZES_FILE).read_bytes()[:50])
    else:
        with (folder / PIXELS_FILE).open("r+b") as file:
            file.truncate(100 if damage == "cut" else 10_000_000)
    assert equal(Decoded(dataset, tmp_path / "cache"), dataset)
    assert sorted(file.name for file in folder.iterdir()) == [PIXELS_FILE, SIZES_FILE]


def test_other_pixels_of_the_same_names_and_counts_are_noticed(tmp_path):
    dataset = Shapes("train", 20, 40)
    Decoded(dataset, tmp_path / "cache")
    folder = folder_of(dataset, tmp_path)
    pixels = np.fromfile(folder / PIXELS_FILE, np.uint8)
    (255 - pixels).tofile(folder / PIXELS_FILE)
    assert equal(Decoded(dataset, tmp_path / "cache"), dataset)


def test_replaced_images_are_decoded(dataset, tmp_path, capfd):
    """Also one that no sample holds, under the same name, of the same size and time."""
    first = Decoded(dataset, tmp_path / "cache")
    path = tmp_path / "voc/JPEGImages/im_003.jpg"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-40] ^= 8
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    replaced = VOCLayout(tmp_path / "voc", tmp_path / "voc/ids.txt", CLASSES)
    decoded = Decoded(replaced, tmp_path / "cache")
    assert equal(decoded, replaced)
    assert not np.array_equal(decoded.image(3), first.image(3))
    # A run that goes on with the older ones isn't disturbed.
    worker = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(worker.image(3), first.image(3))
    assert "kept" not in capfd.readouterr().err
    Decoded(replaced, tmp_path / "cache")
    assert f"{decoded.folder}: decoded images are kept" in capfd.readouterr().err


def test_an_interrupted_run_leaves_nothing_that_is_taken_for_whole(tmp_path):
    dataset = Shapes("train", 40, 40)
    folder = folder_of(dataset, tmp_path)
    with pytest.raises(AssertionError):  # The sample can be read, image 5 can't.
        Decoded(Unreadable(dataset, (*range(5), *range(6, 40))), tmp_path / "cache")
    assert not list(folder.iterdir())
    (folder / "pixels.bin.part").write_bytes(b"0")  # Of a run that was killed.
    assert equal(Decoded(dataset, tmp_path / "cache"), dataset)
    assert sorted(file.name for file in folder.iterdir()) == [PIXELS_FILE, SIZES_FILE]


DECODING = """
import sys, time
from pathlib import Path
from qpenet_jax.data.sources.decoded import Decoded
from qpenet_jax.data.sources.shapes import Shapes

class Slow(Shapes):
    def image(self, index):
        if index == 5:  # None of the sample: the first images are written.
            Path(sys.argv[2]).touch()
            while not Path(sys.argv[3]).exists():
                time.sleep(0.01)
        return super().image(index)

Decoded(Slow("train", 40, 40), sys.argv[1])
"""


@pytest.mark.slow
def test_a_second_process_waits_for_the_first(tmp_path, capfd):
    """It deletes nothing of it, and decodes a sample alone."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    dataset = Shapes("train", 40, 40)
    part = folder_of(dataset, tmp_path) / f"{PIXELS_FILE}.part"
    command = [sys.executable, "-c", DECODING, tmp_path / "cache", begun, go]
    with subprocess.Popen(command) as first, ThreadPoolExecutor(1) as pool:
        try:
            while not begun.exists():
                assert first.poll() is None
                time.sleep(0.01)
            second = pool.submit(
                Decoded, Unreadable(dataset, range(0, 40, 2)), tmp_path / "cache"
            )
            told = ""
            while "waiting for another process" not in told:
                assert not second.done()
                told += capfd.readouterr().err
            assert part.exists()
        finally:
            go.touch()
        assert first.wait() == 0
        assert equal(second.result(), dataset)
    assert not part.exists()


def test_limits_and_what_cant_be_written_are_one_line(dataset, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"would take .* limit of 0\.0 GB") as error:
        Decoded(dataset, tmp_path / "cache", limit=10_000)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(InputError, match=r"0\.0 GB are free.*augment_on=host"):
            Decoded(dataset, tmp_path / "cache")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        InputError, match=r"can't be written \(.*config.augment_on=host"
    ):
        Decoded(dataset, tmp_path / "file")
    dataset.label = lambda index: np.zeros((7, 9), np.uint8)
    with pytest.raises(InputError, match=r"im_000: mask of 9x7 pixels for an image"):
        Decoded(dataset, tmp_path / "cache")
    assert not list(folder_of(dataset, tmp_path).iterdir())


def test_episodes_are_the_same_in_workers_too(dataset, tmp_path):
    decoded = Decoded(dataset, tmp_path / "cache")
    decoded.image(0)
    pickled = pickle.dumps(decoded)
    assert len(pickled) < 10_000  # One image has more bytes.
    decoded = pickle.loads(pickled)
    assert equal(decoded, dataset)
    sampler = EpisodeSampler(dataset.counts, (1, 2, 3), shots=2, seed=3, min_pixels=9)
    options = {"side": 65, "augmentation": Augmentation(), "seed": 3}
    load = functools.partial(load_episode, decoded, **options)
    stream = training_batches(load, sampler, batch_size=1, workers=1)
    with contextlib.closing(stream) as batches:
        for index in range(3):
            batch = next(batches)
            expected = load_episode(dataset, sampler(index), **options)
            for ours, theirs in zip(batch, expected, strict=True):
                assert np.array_equal(ours[0], theirs)

import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.episodes import EpisodeSampler, eligible_pairs
from qpenet_jax.data.folds import PASCAL_CLASSES, pascal_fold
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.data.versions import shared_photos

NAMES = ("circle", "square", "star")


@pytest.fixture
def root(tmp_path, write_voc) -> Path:
    return write_voc(tmp_path / "voc", images=6, classes=3)


def opened(root: Path, ids: str = "ids.txt") -> VOCLayout:
    return VOCLayout(root, root / ids, NAMES)


def test_reads_images_labels_and_counts(root):
    dataset = opened(root)
    assert len(dataset) == 6
    assert dataset.classes == NAMES
    assert dataset.names[4] == "im_004"
    for i in range(6):
        label = dataset.label(i)
        assert dataset.image(i).shape == (*label.shape, 3)
        assert set(np.unique(label)) == {0, i % 3 + 1, 255}
    # Every label holds one class on a square of 45 pixels.
    expected = np.tile(45 * 45 * np.eye(3, dtype=np.int64), (2, 1))
    assert dataset.counts.dtype == np.int64
    np.testing.assert_array_equal(dataset.counts, expected)


def test_order_is_that_of_the_list(root):
    (root / "two.txt").write_text("im_004\n\n  im_001  \n")
    dataset = opened(root, "two.txt")
    assert dataset.names == ("im_004", "im_001")
    np.testing.assert_array_equal(dataset.counts.argmax(axis=1), [1, 1])


def test_grey_masks_and_other_folders_and_endings(root):
    dataset = opened(root)
    (root / "grey").mkdir()
    (root / "photos").mkdir()
    for i, name in enumerate(dataset.names):
        Image.fromarray(dataset.label(i)).save(root / "grey" / f"{name}.png")
        suffix = ("jpeg", "png")[i % 2]
        Image.fromarray(dataset.image(i)).save(root / "photos" / f"{name}.{suffix}")
    grey = VOCLayout(root, root / "ids.txt", NAMES, images="photos", masks="grey")
    np.testing.assert_array_equal(grey.counts, dataset.counts)
    np.testing.assert_array_equal(grey.image(1), dataset.image(1))
    np.testing.assert_array_equal(grey.label(1), dataset.label(1))


def test_an_id_may_begin_with_a_subfolder(root):
    """As COCO's: images in train2014/ and val2014/, masks in masks/train2014/ ..."""
    coco = root.parent
    (coco / "masks").mkdir()
    (root / "SegmentationClassAug").rename(coco / "masks" / "train2014")
    (root / "JPEGImages").rename(coco / "train2014")
    (coco / "ids.txt").write_text("train2014/im_002\n")
    dataset = VOCLayout(coco, coco / "ids.txt", NAMES, images=".", masks="masks")
    assert dataset.counts.tolist() == [[0, 0, 45 * 45]]
    assert dataset.image(0).shape[:2] == dataset.label(0).shape


def test_a_pickled_copy_brings_its_counts_along(root):
    dataset = opened(root)
    counts = dataset.counts
    copy = pickle.loads(pickle.dumps(dataset))
    for path in (root / "SegmentationClassAug").iterdir():
        path.unlink()
    np.testing.assert_array_equal(copy.counts, counts)


def test_missing_root_and_folders(root, tmp_path):
    with pytest.raises(InputError, match=r"nowhere doesn't exist.*data/README"):
        VOCLayout(tmp_path / "nowhere", root / "ids.txt", NAMES)
    with pytest.raises(InputError, match=r"image folder .*photos doesn't exist"):
        VOCLayout(root, root / "ids.txt", NAMES, images="photos")
    with pytest.raises(InputError, match=r"mask folder .*grey doesn't exist"):
        VOCLayout(root, root / "ids.txt", NAMES, masks="grey")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't read this list"),
        (b"\xff\xfe\x00", "can't read this list"),
        (b"\n \n", "the list is empty"),
        (b"im_000\nim_001\nim_000\n", "id im_000 is listed 2 times"),
        (b"im_000\na/im_001.jpg b/im_001.png\n", "'a/im_001.jpg b/im_001.png' isn't"),
    ],
)
def test_bad_lists(root, content, message):
    if content is not None:
        (root / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"bad\.txt: {message}"):
        opened(root, "bad.txt")


@pytest.mark.parametrize(
    ("kind", "folder", "suffix"),
    [("image", "JPEGImages", ".jpg"), ("mask", "SegmentationClassAug", ".png")],
)
def test_ids_without_a_file(root, kind, folder, suffix):
    for name in ("im_002", "im_004"):
        (root / folder / f"{name}{suffix}").unlink()
    message = rf"no {kind} .*im_002{suffix}.*\(2 of 6 ids have none\)"
    with pytest.raises(InputError, match=message):
        opened(root)


@pytest.mark.parametrize("value", [4, 254])
def test_label_value_that_is_no_class(root, value):
    dataset = opened(root)
    label = dataset.label(3)
    label[0, 0] = value
    path = root / "SegmentationClassAug" / "im_003.png"
    Image.fromarray(label).save(path)
    message = rf"im_003\.png: label value {value} .*0\.\.3 or 255"
    with pytest.raises(InputError, match=message):
        dataset.label(3)
    with pytest.raises(InputError, match=message):
        _ = dataset.counts


def test_255_alone_is_refused_and_masks_that_show_nothing(root):
    folder = root / "SegmentationClassAug"
    for path in folder.iterdir():
        label = np.array(Image.open(path))
        Image.fromarray(np.where(label, 255, 0).astype(np.uint8)).save(path)
    with pytest.raises(
        InputError, match=r"im_000\.png: 255 is its only value beside 0"
    ):
        _ = opened(root).counts
    for path in folder.iterdir():
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    message = r"SegmentationClassAug: no listed mask shows a class; data/README"
    with pytest.raises(InputError, match=message):
        _ = opened(root).counts


def test_label_of_another_size_than_its_image(root):
    dataset = opened(root)
    path = root / "SegmentationClassAug" / "im_003.png"
    Image.fromarray(dataset.label(3)[:-1]).save(path)
    message = r"im_003\.png: mask of \d+x\d+ pixels for an image of \d+x\d+"
    with pytest.raises(InputError, match=message):
        dataset.label(3)
    with pytest.raises(InputError, match=message):
        _ = dataset.counts


@pytest.mark.parametrize("name", ["./im_000", "a/../im_000", "../voc/im_000", "a//b"])
def test_an_id_is_written_in_one_way(root, name):
    """Else one image could be listed twice, or lie elsewhere."""
    (root / "bad.txt").write_text(f"im_000\n{name}\n")
    with pytest.raises(InputError, match=r"bad\.txt: '.*' isn't an image id; write it"):
        opened(root, "bad.txt")


def test_content_is_that_of_the_files(root):
    dataset = opened(root)
    files = [
        [root / "JPEGImages" / f"{n}.jpg", root / "SegmentationClassAug" / f"{n}.png"]
        for n in dataset.names
    ]
    hashes = [[hashlib.sha256(x.read_bytes()).hexdigest() for x in y] for y in files]
    assert dataset.photos == tuple(photo[:16] for photo, _ in hashes)
    image = files[4][0]
    before, content = image.stat(), bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)  # under the same name, of the same size and time
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    other = opened(root)
    assert other.content != dataset.content
    changed = [a != b for a, b in zip(other.photos, dataset.photos, strict=True)]
    assert changed == [False] * 4 + [True, False]
    assert opened(root).content == other.content


def test_photos_that_two_splits_share(root):
    """Found under other names; what isn't listed doesn't count."""
    photo = (root / "JPEGImages/im_001.jpg").read_bytes()
    (root / "JPEGImages/other.jpg").write_bytes(photo)
    mask = (root / "SegmentationClassAug/im_001.png").read_bytes()
    (root / "SegmentationClassAug/other.png").write_bytes(mask)
    (root / "train.txt").write_text("im_000\nim_001\n")
    (root / "val.txt").write_text("im_002\nother\n")
    train, val = opened(root, "train.txt"), opened(root, "val.txt")
    assert shared_photos(train, val) == [("im_001", "other")]
    assert shared_photos(train, val, [1], [0, 1]) == [("im_001", "other")]
    assert shared_photos(train, val, [0], [0, 1]) == []
    assert shared_photos(train, val, [0, 1], [0]) == []
    shapes = Shapes("train", 2, 40)
    assert shared_photos(shapes, val) == shared_photos(train, shapes) == []


# --- The real PASCAL-5i: what the paper's system counts, and the paper's pools ---


@pytest.fixture(scope="module")
def pascal(shared_voc, tmp_path_factory) -> dict[str, VOCLayout]:
    """Both pools with all real masks, which also stand in for the missing images."""
    lists = {
        "train": shared_voc / "lists" / "all_train_5953.txt",
        "val": shared_voc / "lists" / "all_val_1449.txt",
    }
    needed = {name for path in lists.values() for name in path.read_text().split()}
    root = tmp_path_factory.mktemp("voc")
    with tarfile.open(shared_voc / "SegmentationClassAug-all.tar.gz") as archive:
        members = (m for m in archive if Path(m.name).stem in needed)
        archive.extractall(root, members, filter="data")
    masks = "SegmentationClassAug"
    return {
        split: VOCLayout(root, path, PASCAL_CLASSES, images=masks)
        for split, path in lists.items()
    }


@pytest.mark.parametrize(
    ("fold", "images", "pairs"),
    [(0, 364, 365), (1, 445, 467), (2, 592, 734), (3, 336, 357)],
)
def test_pascal_validation_lists(pascal, fold, images, pairs):
    novel = pascal_fold(fold).novel
    sampler = EpisodeSampler(pascal["val"].counts, novel, shots=5, seed=0)
    assert len(sampler) == images
    assert sampler.pairs.sum() == pairs


@pytest.mark.parametrize(
    ("fold", "images", "pairs", "unfiltered"),
    [
        (0, 4208, 5749, 4760),
        (1, 3726, 4706, 4588),
        (2, 2752, 3044, 4097),
        (3, 4510, 5832, 5108),
    ],
)
def test_pascal_training_lists(pascal, fold, images, pairs, unfiltered):
    base, novel = pascal_fold(fold)
    counts = pascal["train"].counts
    sampler = EpisodeSampler(counts, base, shots=5, seed=0, exclude=novel)
    assert len(sampler) == images
    assert sampler.pairs.sum() == pairs
    assert len(EpisodeSampler(counts, base, shots=5, seed=0)) == unfiltered


def test_real_subset(shared_voc):
    dataset = VOCLayout(
        shared_voc / "VOCdevkit" / "VOC2012",
        shared_voc / "lists" / "subset_train.txt",
        PASCAL_CLASSES,
    )
    assert dataset.image(0).shape[:2] == dataset.label(0).shape
    listed = []
    for fold in (1, 2, 3):
        base, novel = pascal_fold(fold)
        filtered = eligible_pairs(dataset.counts, base, exclude=novel)
        unfiltered = eligible_pairs(dataset.counts, base)
        listed.append([pairs.any(axis=1).sum() for pairs in (filtered, unfiltered)])
    assert listed == [[274, 405], [756, 910], [745, 862]]

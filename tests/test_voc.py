import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preparing import change_a_byte, without, write

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.data.versions import shared_photos

NAMES = ("circle", "square", "star")
MASKS = "SegmentationClassAug"


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
    # The order is that of the list.
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


def without_two(folder: str, suffix: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        for name in ("im_002", "im_004"):
            (root / folder / f"{name}{suffix}").unlink()

    return remove


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, r"voc doesn't exist.*data/README"),
        (without("JPEGImages"), r"image folder .*JPEGImages doesn't exist"),
        (without(MASKS), rf"mask folder .*{MASKS} doesn't exist"),
        (
            without_two("JPEGImages", ".jpg"),
            r"no image of im_002 .*g \(2 of 6 are miss",
        ),
        (without_two(MASKS, ".png"), rf"no mask of im_002 in .*/{MASKS} .*\(2 of 6"),
        (without("ids.txt"), r"ids\.txt: no such text file"),
        *(
            (write("ids.txt", content), rf"ids\.txt:? {message}")
            for content, message in (
                (b"\xff\xfe\x00", "no such text file"),
                (b"\n \n", "is empty"),
                (b"im_000\nim_001\nim_000\n", "im_000 is listed 2 times"),
                (b"im_000\na/im_001.jpg b/im_001.png\n", "'a.* b/im_001.png' isn't"),
                # One image could else be listed twice, or lie elsewhere.
                (b"im_000\n./im_000\n", "'./im_000' isn't an image id; write one"),
                (b"im_000\na/../im_000\n", "'a/../im_000' isn't an image id"),
                (b"im_000\n../voc/im_000\n", "'../voc/im_000' isn't an image id"),
                (b"im_000\na//b\n", "'a//b' isn't an image id"),
            )
        ),
    ],
)
def test_bad_lists_and_missing_files_are_named(root, spoil, message):
    spoil(root)
    with pytest.raises(InputError, match=message):
        opened(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + 3 * (x == 1), r"label value 4 .*0\.\.3 or 255"),
        (lambda x: x - 2 * (x == 0), r"label value 254 .*0\.\.3 or 255"),
        (lambda x: x[:-1], r"mask of \d+x\d+ pixels for an image of \d+x\d+"),
        (lambda x: np.where(x, np.uint8(255), x), "255 is its only value beside 0"),
    ],
)
def test_a_bad_label_is_named(root, change, message):
    dataset = opened(root)
    path = root / "SegmentationClassAug" / "im_003.png"
    Image.fromarray(change(dataset.label(3)).astype(np.uint8)).save(path)
    with pytest.raises(InputError, match=rf"im_003\.png: {message}"):
        _ = dataset.counts


def test_masks_that_show_nothing(root):
    for path in (root / "SegmentationClassAug").iterdir():
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    message = r"SegmentationClassAug: no listed mask shows a class; data/README"
    with pytest.raises(InputError, match=message):
        _ = opened(root).counts


def test_content_is_that_of_the_files(root):
    dataset = opened(root)
    files = [
        [root / "JPEGImages" / f"{n}.jpg", root / "SegmentationClassAug" / f"{n}.png"]
        for n in dataset.names
    ]
    hashes = [[hashlib.sha256(x.read_bytes()).hexdigest() for x in y] for y in files]
    assert dataset.photos == tuple(photo[:16] for photo, _ in hashes)
    change_a_byte(files[4][0])
    other = opened(root)
    assert other.content != dataset.content
    changed = [a != b for a, b in zip(other.photos, dataset.photos, strict=True)]
    assert changed == [False] * 4 + [True, False]
    assert opened(root).content == other.content


def test_photos_that_two_splits_share(root):
    """Found under other names; what isn't listed doesn't count."""
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        shutil.copy(
            root / folder / f"im_001.{ending}", root / folder / f"other.{ending}"
        )
    (root / "train.txt").write_text("im_000\nim_001\n")
    (root / "val.txt").write_text("im_002\nother\n")
    train, val = opened(root, "train.txt"), opened(root, "val.txt")
    assert shared_photos(train, val) == [("im_001", "other")]
    assert shared_photos(train, val, [1], [0, 1]) == [("im_001", "other")]
    assert shared_photos(train, val, [0], [0, 1]) == []
    assert shared_photos(train, val, [0, 1], [0]) == []
    shapes = Shapes("train", 2, 40)
    assert shared_photos(shapes, val) == shared_photos(train, shapes) == []

"""PASCAL-5i from archives made here, and the real masks' counts through the same code.

Twelve images of 40x30: VOC train is 1-4, VOC val 5-7, SBD 3-5 and 8-12, of which 8-10
are in ImageSets/Main/train. SBD's masks of 3-5 are all of class 20: VOC's must win.
"""

import functools
import hashlib
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import save_palette
from PIL import Image
from preparing import Files, check_split, facts, jpeg, lines, pack, refused

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.episodes import eligible_pairs
from qpenet_jax.data.folds import PASCAL_CLASSES, pascal_fold
from qpenet_jax.data.prepare.archives import fingerprint, open_archive
from qpenet_jax.data.prepare.pascal import ARCHIVES, TRAIN_LIST, prepare_pascal
from qpenet_jax.data.sources.prepared import Prepared

VOC = "VOCdevkit/VOC2012/"
SBD = "benchmark_RELEASE/dataset/"
TAR, TGZ = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
NAMES = {i: f"2008_{i:06d}" for i in range(1, 13)}
VOC_VAL = [NAMES[i] for i in (5, 6, 7)]
MAIN = [NAMES[i] for i in (3, 4, 8, 9, 10, 1, 2)]
TRAINAUG = [NAMES[i] for i in (3, 4, 8, 9, 10, 11, 12, 1, 2)]
EXPECTED = {"main": 7, "trainaug": 9, "val": 3}
LISTS = {
    f"{VOC}ImageSets/Segmentation/train.txt": (1, 2, 3, 4),
    f"{VOC}ImageSets/Segmentation/val.txt": (5, 6, 7),
    f"{VOC}ImageSets/Main/train.txt": (1, 2, 3, 4, 8, 9, 10),
    f"{SBD}train.txt": (12, 3, 8, 5, 10),
    f"{SBD}val.txt": (9, 4, 11),
}


def label_of(name: str, value: int) -> np.ndarray:
    label = np.zeros((30, 40), np.uint8)
    corner = int(name[-2:])
    label[corner : corner + 12, corner : corner + 12] = 255
    label[corner + 1 : corner + 11, corner + 1 : corner + 11] = value
    return label


def sbd_mat(label: np.ndarray) -> bytes:
    file = io.BytesIO()
    truth = {"Boundaries": np.zeros(3), "Segmentation": label, "Cat": np.arange(2)}
    scipy.io.savemat(file, {"GTcls": truth}, do_compression=True)
    # SciPy's header holds the time, which would make the IDs of tests differ.
    return b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:]


@pytest.fixture
def files(tmp_path) -> tuple[Files, Files]:
    """The contents of the two archives, as they are published."""
    rng = np.random.default_rng(0)
    voc, sbd = {}, {}
    for i, name in NAMES.items():
        pixels = rng.integers(0, 256, (30, 40, 3), np.uint8)
        voc[f"{VOC}JPEGImages/{name}.jpg"] = jpeg(pixels)
        if i <= 7:
            save_palette(tmp_path / "mask.png", label_of(name, i))
            mask = (tmp_path / "mask.png").read_bytes()
            voc[f"{VOC}SegmentationClass/{name}.png"] = mask
        if i in (3, 4, 5, 8, 9, 10, 11, 12):
            label = label_of(name, i if i > 7 else 20)
            sbd[f"{SBD}cls/{name}.mat"] = sbd_mat(np.where(label == 255, 0, label))
            sbd[f"{SBD}img/{name}.jpg"] = b"SBD's own copies aren't read"
    for member, numbers in LISTS.items():
        files = voc if member.startswith(VOC) else sbd
        files[member] = lines(NAMES[i] for i in numbers)
    return voc, sbd


def pack_both(folder: Path, files: tuple[Files, Files]) -> tuple[Path, Path]:
    return pack(folder / TAR, files[0]), pack(folder / TGZ, files[1])


def expected_label(name: str) -> np.ndarray:
    number = int(name[-2:])
    label = label_of(name, number)
    return label if number <= 7 else np.where(label == 255, 0, label)


def check(folder: Path, voc: Files, names: list[str], split: str = "train") -> None:
    labels = {name: expected_label(name) for name in names}
    images = {name: voc[f"{VOC}JPEGImages/{name}.jpg"] for name in names}
    assert check_split(folder, split, labels, images).classes == PASCAL_CLASSES


def test_main_pool(files, tmp_path):
    tar, tgz = pack_both(tmp_path, files)
    assert [archive.url.rpartition("/")[2] for archive in ARCHIVES] == [TAR, TGZ]
    folder = prepare_pascal(tar, tgz, tmp_path / "data", expected=EXPECTED)
    assert folder == tmp_path / "data/pascal5i/main/1.0.0"
    check(folder, files[0], MAIN)
    check(folder, files[0], VOC_VAL, "val")
    assert Prepared(folder, "val").version == "pascal5i/main/1.0.0"
    found = facts(folder)
    assert found["archives"] == {"voc": fingerprint(tar), "sbd": fingerprint(tgz)}
    assert "inferred" in found["pool"]
    assert "SBD" in found["labels"]


def test_trainaug_pool_from_unpacked_archives(files, tmp_path):
    pack(tmp_path / "unpacked", files[0] | files[1])
    voc, sbd = tmp_path / "unpacked/VOCdevkit", tmp_path / "unpacked/benchmark_RELEASE"
    folder = prepare_pascal(
        voc, sbd, tmp_path / "data", pool="trainaug", expected=EXPECTED
    )
    assert folder == tmp_path / "data/pascal5i/trainaug/1.0.0"
    check(folder, files[0], TRAINAUG)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_ready_masks_instead_of_sbd(mode, files, tmp_path):
    ready = {}
    for i, name in NAMES.items():
        label = expected_label(name) if i > 7 else label_of(name, 20)
        if mode == "P":
            save_palette(tmp_path / "mask.png", label)
        else:
            Image.fromarray(label).save(tmp_path / "mask.png")
        ready[f"Aug/{name}.png"] = (tmp_path / "mask.png").read_bytes()
        ready[f"__MACOSX/Aug/._{name}.png"] = b"of the Finder"
    tar, tgz = pack_both(tmp_path, files)
    masks = pack(tmp_path / "masks.zip", ready)
    # With SBD's lists the order is that of the field's list as well.
    for out, sbd, order in (("a", None, sorted(MAIN)), ("b", tgz, MAIN)):
        folder = prepare_pascal(
            tar, sbd, tmp_path / out, masks=masks, expected=EXPECTED
        )
        check(folder, files[0], order)


def test_pool_file_is_taken_as_it_is(files, tmp_path):
    """The same ids from another file are the same data set."""
    tar, tgz = pack_both(tmp_path, files)
    chosen = [NAMES[12], NAMES[1], NAMES[9]]
    for name in ("ids.txt", "copy.txt"):
        (tmp_path / name).write_bytes(lines(chosen))
        folder = prepare_pascal(tar, tgz, tmp_path / "data", pool=tmp_path / name)
        check(folder, files[0], chosen)
        assert folder.parent.name == f"pool-{facts(folder)['train_sha256'][:8]}"
    assert len(list((tmp_path / "data/pascal5i").glob("pool-*"))) == 1


def refuse(message: str, files: tuple[Files, Files], folder: Path, **options) -> None:
    options = {"out": folder / "data", "expected": EXPECTED} | options
    refused(re.escape(message), prepare_pascal, *pack_both(folder, files), **options)


JPEG8 = f"{VOC}JPEGImages/{NAMES[8]}.jpg"
MASK1 = f"{VOC}SegmentationClass/{NAMES[1]}.png"
MAT9 = f"{SBD}cls/{NAMES[9]}.mat"
LARGE = sbd_mat(np.ones((31, 40), np.uint8))
STRANGE = sbd_mat(np.full((30, 40), 21, np.uint8))
LEAKED = lines([*VOC_VAL, NAMES[8], NAMES[1]])


@pytest.mark.parametrize(
    ("half", "member", "data", "message"),
    [
        (0, JPEG8, None, f"no image of {NAMES[8]} in"),
        (0, JPEG8, b"\xff\xd8 no more", f"{TAR}: {JPEG8}: not an image"),
        (0, MASK1, b"no png", f"{TAR}: {MASK1}: not an image"),
        (0, f"{VOC}ImageSets/Main/train.txt", None, f"{TAR} has no member {VOC}Image"),
        (0, f"{VOC}{TRAIN_LIST}", None, f"{TAR} holds no ImageSets/Segment"),
        (0, f"2007/{TRAIN_LIST}", b"x", f"{TAR} holds 2 times ImageSets/Seg"),
        # What is in val is never in train: 5 of the 7 are left, then val is counted.
        (0, f"{VOC}ImageSets/Segmentation/val.txt", LEAKED, "main: 7 images expected"),
        (1, f"{SBD}val.txt", None, f"{TGZ} has no member {SBD}val.txt"),
        (1, f"{SBD}train.txt", None, f"{TGZ} holds no dataset/train.txt"),
        (1, MAT9, None, f"no mask of {NAMES[9]} in"),
        (1, MAT9, LARGE, f"{TGZ}: {MAT9}: mask of 40x31 pixels for an image of 40x30"),
        (1, MAT9, STRANGE, f"{TGZ}: {MAT9}: label value 21 is no class"),
        (1, MAT9, STRANGE[:90], f"{TGZ}: {MAT9}: no mask of SBD ("),
        (1, MAT9, sbd_mat(np.ones((30, 40))), f"{MAT9}: no mask of SBD (it is "),
    ],
)
def test_damaged_contents_are_named(half, member, data, message, files, tmp_path):
    if data is None:
        del files[half][member]
    else:
        files[half][member] = data
    refuse(message, files, tmp_path)
    if data is LEAKED:
        expected = EXPECTED | {"main": 5}
        message = "val: 3 images expected, 5 found"
        refuse(message, files, tmp_path, expected=expected)


def test_unknown_pool_unofficial_counts_and_nothing_given(files, tmp_path):
    refuse("pool 'mian': choose main or trainaug", files, tmp_path, pool="mian")
    archives, out = pack_both(tmp_path, files), tmp_path / "out"
    for pool, images, found in (("main", 5953, 7), ("trainaug", 10582, 9)):
        message = f"{pool}: {images} images expected, {found} found.*--pool FILE"
        refused(message, prepare_pascal, *archives, out=out, pool=pool)
    refused("give SBD", prepare_pascal, archives[0], None, out=out)


@pytest.mark.parametrize("name", [TAR, TGZ])
@pytest.mark.parametrize("kept", [0, 300, 0.5, 0.98])
def test_archives_that_are_cut_off(name, kept, files, tmp_path):
    tar, tgz = pack_both(tmp_path, files)
    whole = (tmp_path / name).read_bytes()
    end = kept if isinstance(kept, int) else int(len(whole) * kept)
    if name == TAR and kept == 0.98:
        end = len(whole.rstrip(b"\0")) - 700  # in the last list, before the padding
    (tmp_path / name).write_bytes(whole[:end])
    with pytest.raises(InputError, match=f"{name}: .*fetch it again"):
        prepare_pascal(tar, tgz, tmp_path / "data", expected=EXPECTED)
    assert not (tmp_path / "data").exists()


# --- Archives ---

PACKED = {"a/1.png": b"one", "a/b/2.png": b"two" * 999, "3.txt": b""}
HIDDEN = {"a/._1.png": b"of the Finder"}
FORMS = ["set", "set.zip", "set.tar", "set.tgz"]


def contents(path: Path) -> Files:
    with open_archive(path) as archive:
        return {name: member.read() for name, member in archive.items()}


@pytest.mark.parametrize("form", FORMS)
def test_archives_find_their_members_by_path(form, tmp_path):
    path = pack(tmp_path / form, PACKED | HIDDEN)
    assert contents(path) == PACKED
    with (
        open_archive(path) as archive,
        pytest.raises(InputError, match=f"{path} has no member none; is it"),
    ):
        archive["none"]
    if form != "set":
        twins = pack(tmp_path / f"twins_{form}", [("1.png", b"one"), ("1.png", b"two")])
        with pytest.raises(InputError, match=rf"{twins}: 1\.png and .* share a name"):
            contents(twins)


@pytest.mark.parametrize("form", ["tar", "tgz"])
def test_links_and_wild_paths_of_a_tar_touch_nothing(form, tmp_path):
    """`tar` writes a file that it meets twice as a hard link to the first."""
    (tmp_path / "secret").write_bytes(b"secret")
    path = tmp_path / f"wild.{form}"
    with tarfile.open(path, "w:gz" if form == "tgz" else "w") as tar:
        for name, kind, target in (
            ("../../up.png", tarfile.REGTYPE, ""),
            ("/root", tarfile.REGTYPE, ""),
            ("./plain.png", tarfile.REGTYPE, ""),
            ("hard.png", tarfile.LNKTYPE, "./plain.png"),
            ("soft.png", tarfile.SYMTYPE, str(tmp_path / "secret")),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, not target
            tar.addfile(member, io.BytesIO(b"x"))
    names = ("../../up.png", "/root", "plain.png", "hard.png")
    assert contents(path) == dict.fromkeys(names, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", path.name]


@pytest.mark.parametrize(
    ("form", "where"), [("zip", r"set\.zip: a/b/2\.png: "), ("tgz", r"set\.tgz: ")]
)
def test_a_failing_crc_is_named(form, where, tmp_path):
    path = pack(tmp_path / f"set.{form}", PACKED)
    data = bytearray(path.read_bytes())
    data[data.index(b"twotwo") if form == "zip" else -8] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{where}.*damaged \(.*; fetch it again"):
        contents(path)


def test_fingerprints_of_archives_and_folders(tmp_path):
    path = pack(tmp_path / "set.tar", PACKED)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fingerprint(path) == {"name": "set.tar", "sha256": sha}
    folder = pack(tmp_path / "set", PACKED)
    before = fingerprint(folder)
    pack(folder, HIDDEN)
    assert fingerprint(folder) == before
    pack(folder, {"a/1.png": b"changed"})
    assert fingerprint(folder) != before
    pack(folder, PACKED)
    assert fingerprint(folder) == before
    (folder / "a/1.png").rename(folder / "a/0.png")
    assert fingerprint(folder) != before
    for opener, message in ((fingerprint, "can't be read"), (contents, "no such file")):
        with pytest.raises(InputError, match=f"none: {message}"):
            opener(tmp_path / "none")


# --- The real masks ---


def stand_ins(lists: Path, masks: Path) -> Files:
    """VOC's files: the real lists, and plain images of the masks' sizes.

    `ImageSets/Main/train` isn't at hand: the 5,623 ids that the rule takes from it.
    """
    names = {
        "Segmentation/train": "voc_train_1464",
        "Segmentation/val": "all_val_1449",
        "Main/train": "sbd_5623",
    }
    plain = functools.cache(lambda size: jpeg(np.zeros((*size[::-1], 3), np.uint8)))
    voc = {
        f"{VOC}ImageSets/{member}.txt": (lists / f"{name}.txt").read_bytes()
        for member, name in names.items()
    }
    for member, data in contents(masks).items():
        image = plain(Image.open(io.BytesIO(data)).size)
        voc[f"{VOC}JPEGImages/{Path(member).stem}.jpg"] = image
    return voc


def test_the_real_masks_give_the_lists_of_the_field(shared_voc, tmp_path):
    masks, lists = shared_voc / "SegmentationClassAug-all.tar.gz", shared_voc / "lists"
    voc = pack(tmp_path / "voc.tar", stand_ins(lists, masks))
    folder = prepare_pascal(voc, None, tmp_path / "out", masks=masks)
    train, val = (Prepared(folder, split).counts for split in ("train", "val"))
    found = []
    for fold in range(4):
        base, novel = pascal_fold(fold)
        pairs = [
            eligible_pairs(val, novel),
            eligible_pairs(train, base, exclude=novel),
            eligible_pairs(train, base),
        ]
        images = [int(p.any(axis=1).sum()) for p in pairs]
        found.append((*images, int(pairs[0].sum()), int(pairs[1].sum())))
    assert found == [
        (364, 4208, 4760, 365, 5749),
        (445, 3726, 4588, 467, 4706),
        (592, 2752, 4097, 734, 3044),
        (336, 4510, 5108, 357, 5832),
    ]
    for split, ids in (("train", "all_train_5953"), ("val", "all_val_1449")):
        listed = (lists / f"{ids}.txt").read_text().split()
        assert list(Prepared(folder, split).names) == listed

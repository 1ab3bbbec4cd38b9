"""PASCAL-5i from archives made here, and the real masks' counts through the same code.

Twelve images of 40x30: VOC train is 1-4, VOC val 5-7, SBD 3-5 and 8-12, of which 8-10
are in ImageSets/Main/train. SBD's masks of 3-5 are all of class 20: VOC's must win.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import save_palette
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.episodes import eligible_pairs
from qpenet_jax.data.folds import PASCAL_CLASSES, pascal_fold
from qpenet_jax.data.prepare import downloads, pascal
from qpenet_jax.data.prepare.archives import fingerprint, open_archive
from qpenet_jax.data.prepare.downloads import download_pascal
from qpenet_jax.data.prepare.pascal import prepare_pascal
from qpenet_jax.data.sources.prepared import Prepared

VOC = "VOCdevkit/VOC2012/"
SBD = "benchmark_RELEASE/dataset/"
TAR, TGZ = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
NAMES = {i: f"2008_{i:06d}" for i in range(1, 13)}
VOC_TRAIN, VOC_VAL = [NAMES[i] for i in (1, 2, 3, 4)], [NAMES[i] for i in (5, 6, 7)]
MAIN = [NAMES[i] for i in (3, 4, 8, 9, 10)] + [NAMES[i] for i in (1, 2)]
TRAINAUG = [NAMES[i] for i in (3, 4, 8, 9, 10, 11, 12)] + [NAMES[i] for i in (1, 2)]
Files = dict[str, bytes]


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
    # SciPy's header tells the time, which would make the IDs of tests differ.
    return b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:]


def lines(names: list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


@pytest.fixture
def files(tmp_path) -> tuple[Files, Files]:
    """The contents of the two archives; tests damage them before they are packed."""
    rng = np.random.default_rng(0)
    voc, sbd = {}, {}
    for i, name in NAMES.items():
        pixels = rng.integers(0, 256, (30, 40, 3), np.uint8)
        jpeg = io.BytesIO()
        Image.fromarray(pixels).save(jpeg, "JPEG")
        voc[f"{VOC}JPEGImages/{name}.jpg"] = jpeg.getvalue()
        if i <= 7:
            save_palette(tmp_path / "mask.png", label_of(name, i))
            voc[f"{VOC}SegmentationClass/{name}.png"] = (
                tmp_path / "mask.png"
            ).read_bytes()
        if i in (3, 4, 5, 8, 9, 10, 11, 12):
            label = label_of(name, i if i > 7 else 20)
            sbd[f"{SBD}cls/{name}.mat"] = sbd_mat(np.where(label == 255, 0, label))
            sbd[f"{SBD}img/{name}.jpg"] = b"SBD's own copies aren't read"
    voc[f"{VOC}ImageSets/Segmentation/train.txt"] = lines(VOC_TRAIN)
    voc[f"{VOC}ImageSets/Segmentation/val.txt"] = lines(VOC_VAL)
    voc[f"{VOC}ImageSets/Main/train.txt"] = lines(sorted(MAIN))
    sbd[f"{SBD}train.txt"] = lines([NAMES[i] for i in (12, 3, 8, 5, 10)])
    sbd[f"{SBD}val.txt"] = lines([NAMES[i] for i in (9, 4, 11)])
    return voc, sbd


def pack(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pack_both(folder: Path, files: tuple[Files, Files]) -> tuple[Path, Path]:
    return pack(folder / TAR, files[0]), pack(folder / TGZ, files[1])


@pytest.fixture
def counts(monkeypatch):
    """The counts of the small archives in place of the official ones."""
    monkeypatch.setattr(pascal, "EXPECTED_IMAGES", {"main": 7, "trainaug": 9, "val": 3})


def expected_label(name: str) -> np.ndarray:
    number = int(name[-2:])
    label = label_of(name, number)
    return label if number <= 7 else np.where(label == 255, 0, label)


def check_split(data: Prepared, names: list[str], voc: Files) -> None:
    assert list(data.names) == names
    for index, name in enumerate(names):
        label = expected_label(name)
        np.testing.assert_array_equal(data.label(index), label)
        counts = np.bincount(label.ravel(), minlength=256)[1:21]
        np.testing.assert_array_equal(data.counts[index], counts)
        with Image.open(io.BytesIO(voc[f"{VOC}JPEGImages/{name}.jpg"])) as image:
            np.testing.assert_array_equal(data.image(index), np.array(image))


@pytest.mark.usefixtures("counts")
def test_main_pool(files, tmp_path):
    tar, tgz = pack_both(tmp_path, files)
    folder = prepare_pascal(tar, tgz, tmp_path / "data")
    assert folder == tmp_path / "data/pascal5i/main/1.0.0"
    check_split(Prepared(folder, "train"), MAIN, files[0])
    check_split(Prepared(folder, "val"), VOC_VAL, files[0])
    assert Prepared(folder, "val").classes == PASCAL_CLASSES
    assert Prepared(folder, "val").version == "pascal5i/main/1.0.0"
    facts = json.loads((folder / "metadata.json").read_text())["facts"]
    assert facts["archives"] == {"voc": fingerprint(tar), "sbd": fingerprint(tgz)}
    assert "inferred" in facts["pool"]
    assert "SBD" in facts["labels"]
    # The same files make the same bytes, and a finished data set is kept.
    again = prepare_pascal(tar, tgz, tmp_path / "again")
    assert fingerprint(again) == fingerprint(folder)
    assert prepare_pascal(tar, tgz, tmp_path / "again") == again


@pytest.mark.usefixtures("counts")
def test_trainaug_pool_from_unpacked_archives(files, tmp_path):
    for name, data in (files[0] | files[1]).items():
        (tmp_path / "unpacked" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "unpacked" / name).write_bytes(data)
    voc, sbd = tmp_path / "unpacked/VOCdevkit", tmp_path / "unpacked/benchmark_RELEASE"
    folder = prepare_pascal(voc, sbd, tmp_path / "data", pool="trainaug")
    assert folder == tmp_path / "data/pascal5i/trainaug/1.0.0"
    check_split(Prepared(folder, "train"), TRAINAUG, files[0])


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.usefixtures("counts")
def test_ready_masks_instead_of_sbd(mode, files, tmp_path):
    with zipfile.ZipFile(tmp_path / "masks.zip", "w") as pack_of_masks:
        for i, name in NAMES.items():
            label = expected_label(name) if i > 7 else label_of(name, 20)
            if mode == "P":
                save_palette(tmp_path / "mask.png", label)
            else:
                Image.fromarray(label).save(tmp_path / "mask.png")
            pack_of_masks.write(tmp_path / "mask.png", f"Aug/{name}.png")
            pack_of_masks.writestr(f"__MACOSX/Aug/._{name}.png", "of the Finder")
    tar, tgz = pack_both(tmp_path, files)
    masks = tmp_path / "masks.zip"
    folder = prepare_pascal(tar, None, tmp_path / "a", masks=masks)
    check_split(Prepared(folder, "train"), sorted(MAIN), files[0])
    # With SBD's lists the order is that of the field's list as well.
    folder = prepare_pascal(tar, tgz, tmp_path / "b", masks=masks)
    check_split(Prepared(folder, "train"), MAIN, files[0])


def test_pool_file_is_taken_as_it_is(files, tmp_path):
    tar, tgz = pack_both(tmp_path, files)
    chosen = [NAMES[12], NAMES[1], NAMES[9]]
    (tmp_path / "ids.txt").write_bytes(lines(chosen))
    folder = prepare_pascal(tar, tgz, tmp_path / "data", pool=tmp_path / "ids.txt")
    check_split(Prepared(folder, "train"), chosen, files[0])
    facts = json.loads((folder / "metadata.json").read_text())["facts"]
    assert folder.parent.name == f"pool-{facts['train_sha256'][:8]}"
    # The same ids from another file are the same data set.
    (tmp_path / "copy.txt").write_bytes(lines(chosen))
    again = prepare_pascal(tar, tgz, tmp_path / "data", pool=tmp_path / "copy.txt")
    assert again == folder


def refused(files, folder: Path, **options) -> str:
    """Return the one line that stops preparing, which leaves no data set behind."""
    tar, tgz = pack_both(folder, files)
    with pytest.raises(InputError) as error:
        prepare_pascal(tar, tgz, folder / "data", **options)
    assert "\n" not in str(error.value)
    assert not list((folder / "data").glob("**/1.0.0*"))
    return str(error.value)


@pytest.mark.parametrize(("pool", "images"), [("main", 5953), ("trainaug", 10582)])
def test_unofficial_counts_stop(pool, images, files, tmp_path):
    message = refused(files, tmp_path, pool=pool)
    found = {"main": 7, "trainaug": 9}[pool]
    assert f"{pool}: {images} images expected, {found} found" in message
    assert "--pool FILE" in message


@pytest.mark.usefixtures("counts")
def test_unofficial_val_stops_and_is_never_in_train(files, tmp_path):
    list_of_val = f"{VOC}ImageSets/Segmentation/val.txt"
    files[0][list_of_val] = lines([*VOC_VAL, NAMES[8], NAMES[1]])
    pascal.EXPECTED_IMAGES["main"] -= 2
    assert "val: 3 images expected, 5 found" in refused(files, tmp_path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([NAMES[8], NAMES[6], NAMES[5]], f"{NAMES[5]} is an image of VOC's val (2 are"),
        ([NAMES[8], "2009_1"], "has no image VOCdevkit/VOC2012/JPEGImages/2009_1.jpg"),
        ([NAMES[8], "nomask"], "no mask of nomask: neither"),
    ],
)
def test_bad_pool_files(ids, message, files, tmp_path):
    files[0][f"{VOC}JPEGImages/nomask.jpg"] = b""
    (tmp_path / "ids.txt").write_bytes(lines(ids))
    assert message in refused(files, tmp_path, pool=tmp_path / "ids.txt")


def test_unknown_pool_and_nothing_given(files, tmp_path):
    assert "pool 'mian': choose main or trainaug" in refused(
        files, tmp_path, pool="mian"
    )
    with pytest.raises(InputError, match="give SBD"):
        prepare_pascal(tmp_path / TAR, None, tmp_path / "data")


JPEG8, MASK1 = (
    f"{VOC}JPEGImages/{NAMES[8]}.jpg",
    f"{VOC}SegmentationClass/{NAMES[1]}.png",
)
MAT9 = f"{SBD}cls/{NAMES[9]}.mat"
LARGE = sbd_mat(np.ones((31, 40), np.uint8))
STRANGE = sbd_mat(np.full((30, 40), 21, np.uint8))


@pytest.mark.parametrize(
    ("half", "member", "data", "message"),
    [
        (0, JPEG8, None, f"{TAR} has no image {JPEG8}"),
        (0, JPEG8, b"\xff\xd8 no more", f"{TAR}: {JPEG8}: not an image"),
        (0, MASK1, b"no png", f"{TAR}: {MASK1}: not an image"),
        (0, f"{VOC}ImageSets/Main/train.txt", None, f"{TAR} has no member {VOC}Image"),
        (0, f"{VOC}{pascal.TRAIN_LIST}", None, f"{TAR} holds no ImageSets/Segment"),
        (0, f"2007/{pascal.TRAIN_LIST}", b"x", f"{TAR} holds 2 times ImageSets/Seg"),
        (1, f"{SBD}val.txt", None, f"{TGZ} has no member {SBD}val.txt"),
        (1, f"{SBD}train.txt", None, f"{TGZ} holds no dataset/train.txt"),
        (1, MAT9, None, f"no mask of {NAMES[9]}: neither"),
        (1, f"dataset/cls/{NAMES[9]}.mat", b"x", f"{TGZ} has two masks of one image"),
        (1, MAT9, LARGE, f"{TGZ}: {MAT9}: mask of 40x31 pixels for an image of 40x30"),
        (1, MAT9, STRANGE, f"{TGZ}: {MAT9}: label value 21 is no class"),
        (1, MAT9, STRANGE[:90], f"{TGZ}: {MAT9}: no mask of SBD ("),
        (1, MAT9, sbd_mat(np.ones((30, 40))), f"{MAT9}: GTcls.Segmentation is float64"),
    ],
)
@pytest.mark.usefixtures("counts")
def test_damaged_contents_are_named(half, member, data, message, files, tmp_path):
    if data is None:
        del files[half][member]
    else:
        files[half][member] = data
    assert message in refused(files, tmp_path)


@pytest.mark.parametrize("name", [TAR, TGZ])
@pytest.mark.parametrize("kept", [0, 300, 0.5, 0.98])
@pytest.mark.usefixtures("counts")
def test_archives_that_are_cut_off(name, kept, files, tmp_path):
    tar, tgz = pack_both(tmp_path, files)
    whole = (tmp_path / name).read_bytes()
    end = kept if isinstance(kept, int) else int(len(whole) * kept)
    if name == TAR and kept == 0.98:
        end = len(whole.rstrip(b"\0")) - 700  # in the last list, before the padding
    (tmp_path / name).write_bytes(whole[:end])
    with pytest.raises(InputError, match=f"{name}: .*fetch it again"):
        prepare_pascal(tar, tgz, tmp_path / "data")
    assert not (tmp_path / "data").exists()


PACKED = {"a/1.png": b"one", "a/b/2.png": b"two" * 999, "3.txt": b""}


def packed(folder: Path, form: str) -> Path:
    if form == "folder":
        for name, data in PACKED.items():
            (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "set" / name).write_bytes(data)
        (folder / "set/a/._1.png").write_bytes(b"of the Finder")
        return folder / "set"
    if form == "zip":
        with zipfile.ZipFile(folder / "set.zip", "w") as archive:
            archive.mkdir("a")
            for name, data in (PACKED | {"a/._1.png": b"of the Finder"}).items():
                archive.writestr(name, data)
        return folder / "set.zip"
    return pack(folder / f"set.{form}", PACKED | {"a/._1.png": b"of the Finder"})


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tgz"])
def test_archives_find_their_members_by_path(form, tmp_path):
    path = packed(tmp_path, form)
    with open_archive(path) as archive:
        assert contents(archive) == PACKED
        assert "a/1.png" in archive
        assert "a" not in archive
        with pytest.raises(InputError, match=f"{path} has no member none; is it"):
            archive["none"]
    with open_archive(path, lambda name: name.startswith("a/b")) as archive:
        assert contents(archive) == {"a/b/2.png": PACKED["a/b/2.png"]}


def test_links_and_wild_paths_of_a_tar_touch_nothing(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    with tarfile.open(tmp_path / "wild.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
        for name in ("./plain.png", "../../up.png", "/root.png"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    with open_archive(tmp_path / "wild.tar") as archive:
        assert contents(archive) == dict.fromkeys(
            ("plain.png", "../../up.png", "/root.png"), b"x"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "wild.tar"]


@pytest.mark.parametrize("form", ["zip", "tar", "tgz"])
def test_two_members_of_one_name_are_refused(form, tmp_path):
    path, names = tmp_path / f"set.{form}", ("a/1.png", "b.txt", "a/1.png")
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/1.png", b"one")
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr("a/1.png", b"two")
            archive.writestr("b.txt", b"text")
    else:
        with tarfile.open(path, "w:gz" if form == "tgz" else "w") as tar:
            for number, name in enumerate(names):
                member = tarfile.TarInfo(name)
                member.size = 1
                tar.addfile(member, io.BytesIO(bytes([number])))
    message = rf"set\.{form} has two members a/1\.png; take one of them out"
    with pytest.raises(InputError, match=message):
        read_all(path)
    with open_archive(path, lambda name: name.endswith(".txt")) as archive:
        assert list(archive) == ["b.txt"]


@pytest.mark.parametrize("form", ["tar", "tgz"])
def test_hard_links_of_a_tar_are_files(form, tmp_path):
    """`tar` writes a file that it meets twice as a link to the first."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.png").write_bytes(b"one")
    (tmp_path / "set/2.png").hardlink_to(tmp_path / "set/1.png")
    path = tmp_path / f"x.{form}"
    with tarfile.open(path, "w:gz" if form == "tgz" else "w") as tar:
        tar.add(tmp_path / "set", ".")
    with tarfile.open(path) as tar:
        assert [member.islnk() for member in tar] == [False, False, True]
    assert read_all(path) == {"1.png": b"one", "2.png": b"one"}


def test_links_of_a_folder_are_followed(tmp_path):
    folder = packed(tmp_path, "folder")
    before = fingerprint(folder)
    (folder / "a/b").rename(tmp_path / "elsewhere")
    (folder / "a/b").symlink_to(tmp_path / "elsewhere")
    (folder / "a/1.png").rename(tmp_path / "1.png")
    (folder / "a/1.png").symlink_to(tmp_path / "1.png")
    assert read_all(folder) == PACKED
    assert fingerprint(folder) == before


@pytest.mark.parametrize(
    ("form", "where"), [("zip", r"set\.zip: a/b/2\.png: "), ("tgz", r"set\.tgz: ")]
)
def test_a_failing_crc_is_told(form, where, tmp_path):
    path = packed(tmp_path, form)
    data = bytearray(path.read_bytes())
    data[data.index(b"twotwo") if form == "zip" else -8] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{where}.*damaged \(.*; fetch it again"):
        read_all(path)


def contents(archive) -> Files:
    return {name: archive[name] for name in archive}


def read_all(path: Path) -> Files:
    with open_archive(path) as archive:
        return contents(archive)


def test_fingerprints(tmp_path):
    path = packed(tmp_path, "tar")
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fingerprint(path) == {"name": "set.tar", "sha256": sha}
    folder = packed(tmp_path, "folder")
    before = fingerprint(folder)
    (folder / "a/1.png").write_bytes(b"changed")
    assert fingerprint(folder) != before
    (folder / "a/1.png").write_bytes(b"one")
    assert fingerprint(folder) == before
    (folder / ".DS_Store").write_bytes(b"of the Finder")
    assert fingerprint(folder) == before
    (folder / "a/1.png").rename(folder / "a/0.png")
    assert fingerprint(folder) != before
    for opener in (fingerprint, read_all):
        with pytest.raises(InputError, match="none: no such file or folder; check"):
            opener(tmp_path / "none")


def test_official_addresses(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        downloads, "download", lambda *given: asked.append(given) or given[1]
    )
    assert download_pascal(tmp_path) == (tmp_path / TAR, tmp_path / TGZ)
    assert [url.rpartition("/")[2] for url, _, _ in asked] == [TAR, TGZ]
    md5s = ["6cd6e144f989b92b3379bac3b3de84fd", "82b4d87ceb2ed10f6038a1cba92111cb"]
    assert [checksum for _, _, checksum in asked] == [f"md5:{md5}" for md5 in md5s]


def write_stand_ins(path, lists, masks):
    """Write a VOC tar with the real lists, and plain images of the masks' sizes.

    `ImageSets/Main/train` isn't at hand: the 5,623 ids that the rule takes from it.
    """
    names = {
        "Segmentation/train": "voc_train_1464",
        "Segmentation/val": "all_val_1449",
        "Main/train": "sbd_5623",
    }
    jpegs = {}
    with tarfile.open(path, "w") as tar, open_archive(masks) as archive:
        for member, name in names.items():
            content = (lists / f"{name}.txt").read_bytes()
            add_member(tar, f"VOCdevkit/VOC2012/ImageSets/{member}.txt", content)
        for member, data in contents(archive).items():
            size = Image.open(io.BytesIO(data)).size
            if size not in jpegs:
                jpegs[size] = io.BytesIO()
                Image.new("RGB", size).save(jpegs[size], "JPEG")
            image = f"VOCdevkit/VOC2012/JPEGImages/{Path(member).stem}.jpg"
            add_member(tar, image, jpegs[size].getvalue())


def add_member(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_the_real_masks_give_the_lists_of_the_field(shared_voc, tmp_path):
    masks = shared_voc / "SegmentationClassAug-all.tar.gz"
    voc = tmp_path / "voc.tar"
    write_stand_ins(voc, shared_voc / "lists", masks)
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
        listed = (shared_voc / "lists" / f"{ids}.txt").read_text().split()
        assert list(Prepared(folder, split).names) == listed

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import no_file_above
from PIL import Image
from preparing import change_a_byte, check_split, facts, refused, without, write

from qpenet_jax.cli.main import main
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import locked
from qpenet_jax.data.prepare.archives import fingerprint
from qpenet_jax.data.prepare.image_folder import prepare_folder, read_classes
from qpenet_jax.data.sources.prepared import Prepared

SIZE = (12, 17)


def put(root: Path, name: str, suffix: str = ".jpg", value: int = 1) -> None:
    """Write an image and its mask: a 5 x 4 rectangle of `value`, one ignored row."""
    label = np.zeros(SIZE, np.uint8)
    label[2:7, 3:7] = value
    label[0] = 255
    pixels = np.full((*SIZE, 3), (200, 40 * value, len(name)), np.uint8)
    for folder, array, ending in (("images", pixels, suffix), ("masks", label, ".png")):
        path = root / folder / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Four images of three classes, one of them in a subfolder, one palette mask."""
    root = tmp_path / "my photos"
    put(root, "b", value=2)
    put(root, "a.1", ".png", value=1)
    put(root, "sub/a.1", ".JPG", value=3)
    put(root, "c", ".bmp", value=1)
    (root / "classes.txt").write_text("ant\n fire ant \nbee\n\n")
    (root / "train.txt").write_text("sub/a.1\nb\n")
    (root / "val.txt").write_text("c\n\na.1\n")
    mask = root / "masks" / "b.png"
    palette = Image.frombytes("P", SIZE[::-1], Image.open(mask).tobytes())
    palette.putpalette([200 - i // 4 for i in range(768)])  # colours unlike the values
    palette.save(mask)
    return root


def unlist(root: Path) -> None:
    for split in ("train", "val"):
        (root / f"{split}.txt").unlink()


def test_lists_give_the_splits(root, tmp_path):
    folder = prepare_folder(root, tmp_path / "out")
    assert folder == tmp_path / "out" / "folder" / "my_photos" / "1.0.0"
    assert facts(folder)["images"] == {"train": 2, "val": 2}
    for split, files, counts in (
        ("train", ("sub/a.1.JPG", "b.jpg"), [[0, 0, 20], [0, 20, 0]]),
        ("val", ("c.bmp", "a.1.png"), [[20, 0, 0], [20, 0, 0]]),
    ):
        names = [file.rpartition(".")[0] for file in files]
        masks = (Image.open(root / f"masks/{name}.png") for name in names)
        labels = dict(zip(names, map(np.array, masks), strict=True))
        images = [(root / f"images/{file}").read_bytes() for file in files]
        images = dict(zip(names, images, strict=True))
        data = check_split(folder, split, labels, images)
        assert data.classes == ("ant", "fire ant", "bee")
        np.testing.assert_array_equal(data.counts, counts)


def test_hash_decides_and_adding_images_moves_none(root, tmp_path):
    unlist(root)
    for i in range(60):
        put(root, f"im{i}")
    first = prepare_folder(root, tmp_path / "first")
    splits = {split: Prepared(first, split).names for split in ("train", "val")}
    # The rule, by its own definition: the first 8 bytes of SHA-256 as a share.
    for split, names in splits.items():
        assert list(names) == sorted(names)
        shares = [int(hashlib.sha256(n.encode()).hexdigest()[:16], 16) for n in names]
        assert all((share / 16**16 < 0.2) == (split == "val") for share in shares)
    assert len(splits["train"]) + len(splits["val"]) == 64
    for i in range(60, 80):
        put(root, f"im{i}")
    second = prepare_folder(root, tmp_path / "second")
    for split, names in splits.items():
        assert set(names) < set(Prepared(second, split).names)


@pytest.mark.parametrize(("given", "other"), [("train", "val"), ("val", "train")])
def test_one_list_or_one_split(root, tmp_path, given, other):
    (root / f"{other}.txt").unlink()
    ids = tuple((root / f"{given}.txt").read_text().split())
    folder = prepare_folder(root, tmp_path / "out")
    assert Prepared(folder, given).names == ids
    rest = {"a.1", "b", "c", "sub/a.1"} - set(ids)
    assert Prepared(folder, other).names == tuple(sorted(rest))
    assert f"{given}.txt" in facts(folder)["rules"]
    every = ("a.1", "b", "c", "sub/a.1")
    (root / f"{given}.txt").write_text("\n".join(every))
    folder = prepare_folder(root, tmp_path / "one")
    assert Prepared(folder, given).names == every
    assert facts(folder)["images"] == {given: 4}


def turn_a_mask(root: Path) -> None:
    mask = root / "masks" / "c.png"
    Image.fromarray(np.array(Image.open(mask))[:, ::-1]).save(mask)


def change_a_photo(root: Path) -> None:
    change_a_byte(root / "images" / "b.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (turn_a_mask, r"other files \(a mask or the list of val differs\)"),
        (write("val.txt", b"a.1\nc\n"), r"files \(a mask or the list of val differs"),
        (change_a_photo, r"made of other files \(image b of train differs\)"),
        (write("classes.txt", b"a\nb\nc\n"), r"in another way \(classes differ\)"),
    ],
)
def test_preparing_again(root, tmp_path, change, message, capfd):
    folder = prepare_folder(root, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_folder(root, tmp_path / "out") == folder
    assert f"{folder} is kept" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    change(root)
    with pytest.raises(InputError, match=message):
        prepare_folder(root, tmp_path / "out")


def test_a_second_process_is_refused_while_the_first_writes(root, tmp_path):
    out = tmp_path / "out"
    message = "folder/my_photos/1.0.0: another process is preparing this data set; wait"
    with locked(out / "folder/.my_photos.lock", "held"):  # as the first holds it
        refused(message, prepare_folder, root, out=out)
    assert Prepared(prepare_folder(root, out), "train").names == ("sub/a.1", "b")


def test_hidden_and_other_files_are_no_images(root, tmp_path, capfd):
    others = ("x.gif", "sub/y.heic")
    for name in ("._b.jpg", ".DS_Store", "Thumbs.db", "notes.txt", *others):
        (root / "images" / name).write_bytes(b"no image")
    (root / "masks" / "._b.png").write_bytes(b"no mask")
    (root / "val.txt").write_text("c\n")  # An image off both lists is left out as well.
    folder = prepare_folder(root, tmp_path / "out")
    assert facts(folder)["images"] == {"train": 2, "val": 1}
    said = capfd.readouterr().err
    pattern = r"images: 4 file\(s\) without the ending \.bmp \.jpeg .* such as \S+\n"
    assert re.search(pattern, said)


PREPARE = """
import sys
from pathlib import Path
from qpenet_jax.data.prepare.image_folder import prepare_folder
from qpenet_jax.data.sources.prepared import Prepared

root, out = map(Path, sys.argv[1:])
data = Prepared(prepare_folder(root, out, name="same"), "val")
data.counts, data.image(0), data.label(0)
print([name for name in sys.modules if name.partition(".")[0] == "tensorflow"])
"""


def test_the_same_files_make_the_same_bytes_without_tensorflow(root, tmp_path):
    """Also where the folders are links."""
    written = []
    for number in ("1", "2"):
        out = tmp_path / number / ("deep" * int(number))
        # Orders of sets and maps differ between processes.
        environment = os.environ | {"PYTHONHASHSEED": number}
        command = [sys.executable, "-c", PREPARE, root, out]
        ran = subprocess.run(command, check=True, env=environment, capture_output=True)
        assert ran.stdout == b"[]\n"
        folder = out / "folder/same/1.0.0"
        written.append({p.name: p.read_bytes() for p in folder.iterdir()})
        for kind in ("images", "masks", "images/sub"):
            elsewhere = (root / kind).rename(tmp_path / f"{number}-{Path(kind).name}")
            (root / kind).symlink_to(elsewhere)
    assert written[0] == written[1]
    assert len(written[0]) == 5


def test_the_command_prints_what_is_in_it(root, tmp_path, capsys):
    shutil.copy(root / "images/b.jpg", root / "images/copy.jpg")
    shutil.copy(root / "masks/b.png", root / "masks/copy.png")
    (root / "val.txt").write_text("c\na.1\ncopy\n")
    (root / "classes.txt").write_text("ant\nfire ant\nbee\nwasp\n")
    main(["prepare", "folder", str(root), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    table = """
| class      | train images | train pixels | val images | val pixels |
| ---------- | -----------: | -----------: | ---------: | ---------: |
| 1 ant      |            0 |            0 |          2 |         40 |
| 2 fire ant |            1 |           20 |          1 |         20 |
| 3 bee      |            1 |           20 |          0 |          0 |
| 4 wasp     |            0 |            0 |          0 |          0 |
"""
    assert table in printed
    assert "warning: no pixel of wasp\n" in printed
    message = "warning: 1 image(s) of val are in train as well, such as b = copy\n"
    assert message in printed
    folder = tmp_path / "out/folder/my_photos/1.0.0"
    assert f"sha256: {fingerprint(folder)['sha256']}\n" in printed


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        ("__ignore__\n_background_\nant\nfire ant\n", "ant/fire ant"),
        ("_background_\nant\n", "ant"),
        ("one\n2 euro", "one/2 euro"),
        ("10 cent\n5 cent", "10 cent/5 cent"),
        ("backgammon\nignorance", "backgammon/ignorance"),
        ("type 1\ntype 2", "type 1/type 2"),
    ],
)
def test_lists_of_labelmes_and_names_that_only_look_like_a_convention(
    tmp_path, content, classes
):
    (tmp_path / "classes.txt").write_text(content)
    assert read_classes(tmp_path / "classes.txt") == tuple(classes.split("/"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("__ignore__\nant\nbee", "'__ignore__' names no class"),
        ("_background_\n__ignore__\nant", "'__ignore__' names no class"),
        ("__ignore__\nbackground\nant", "'__ignore__' names no class"),
        ("background\nant\nbee", "'background' names no class"),
        ("ant\nbee\nBackground", "'Background' names no class"),
        ("BG\nant", "'BG' names no class"),
        ("ant\nvoid", "'void' names no class"),
        ("unlabeled\nant", "'unlabeled' names no class"),
        ("0: background\n1: ant", "'0: background' names no class"),
        ("__ignore__\n_background_", "names no class"),
        ("_background_", "names no class"),
        ("1: ant\n2: bee", "'2: bee' is more than a name"),
        ("1 ant\n2 bee", "'2 bee' is more than a name"),
        ("0,ant\n1,bee", "'1,bee' is more than a name"),
        ("id,name\n1,ant\n2,bee", "'2,bee' is more than a name"),
        ("# label:color_rgb:parts:actions\nant:128,0,0::", "'# label.* more than a"),
        ("ant:128,0,0::\nbee:0,128,0::", "'ant:128,0,0::' is more than a name"),
        ("names: [ant, bee]", "more than a name"),
        ('["ant", "bee"]', "more than a name"),
        ('{"1": "ant"}', "more than a name"),
        ("names:\n  0: ant\n  1: bee", "'names:' is more than a name"),
        ("Idx\tName\n1\tant", "more than a name"),
    ],
)
def test_other_lists_of_classes_are_refused_whole(tmp_path, content, message):
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(InputError, match=rf"classes\.txt: .*{message}"):
        read_classes(tmp_path / "classes.txt")


def test_the_name_becomes_an_identifier(root, tmp_path):
    names = {"5 shots!": "_5_shots_", "a-b.c": "a_b_c", "été": "été", "1.0": "_1_0"}
    for name, identifier in names.items():
        folder = prepare_folder(root, tmp_path / "out", name=name)
        assert folder.parent.name == identifier
        assert Prepared(folder, "val").version == f"folder/{identifier}/1.0.0"


# --- What can be wrong, each said in one line ---


def empty(root: Path) -> None:
    for path in [*(root / "images").rglob("*.*"), *(root / "masks").rglob("*.*")]:
        path.unlink()


def leave_one(root: Path) -> None:
    unlist(root)
    for name in ("images/c.bmp", "images/a.1.png", "images/sub/a.1.JPG"):
        (root / name).unlink()
        (root / name.replace("images", "masks", 1)).with_suffix(".png").unlink()


def blank(root: Path) -> None:
    for name in ("c", "a.1"):
        Image.new("L", SIZE[::-1]).save(root / "masks" / f"{name}.png")


def ignore_all(root: Path) -> None:
    """As drawing programs save one object, which `predict` takes."""
    Image.new("L", SIZE[::-1], 255).save(root / "masks/c.png")


def shrink_a_mask(root: Path) -> None:
    Image.new("L", (16, 12)).save(root / "masks/b.png")


MANY = "\n".join(map(str, range(255))).encode()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("images"), r"folder .*images doesn't exist"),
        (without("masks"), r"folder .*masks doesn't exist"),
        (without("classes.txt"), r"classes\.txt: no such text file"),
        (empty, r"images holds no image"),
        (without("masks/sub/a.1.png"), r"a\.1\.JPG has no mask .*masks/sub/a\.1\.png;"),
        (without("images/b.jpg"), r"masks/b\.png has no image"),
        (leave_one, r"split '(train|val)' has no image: list some for it"),
        (blank, r"no mask of val shows a class"),
        (ignore_all, r"c\.png: 255 is its only value beside 0;"),
        (write("images/b.png", b"x"), r"images/b\.jpg and .*/b\.png share a name"),
        (write("classes.txt", b"ant\n\nbee\n"), r"classes\.txt: line 2 is empty"),
        (write("classes.txt", b"ant\nbee\nant\n"), r"ant is listed 2 times; keep one"),
        (write("classes.txt", MANY), r"255 classes; at most 254 fit"),
        (
            write("classes.txt", b"ant\nbee\n"),
            r"\.1\.png: .* 3 is no .* 0\.\.2 or 255",
        ),
        (write("train.txt", b"b.jpg\n"), r"no image 'b\.jpg'; .*without file ending"),
        (write("train.txt", b"b\nc\n"), r"c is listed for train and for val"),
        (write("images/b.jpg", b"no image"), r"images/b\.jpg: not an image"),
        (write("masks/b.png", b"no mask"), r"masks/b\.png: not an image"),
        (shrink_a_mask, r"masks/b\.png: mask of 16x12 .* image of 17x12"),
    ],
)
def test_what_can_be_wrong(root, tmp_path, spoil, message):
    spoil(root)
    refused(message, prepare_folder, root, out=tmp_path / "out")


def test_a_full_disk_is_one_line_and_nothing_is_left(root, tmp_path):
    """ArrayRecord raises no OSError."""
    message = r"array_record.* File too large\); make room"
    with no_file_above(2000):
        refused(message, prepare_folder, root, out=tmp_path)
    left = [path.suffix for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert left == [".lock"]
    assert prepare_folder(root, tmp_path).is_dir()

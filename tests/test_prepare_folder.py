import hashlib
import json
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.prepare.folder import prepare_folder
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


def facts(folder: Path) -> dict:
    return json.loads((folder / "metadata.json").read_text())["facts"]


def test_lists_give_names_order_and_classes(root, tmp_path):
    folder = prepare_folder(root, tmp_path / "out")
    assert folder == tmp_path / "out" / "folder" / "my_photos" / "1.0.0"
    train, val = Prepared(folder, "train"), Prepared(folder, "val")
    assert train.classes == ("ant", "fire ant", "bee")
    assert train.names == ("sub/a.1", "b")
    assert val.names == ("c", "a.1")
    np.testing.assert_array_equal(train.counts, [[0, 0, 20], [0, 20, 0]])
    np.testing.assert_array_equal(val.counts, [[20, 0, 0], [20, 0, 0]])
    assert facts(folder)["images"] == {"train": 2, "val": 2}


def test_images_and_masks_come_back(root, tmp_path):
    folder = prepare_folder(root, tmp_path / "out", name="ants")
    assert folder.parent.name == "ants"
    for split in ("train", "val"):
        data = Prepared(folder, split)
        for index, name in enumerate(data.names):
            [path] = (root / "images").glob(f"{name}.[jJpb]*")
            stored = data._records[index]["image"]
            assert stored == path.read_bytes()
            pixels = np.array(Image.open(BytesIO(stored)))
            np.testing.assert_array_equal(data.image(index), pixels)
            mask = np.array(Image.open(root / "masks" / f"{name}.png"))
            np.testing.assert_array_equal(data.label(index), mask)


def test_hash_decides_and_adding_images_moves_none(root, tmp_path):
    for split in ("train", "val"):
        (root / f"{split}.txt").unlink()
    for i in range(60):
        put(root, f"im{i}")
    first = prepare_folder(root, tmp_path / "first", val_share=0.3)
    splits = {split: Prepared(first, split).names for split in ("train", "val")}
    # The rule, by its own definition: the first 8 bytes of SHA-256 as a share.
    for split, names in splits.items():
        assert list(names) == sorted(names)
        shares = [int(hashlib.sha256(n.encode()).hexdigest()[:16], 16) for n in names]
        assert all((share / 16**16 < 0.3) == (split == "val") for share in shares)
    assert len(splits["train"]) + len(splits["val"]) == 64
    for i in range(60, 80):
        put(root, f"im{i}")
    second = prepare_folder(root, tmp_path / "second", val_share=0.3)
    for split, names in splits.items():
        assert set(names) < set(Prepared(second, split).names)


@pytest.mark.parametrize(("given", "other"), [("train", "val"), ("val", "train")])
def test_one_list_leaves_the_rest_to_the_other_split(root, tmp_path, given, other):
    (root / f"{other}.txt").unlink()
    ids = tuple((root / f"{given}.txt").read_text().split())
    folder = prepare_folder(root, tmp_path / "out")
    assert Prepared(folder, given).names == ids
    rest = {"a.1", "b", "c", "sub/a.1"} - set(ids)
    assert Prepared(folder, other).names == tuple(sorted(rest))
    assert f"{given}.txt" in facts(folder)["rules"]


@pytest.mark.parametrize(("share", "split"), [(0, "train"), (1, "val")])
def test_one_split_alone(root, tmp_path, share, split):
    for name in ("train", "val"):
        (root / f"{name}.txt").unlink()
    folder = prepare_folder(root, tmp_path / "out", val_share=share)
    assert Prepared(folder, split).names == ("a.1", "b", "c", "sub/a.1")
    assert facts(folder)["images"] == {split: 4}


def test_images_off_both_lists_are_left_out(root, tmp_path):
    (root / "val.txt").write_text("c\n")
    folder = prepare_folder(root, tmp_path / "out")
    assert facts(folder)["images"] == {"train": 2, "val": 1}


@pytest.mark.parametrize("change", ["mask", "image", "classes", "list"])
def test_preparing_again(root, tmp_path, change):
    folder = prepare_folder(root, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_folder(root, tmp_path / "out") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    if change == "mask":
        put(root, "c", ".bmp", value=3)
    elif change == "image":
        with (root / "images" / "b.jpg").open("ab") as file:
            file.write(b"more")
    elif change == "classes":
        (root / "classes.txt").write_text("ant\nwasp\nbee\n")
    else:
        (root / "val.txt").write_text("a.1\nc\n")
    with pytest.raises(InputError, match=r"made in another way.*(sha256|classes)"):
        prepare_folder(root, tmp_path / "out")


PREPARING = """
import sys, time
from pathlib import Path
from qpenet_jax.data.prepare import folder

root, out, begun, go = map(Path, sys.argv[1:])

def slow(path):
    begun.touch()
    while not go.exists():
        time.sleep(0.01)
    return read_label(path)

read_label, folder.read_label = folder.read_label, slow
print(folder.prepare_folder(root, out))
"""


def test_a_second_process_is_refused_while_the_first_writes(root, tmp_path):
    out, begun, go = (tmp_path / name for name in ("out", "begun", "go"))
    first = subprocess.Popen(
        [sys.executable, "-c", PREPARING, root, out, begun, go],
        stdout=subprocess.PIPE,
        text=True,
    )
    command = [sys.executable, "-m", "qpenet_jax.cli", "prepare", "folder", root]
    with first:
        try:
            while not begun.exists():
                assert first.poll() is None
                time.sleep(0.01)
            second = subprocess.run(
                [*command, "--out", out], capture_output=True, text=True
            )
            assert second.returncode == 2
            assert second.stderr == (
                f"error: {out}/folder/my_photos/1.0.0: another process is preparing "
                "this data set; wait until it has finished, or choose another --out\n"
            )
            assert list((out / "folder/my_photos").glob("incomplete.*"))
        finally:
            go.touch()
        assert first.wait() == 0
        assert first.stdout
        folder = Path(first.stdout.read().strip())
    assert list(folder.parent.iterdir()) == [folder]
    assert Prepared(folder, "train").names == ("sub/a.1", "b")
    assert Prepared(folder, "val").names == ("c", "a.1")


def test_hidden_files_and_others_are_no_images(root, tmp_path):
    for name in ("._b.jpg", ".DS_Store", "Thumbs.db", "notes.txt"):
        (root / "images" / name).write_bytes(b"no image")
    (root / "masks" / "._b.png").write_bytes(b"no mask")
    folder = prepare_folder(root, tmp_path / "out")
    assert facts(folder)["images"] == {"train": 2, "val": 2}


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        ("5 shots!", "_5_shots_"),
        ("a-b.c", "a_b_c"),
        ("été", "été"),
        ("1.0.0", "_1_0_0"),
    ],
)
def test_the_name_becomes_an_identifier(root, tmp_path, name, identifier):
    folder = prepare_folder(root, tmp_path / "out", name=name)
    assert folder.parent.name == identifier
    assert Prepared(folder, "val").version == f"folder/{identifier}/1.0.0"


# --- What can be wrong, each told in one line ---


def remove(path: str):
    return lambda root: (root / path).unlink()


def write(path: str, content: bytes):
    return lambda root: (root / path).write_bytes(content)


def empty(root: Path) -> None:
    for path in [*(root / "images").rglob("*.*"), *(root / "masks").rglob("*.*")]:
        path.unlink()


def without(folder: str):
    return lambda root: (root / folder).rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("images"), r"folder .*images doesn't exist"),
        (without("masks"), r"folder .*masks doesn't exist"),
        (without("classes.txt"), r"classes\.txt: no such text file"),
        (empty, r"images holds no image"),
        (remove("masks/sub/a.1.png"), r"a\.1\.JPG has no mask .*masks/sub/a\.1\.png;"),
        (remove("images/b.jpg"), r"masks/b\.png has no image"),
        (
            write("images/b.png", b"x"),
            r"images/b\.jpg and .*images/b\.png share a name",
        ),
        (write("classes.txt", b" \n\n"), r"classes\.txt is empty"),
        (write("classes.txt", b"\xff\xfe\x00"), r"classes\.txt: no such text file"),
        (write("classes.txt", b"ant\n\nbee\n"), r"classes\.txt: line 2 is empty"),
        (write("classes.txt", b"ant\nbee\nant\n"), r"ant is listed 2 times; keep one"),
        (write("classes.txt", b"_background_\nant\n"), r"take out .*'_background_'"),
        (
            write("classes.txt", "\n".join(map(str, range(255))).encode()),
            r"255 classes; at most 254 fit",
        ),
        (
            write("classes.txt", b"ant\nbee\n"),
            r"sub/a\.1\.png: .* 3 is no class.* 0\.\.2 or 255",
        ),
        (write("train.txt", b"\n"), r"train\.txt is empty"),
        (write("train.txt", b"b\nb\n"), r"train\.txt: b is listed 2 times"),
        (write("train.txt", b"b.jpg\n"), r"no image 'b\.jpg'; .*without file ending"),
        (write("train.txt", b"b\nc\n"), r"c is in train\.txt and val\.txt"),
        (write("images/b.jpg", b"no image"), r"images/b\.jpg: not an image"),
        (write("masks/b.png", b"no mask"), r"masks/b\.png: not an image"),
    ],
)
def test_what_can_be_wrong(root, tmp_path, spoil, message):
    spoil(root)
    with pytest.raises(InputError, match=message) as error:
        prepare_folder(root, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("folder/*/1.0.0"))


def test_mask_of_another_size(root, tmp_path):
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(root / "masks" / "b.png")
    with pytest.raises(
        InputError, match=r"masks/b\.png: mask of 16x12 .* image of 17x12"
    ):
        prepare_folder(root, tmp_path / "out")


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_share_out_of_range(root, tmp_path, share):
    for split in ("train", "val"):
        (root / f"{split}.txt").unlink()
    with pytest.raises(InputError, match=rf"val_share {share}: choose"):
        prepare_folder(root, tmp_path / "out", val_share=share)


def test_too_few_images_for_the_share(root, tmp_path):
    for split in ("train", "val"):
        (root / f"{split}.txt").unlink()
    with pytest.raises(InputError, match=r"no image fell to val .*val\.txt.*1e-09"):
        prepare_folder(root, tmp_path / "out", val_share=1e-9)

import copy
import functools
import hashlib
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED_DATA
from preparing import (
    check_split,
    cut_off,
    facts,
    jpeg,
    pack,
    pixels_of_classes,
    refused,
    without,
    write,
)
from pycocotools import mask as rle

from qpenet_jax.data.folds import COCO_CLASSES
from qpenet_jax.data.prepare.coco import Instances, prepare_coco, unpack_annotations
from qpenet_jax.data.sources.prepared import Prepared

# pycocotools' arrays under NumPy 2, where a test calls it; the package is silent.
calls_pycocotools = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

# The ids up to 90 that COCO doesn't use; see its paper's list of 91 categories.
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
IDS = [i for i in range(1, 91) if i not in GAPS]
PERSON, STOP_SIGN, BACKPACK, TOOTHBRUSH = 1, 13, 27, 90
HEIGHT, WIDTH = 40, 60


def box(x: int, y: int, width: int, height: int) -> list[float]:
    """A polygon around whole pixels: it covers exactly [y:y+height, x:x+width]."""
    right, bottom = x + width, y + height
    return [float(v) for v in (x, y, right, y, right, bottom, x, bottom)]


def runs(*counts: int) -> dict:
    """An uncompressed RLE: runs of 0, 1, 0, ... down the columns."""
    return {"size": [HEIGHT, WIDTH], "counts": list(counts)}


def annotation(number, image, category, segmentation, crowd=0) -> dict:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": crowd,
    }


CONTENT = {
    "images": [
        {"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg", "height": h, "width": w}
        for n, h, w in [(42, 40, 60), (7, 40, 60), (9, 40, 60), (3, 50, 30), (8, 9, 9)]
    ],
    # Annotations of several images in turn, as in the official files.
    "annotations": [
        annotation(1, 42, PERSON, [box(2, 3, 10, 20), box(40, 5, 8, 6)]),
        annotation(2, 3, BACKPACK, [box(0, 0, 30, 50)]),
        annotation(3, 42, STOP_SIGN, [box(8, 10, 12, 5)]),  # over the person
        annotation(4, 9, PERSON, runs(100, 50, 2250), crowd=1),  # nothing else there
        annotation(5, 42, BACKPACK, runs(0, HEIGHT * WIDTH), crowd=1),
        annotation(6, 7, TOOTHBRUSH, runs(80, 40, 2280)),  # column 2, no crowd
        annotation(7, 3, TOOTHBRUSH, [box(10, 10, 5, 5)]),
        annotation(8, 3, BACKPACK, [box(12, 12, 5, 5)]),  # the first class once more
    ],
    "categories": [
        {"id": i, "name": n} for i, n in zip(IDS, COCO_CLASSES, strict=True)
    ][::-1],
}


def expected_labels() -> dict[str, np.ndarray]:
    """The label maps of CONTENT, painted by hand."""
    street, brush, bags = (
        np.zeros(s, np.uint8) for s in ((40, 60), (40, 60), (50, 30))
    )
    street[3:23, 2:12] = 1
    street[5:11, 40:48] = 1
    street[10:15, 8:20] = 12
    brush[:, 2] = 80
    bags[:] = 25
    bags[10:15, 10:15] = 80
    bags[12:17, 12:17] = 25
    names = (f"COCO_val2014_{n:012d}" for n in (42, 7, 3))
    return dict(zip(names, (street, brush, bags), strict=True))


@pytest.fixture
def root(tmp_path) -> Path:
    """The annotation file, and a folder with the images that show more than crowds."""
    root = tmp_path / "coco"
    (root / "val2014").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for image in CONTENT["images"][:2] + CONTENT["images"][3:4]:
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), np.uint8)
        (root / "val2014" / image["file_name"]).write_bytes(jpeg(pixels))
    save(root, CONTENT)
    return root


def save(root: Path, content, name: str = "instances_val2014.json") -> Path:
    path = root / name
    path.write_text(json.dumps(content))
    return path


def prepare(root: Path, out: Path) -> Path:
    return prepare_coco([root / "val2014"], [root / "instances_val2014.json"], out)


def check(folder: Path, images: Path, split: str) -> None:
    """Compare a data set with CONTENT's label maps painted by hand."""
    labels = {n.replace("val", split): x for n, x in expected_labels().items()}
    files = {name: (images / f"{name}.jpg").read_bytes() for name in labels}
    assert check_split(folder, split, labels, files).classes == COCO_CLASSES


def test_labels_order_names_and_facts(root, tmp_path, capfd):
    folder = prepare(root, tmp_path / "out")
    assert capfd.readouterr().out == ""
    assert folder == tmp_path / "out" / "coco20i" / "2014" / "1.0.0"
    check(folder, root / "val2014", "val")
    sha = hashlib.sha256((root / "instances_val2014.json").read_bytes()).hexdigest()
    found = facts(folder)
    assert found["annotations"] == [{"name": "instances_val2014.json", "sha256": sha}]
    assert found["images"] == {"val": 3}
    assert "crowds skipped" in found["rules"]


@calls_pycocotools
def test_compressed_runs_and_polygons_that_enclose_nothing(root):
    """Published files hold some; pycocotools takes four numbers for a box."""
    content = copy.deepcopy(CONTENT)
    polygons = content["annotations"][0]["segmentation"]
    polygons.insert(0, [5.0, 5.0, 30.0, 30.0])
    polygons.append([7.0, 7.0])
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[5:9, 3:50] = 1
    encoded = rle.encode(mask)
    encoded["counts"] = encoded["counts"].decode()
    content["annotations"].append(annotation(9, 7, STOP_SIGN, encoded))
    instances = Instances(save(root, content))
    expected = expected_labels()
    expected["COCO_val2014_000000000007"][5:9, 3:50] = 12
    for name, label in expected.items():
        np.testing.assert_array_equal(instances.label(name), label)


@pytest.mark.parametrize("packed", [False, True])
def test_two_splits_from_nested_folders_or_zips(root, tmp_path, packed):
    """Zips of annotations, as `--download` fetches them, are unpacked."""
    for path in sorted((root / "val2014").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("val", "train")))
    content = json.dumps(CONTENT)
    for split in ("train", "val"):
        path = root / f"instances_{split}2014.json"
        path.write_text(content.replace("COCO_val", f"COCO_{split}"))
    images, annotations = root, [*root.glob("*.json")]
    if packed:
        photos = {f"a/b/{p.name}": p.read_bytes() for p in root.glob("val2014/*")}
        images = pack(tmp_path / "all.zip", photos)
        files = {f"annotations/{p.name}": p.read_bytes() for p in annotations}
        other = {"annotations/captions_val2014.json": b"{}"}
        annotations = unpack_annotations(pack(tmp_path / "x.zip", files | other))
        assert annotations == [tmp_path / name for name in sorted(files)]
    folder = prepare_coco([images], annotations, tmp_path / "out")
    for split in ("train", "val"):
        check(folder, root / "val2014", split)
    archives = facts(folder)["archives"]
    assert [a["name"] for a in archives] == (["all.zip"] if packed else [])


# --- What can be wrong, each said in one line ---


def changed(content: dict, path: str, value) -> dict:
    """Return `content` with the item at `path`, such as "images.0.id", replaced."""
    content = copy.deepcopy(content)
    *keys, last = (int(k) if k.isdigit() else k for k in path.split("."))
    item = functools.reduce(lambda item, key: item[key], keys, content)
    if value is None:
        del item[last]
    else:
        item[last] = value
    return content


MISSING = ("images", "annotations", "categories", "images.0.file_name")
MISSING += ("images.0.height",)
MISSING += tuple(f"annotations.0.{k}" for k in ("image_id", "category_id", "iscrowd"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *((p, None, rf"no '{p.rpartition('.')[2]}' in it") for p in MISSING),
        ("images.0.width", "wide", r"has height 40 and width 'wide'; correct them"),
        ("images.0.width", 1e400, r"height 40 and width inf; correct"),
        ("images.0.width", 10**9, r"height 40 and width 1000000000; correct"),
        ("images.0.height", 40.5, r"height 40.5 and width 60; correct"),
        ("images.0.height", 0, r"height 0 and width 60; correct"),
        ("images.1.id", 42, r"two images have the id 42; give each its own"),
        ("annotations.1.id", 1, r"two annotations have the id 1; give each its own"),
        ("categories.1.id", 90, r"two categories have the id 90; give each"),
        ("annotations.0.iscrowd", "0", r"annotation 1 has the iscrowd '0', which"),
        ("annotations.0.segmentation", None, r"annotation 1 of .*42.*\(no 'segment"),
        ("annotations.0.segmentation", [], r"annotation 1 of COCO_val.* can't be dr"),
        ("annotations.0.segmentation", [["a"] * 6], r"annotation 1 .* can't be drawn"),
        ("annotations.0.segmentation.0.3", 1e9, r"\(1000000000.0 is no coordinate in"),
        ("annotations.0.segmentation.0.3", -61, r"\(-61 is no coordinate in"),
        ("annotations.0.segmentation.0.3", 10**30, r"\(10+ is no coordinate in"),
        ("annotations.0.segmentation.0.3", math.nan, r"\(nan is no coordinate in"),
        ("annotations.0.segmentation.0.3", -math.inf, r"\(-inf is no coordinate in"),
        ("annotations.0.segmentation.0.3", True, r"\(True is no coordinate in"),
        ("annotations.0.segmentation", [box(1, 1, 5, 5)[:4]], r"three points or more"),
        ("annotations.0.segmentation", [box(1, 1, 5, 5)[:7]], r"each x and y"),
        ("annotations.0.segmentation", box(1, 1, 5, 5), r"is a list of points"),
        ("annotations.0.segmentation", [[], [1, 1]], r"three points or more"),
        ("annotations.0.segmentation", "1,2", r"neither polygons nor run lengths"),
        ("annotations.5.segmentation.counts", [80, -40, 2360], r"no whole number"),
        ("annotations.5.segmentation.counts", [80, 40], r"cover 120 of 2400 pixels"),
        ("annotations.5.segmentation.counts", [0, 10**12], r"cover 10+ of 2400"),
        ("annotations.5.segmentation.counts", "PPYo1", r"run|cover|broken"),
        ("annotations.5.segmentation.counts", "oooooooooooooo", r"broken run lengths"),
        ("annotations.5.segmentation.counts", "o", r"broken run lengths"),
        ("annotations.5.segmentation.counts", None, r"\(no 'counts' in it\)"),
        ("annotations.5.segmentation.size", [60, 40], r"annotation 6 .* can't be dr"),
        ("annotations.2.image_id", 666, r"annotation 3 has the image_id 666, which"),
        (
            "annotations.0.category_id",
            12,
            r"annotation 1 has the category_id 12,",
        ),
        ("categories.0.name", "tooth brush", r"categories aren't COCO's 80"),
        ("categories.0", None, r"categories aren't COCO's 80"),
        ("categories.0.id", 2.5, r"categories: id 2.5 is no whole number"),
        ("images.1.file_name", "COCO_val2014_000000000042.png", r"two images have one"),
        ("annotations", [], r"no image has an annotation but crowds"),
    ],
)
def test_what_can_be_wrong_in_the_file(root, tmp_path, path, value, message):
    save(root, changed(CONTENT, path, value))
    refused(rf"val2014\.json.*{message}", prepare, root, out=tmp_path / "out")


JSON, JPEG = "instances_val2014.json", "val2014/COCO_val2014_000000000003.jpg"
NARROW = jpeg(np.zeros((49, 30, 3), np.uint8))
BROKEN = ('{"images": [', "", "[]", "\x00", "[" * 100_000)


def copy_images(root: Path) -> None:
    shutil.copytree(root / "val2014", root / "val2014/sub")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *((write(JSON, x.encode()), f"{JSON} isn't an instances file") for x in BROKEN),
        (without(JSON), f"{JSON}: no such file"),
        (without("val2014"), "val2014: no such file"),
        (without(JPEG), r"no image of COCO_.*3.jpg in .*val2014 \(1 of 3 are miss"),
        (copy_images, r"(COCO_val2014_0+\d+\.jpg).*\1 share a name"),
        (cut_off(JPEG, 300), f"{JPEG}: broken image"),
        (cut_off(JPEG, -200), f"{JPEG}: broken image"),
        (write(JPEG, NARROW), rf"{JSON}: .*3.jpg: .* 30x50 .* of 30x49"),
    ],
)
def test_what_can_be_wrong_with_the_files(root, tmp_path, spoil, message):
    spoil(root)
    refused(message, prepare, root, out=tmp_path / "out")


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["instances_val2015.json"],
        ["captions_val2014.json"],
        ["instances_train2014.json", "instances_val2017.json"],
        ["a/instances_val2014.json", "b/instances_val2014.json"],
    ],
)
def test_names_of_annotation_files(tmp_path, names):
    paths = [tmp_path / name for name in names]
    last = names[-1] if names else "none"
    message = rf"annotations .*{last}\)?: give instances_train"
    refused(message, prepare_coco, [tmp_path], paths, out=tmp_path / "out")


# --- Real COCO images and annotations ---


@calls_pycocotools
def test_real_masks_agree_with_pycocotools(tmp_path):
    """Each polygon is decoded on its own; overlaps belong to the later annotation."""
    root = SHARED_DATA / "coco"
    if not root.is_dir():
        pytest.skip(f"no real COCO data at {root}")
    path = root / "annotations" / "instances_train2017.json"
    data = Prepared(prepare_coco([root / "train2017"], [path], tmp_path), "train")
    content = json.loads(path.read_text())
    assert len(content["annotations"]) == 929
    of_image = defaultdict(list)
    for item in content["annotations"]:
        of_image[item["image_id"]].append(item)
    images = [image for image in content["images"] if image["id"] in of_image]
    assert [image["file_name"] for image in images] == [f"{n}.jpg" for n in data.names]
    overlaps = 0
    for index, image in enumerate(images):
        size = image["height"], image["width"]
        label = np.zeros(size, np.uint8)
        for item in of_image[image["id"]]:
            rank = IDS.index(item["category_id"]) + 1
            mask = rle.decode(rle.frPyObjects(item["segmentation"], *size)).any(axis=2)
            overlaps += np.count_nonzero(mask & (label > 0) & (label != rank))
            label[mask] = rank
        np.testing.assert_array_equal(data.label(index), label)
        np.testing.assert_array_equal(data.counts[index], pixels_of_classes(label, 80))
    assert overlaps > 10_000  # else nothing was said about them

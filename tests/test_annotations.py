"""What a user can mark a support with, and what is refused."""

import base64
import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco

from qpenet_jax.core.errors import InputError, InputWarning
from qpenet_jax.masks.annotations import parse_support, read_support, read_supports
from qpenet_jax.masks.polygons import outlines

HEIGHT, WIDTH = 40, 50


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT), (9, 8, 7)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def box_mask(top, left, height, width):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def read(photo, marks, name=None):
    """Reads marks, which may be the content of a JSON file beside the photo."""
    if isinstance(marks, dict):
        (photo.parent / "a.json").write_text(json.dumps(marks))
        marks = photo.parent / "a.json"
    given = f"{photo}:{marks}" if name is None else f"{name}={photo}:{marks}"
    return read_support(parse_support(given))


def refused(photo, marks, message, name=None):
    with pytest.raises(InputError) as error:
        read(photo, marks, name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, **more}


def labelme(*shapes, size=(HEIGHT, WIDTH)):
    height, width = size
    content = {"shapes": list(shapes), "imagePath": "a.png", "imageData": None}
    return content | {"imageHeight": height, "imageWidth": width}


def listed(file_name="x/a.png", number=5, height=HEIGHT, width=WIDTH):
    return {"id": number, "file_name": file_name, "height": height, "width": width}


def coco(*annotations, images=()):
    return {
        "images": list(images) or [listed()],
        "categories": [{"id": 3, "name": "dog"}, {"id": 90, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 5, **annotation}
            for i, annotation in enumerate(annotations)
        ],
    }


SQUARE = [[10, 5], [19, 5], [19, 14], [10, 14]]
"""Pixels 10 to 19 across and 5 to 14 down, as labelme draws it."""

BOX = box_mask(5, 10, 10, 10)
DOG = {"category_id": 3, "segmentation": [[10, 5, 20, 5, 20, 15, 10, 15]]}
CAT = {"category_id": 90, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}


def test_names_and_paths_are_distinguished(photo, tmp_path):
    assert parse_support("dog=a.jpg:a.png")[:1] == ("dog",)
    assert parse_support("a.jpg:box=1,2,3,4")[0] is None
    assert parse_support("big dog=a.jpg:polygon=1,2,3").name == "big dog"
    folder = tmp_path / "run=3"
    folder.mkdir()
    photo.rename(folder / "a.png")
    with contextlib.chdir(tmp_path):
        found = parse_support("run=3/a.png:m.png")
    assert (found.name, str(found.image)) == (None, "run=3/a.png")
    assert parse_support("/x=3/a.png:/x=3/m.png").name is None
    for text in ("a.jpg", "=a.jpg:a.png", "dog=a.jpg", "a.jpg:", ":a.png", "x\ny=a:b"):
        with pytest.raises(InputError, match="--support"):
            parse_support(text)
    with pytest.raises(InputError, match="only files of this machine"):
        parse_support("dog=gs://bucket/a.jpg:a.png")


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ("box=10,5,20,30", box_mask(5, 10, 30, 20)),
        ("box=9.4,5,1.2,1", box_mask(5, 9, 1, 2)),  # of a pixel, the centre counts
        ("polygon=10,5,20,5,20,15,10,15", BOX),
        (labelme(shape("dog", SQUARE)), BOX),
        (labelme(shape("dog", SQUARE, None)), BOX),
        (labelme(shape("dog", SQUARE, "oriented_rectangle")), BOX),
        (labelme(shape("dog", [[10, 5], [19, 14]], "rectangle")), BOX),
        (labelme(shape("dog", [[19, 14], [10, 5]], "rectangle")), BOX),
        (coco(DOG), BOX),
    ],
)
def test_marks_are_drawn_as_their_tools_draw_them(photo, marks, expected):
    marked = read(photo, marks)
    np.testing.assert_array_equal(marked.mask, expected)
    assert marked.label == ("dog" if isinstance(marks, dict) else None)


def test_labelmes_masks_circles_and_parts_are_drawn(photo):
    png = io.BytesIO()
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).save(png, "PNG")
    text = base64.b64encode(png.getvalue()).decode()
    stored = shape("dog", [[7, 3], [10, 6]], "mask", mask=text)
    expected = BOX.copy()
    expected[[3, 4, 5, 6], [7, 8, 9, 10]] = 1
    marked = read(photo, labelme(stored, shape("dog", SQUARE)))
    np.testing.assert_array_equal(marked.mask, expected)
    circle = read(photo, labelme(shape("sun", [[20, 20], [20, 30]], "circle")))
    assert abs(circle.mask.sum() - np.pi * 10.5**2) < 5
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.6  # holes
    written = [shape("dog", polygon.tolist()) for polygon in outlines(mask)]
    np.testing.assert_array_equal(read(photo, labelme(*written)).mask, mask)


def test_the_label_of_a_json_file_is_chosen_by_the_name(photo):
    dog, cat = shape("dog", SQUARE), shape("cat", [[0, 0], [4, 0], [4, 4], [0, 4]])
    marks = labelme(dog, cat, shape("nose", [[3, 3]], "point"), size=(None, None))
    assert read(photo, marks, "cat").mask.sum() == 25
    assert read(photo, marks, "dog").mask.sum() == 100
    refused(photo, marks, "has the labels cat, dog, nose: choose one")
    refused(photo, marks, "no label 'cow' in this photo, but cat, dog, nose", "cow")
    drawn = "shape 3, of the label nose, can't be drawn (a point has no area)"
    refused(photo, marks, drawn, "nose")


def test_cocos_annotations_are_marks(photo, tmp_path):
    runs = pycoco.encode(np.asfortranarray(box_mask(2, 3, 5, 7)))
    rle = {"size": [40, 50], "counts": runs["counts"].decode()}
    dogs = DOG, {"category_id": 3, "segmentation": rle, "iscrowd": 0}
    crowd = {"category_id": 90, "segmentation": rle, "iscrowd": 1}
    marked = read(photo, coco(*dogs, crowd))  # but for the crowd, there is one category
    np.testing.assert_array_equal(marked.mask, BOX | box_mask(2, 3, 5, 7))
    assert read(photo, coco(*dogs, CAT), "cat").mask.sum() == 16
    refused(photo, coco(*dogs, CAT), "labels cat, dog")
    twice = listed("b/a.png", 1), listed(f"{tmp_path.name}/a.png")
    found = read(photo, coco(DOG, images=twice))
    assert found.mask.sum() == 100, "the one whose folders are the photo's"


BROKEN = [
    *(
        shape("dog", [[1, 2], point, [4, 5]])
        for point in ([3, 1e300], [3, 4, 5], [3, True], ["3", 4])
    ),
    shape("dog", [[1, 2], [3, 4]]),
    shape("dog", [[1, 2]], "circle"),
    shape("dog", [], "rectangle"),
    shape("dog", [[48, 3], [51, 6]], "mask", mask="AAAA"),
    shape("dog", [[7, 3], [10, 6]], "mask"),
    *(shape("dog", points) for points in (None, 3)),
    {"label": 3, "points": SQUARE},
    {"points": SQUARE},
    3,
]


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ("box=10,5,45,35", "width,height, not two corners"),
        ("box=-1,5,4,3", "which is 50 pixels wide and 40 high"),
        ("box=10,5,0,3", "no foreground"),
        *((f"box={text}", "box=") for text in ("1,2,3", "1,2,3,x", "nan,1,2,3", "")),
        ("box=inf,1,2,3", "box="),
        ("polygon=1,2,3,4", "three points"),
        ("polygon=1,2,3,4,5,6,7", "x and y"),
        ("polygon=1,2,3,4,5,1e9", "is no coordinate"),
        ("polygon=1,2,3,4,5,a", "give numbers"),
        *((labelme(broken), "a.json") for broken in BROKEN),
        (labelme(), "marks nothing"),
        (labelme(shape("dog", SQUARE), size=(50, 40)), "40x50 pixels for an image of"),
        (labelme(shape("dog", SQUARE), size=("x", -3)), "a.json"),
        ({}, "isn't a JSON file of labelme or COCO"),
        ("none.json", "no such file"),
        ("cut.json", "cut.json"),
        (coco(DOG, images=[listed("b.png")]), "no image called a.png"),
        (
            coco(images=[listed("a/a.png", 1), listed("b/a.png")]),
            "2 images called",
        ),
        (coco(DOG, images=[listed("a.png", 5, 50, 40)]), "40x50 pixels for"),
        (
            coco(DOG | {"segmentation": [[1, 2, 3, 4, 5, 1e99]]}),
            "annotation 0 of a.png can't be drawn",
        ),
        (coco(DOG | {"category_id": 7}), "isn't a JSON file of"),
    ],
)
def test_wrong_marks_are_refused(photo, tmp_path, marks, message):
    (tmp_path / "cut.json").write_text('{"shapes": [], "shapes": [')
    with contextlib.chdir(tmp_path):
        refused(photo, marks, message)


def test_marks_that_may_be_of_the_stored_pixels_are_warned_of(tmp_path):
    """labelme turns a photo as its metadata say; who writes COCO's files may not."""
    exif = Image.Exif()
    exif[0x0112] = 3
    photo = tmp_path / "a.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(photo, exif=exif)
    Image.fromarray(BOX).save(tmp_path / "mask.png")
    shapes = "box=1,1,5,5", "polygon=1,1,5,5,1,5"
    for marks in (*shapes, coco(DOG), tmp_path / "mask.png"):
        with pytest.warns(InputWarning, match="must be drawn on the turned image"):
            assert read(photo, marks).mask.any()
    assert read(photo, labelme(shape("dog", SQUARE))).mask.any()


def test_supports_are_grouped_by_class(photo, tmp_path):
    box, files = f"{photo}:box=1,1,5,5", []
    for label in ("dog", "cat"):
        files.append(f"{photo}:{tmp_path / label}.json")
        content = json.dumps(labelme(shape(label, SQUARE)))
        (tmp_path / f"{label}.json").write_text(content)

    def classes(*texts):
        found = read_supports([parse_support(text) for text in texts])
        return {name: len(masks) for name, (_, masks) in found.items()}

    assert classes(f"b={box}", f"a={box}", f"b={box}") == {"b": 2, "a": 1}
    assert classes(box, box) == {"object": 2}
    assert classes(box, files[0]) == {"dog": 2}
    with pytest.raises(InputError, match="every --support a name"):
        classes(f"dog={box}", box)
    with pytest.raises(InputError, match="the labels cat, dog"):
        classes(*files)

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
    given = f"{photo}:{marks}" if name is None else f"{name}={photo}:{marks}"
    return read_support(parse_support(given))


def refusal(photo, marks, name=None):
    with pytest.raises(InputError) as error:
        read(photo, marks, name)
    assert "\n" not in str(error.value)
    return str(error.value)


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, **more}


def labelme(folder, *shapes, size=(HEIGHT, WIDTH), name="a.json"):
    content = {"shapes": list(shapes), "imagePath": "a.png", "imageData": None}
    if size is not None:
        content |= {"imageHeight": size[0], "imageWidth": size[1]}
    (folder / name).write_text(json.dumps(content))
    return folder / name


SQUARE = [[10, 5], [19, 5], [19, 14], [10, 14]]
"""Pixels 10 to 19 across and 5 to 14 down, as labelme draws it."""


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


def test_a_box_is_x_y_width_height(photo):
    marked = read(photo, "box=10,5,20,30")
    np.testing.assert_array_equal(marked.mask, box_mask(5, 10, 30, 20))
    marked = read(photo, "box=9.4,5,1.2,1")  # of a pixel, the centre counts
    np.testing.assert_array_equal(marked.mask, box_mask(5, 9, 1, 2))
    assert "width,height, not two corners" in refusal(photo, "box=10,5,45,35")
    assert "which is 50 pixels wide and 40 high" in refusal(photo, "box=-1,5,4,3")
    assert "no foreground" in refusal(photo, "box=10,5,0,3")
    for marks in ("box=1,2,3", "box=1,2,3,x", "box=nan,1,2,3", "box=inf,1,2,3", "box="):
        assert "box=" in refusal(photo, marks)


def test_a_polygon_is_drawn_as_coco_draws_it(photo):
    marked = read(photo, "polygon=10,5,20,5,20,15,10,15")
    np.testing.assert_array_equal(marked.mask, box_mask(5, 10, 10, 10))
    assert "three points" in refusal(photo, "polygon=1,2,3,4")
    assert "x and y" in refusal(photo, "polygon=1,2,3,4,5,6,7")
    assert "is no coordinate" in refusal(photo, "polygon=1,2,3,4,5,1e9")
    assert "give numbers" in refusal(photo, "polygon=1,2,3,4,5,a")


def test_labelmes_shapes_are_drawn_as_labelme_draws_them(photo, tmp_path):
    png = io.BytesIO()
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).save(png, "PNG")
    text = base64.b64encode(png.getvalue()).decode()
    for given, expected in (
        (shape("dog", SQUARE), box_mask(5, 10, 10, 10)),
        (shape("dog", [[10, 5], [19, 14]], "rectangle"), box_mask(5, 10, 10, 10)),
        (shape("dog", [[19, 14], [10, 5]], "rectangle"), box_mask(5, 10, 10, 10)),
        (shape("dog", SQUARE, "oriented_rectangle"), box_mask(5, 10, 10, 10)),
        (shape("dog", SQUARE, None), box_mask(5, 10, 10, 10)),
    ):
        marked = read(photo, labelme(tmp_path, given))
        np.testing.assert_array_equal(marked.mask, expected)
        assert marked.label == "dog"
    stored = shape("dog", [[7, 3], [10, 6]], "mask", mask=text)
    marked = read(photo, labelme(tmp_path, stored, shape("dog", SQUARE)))
    expected = box_mask(5, 10, 10, 10)
    expected[[3, 4, 5, 6], [7, 8, 9, 10]] = 1
    np.testing.assert_array_equal(marked.mask, expected)
    sun = shape("sun", [[20, 20], [20, 30]], "circle")
    circle = read(photo, labelme(tmp_path, sun))
    assert abs(circle.mask.sum() - np.pi * 10.5**2) < 5


def test_the_label_of_a_json_file_is_chosen_by_the_name(photo, tmp_path):
    dog, cat = shape("dog", SQUARE), shape("cat", [[0, 0], [4, 0], [4, 4], [0, 4]])
    dot = shape("nose", [[3, 3]], "point")
    path = labelme(tmp_path, dog, cat, dot, size=None)
    assert read(photo, path, "cat").mask.sum() == 25
    assert read(photo, path, "dog").mask.sum() == 100
    error = refusal(photo, path)
    assert "has the labels cat, dog, nose: choose one" in error
    assert "no label 'cow' in this photo, but cat, dog, nose" in refusal(
        photo, path, "cow"
    )
    assert "shape 1 of the label nose can't be drawn (a point has no area)" in refusal(
        photo, path, "nose"
    )
    assert "marks nothing" in refusal(photo, labelme(tmp_path))


@pytest.mark.parametrize(
    "given",
    [
        shape("dog", [[1, 2], [3, float("1e300")], [4, 5]]),
        shape("dog", [[1, 2], [3, 4, 5], [4, 5]]),
        shape("dog", [[1, 2], [3, True], [4, 5]]),
        shape("dog", [[1, 2], ["3", 4], [4, 5]]),
        shape("dog", [[1, 2], [3, 4]]),
        shape("dog", [[1, 2]], "circle"),
        shape("dog", [], "rectangle"),
        shape("dog", [[48, 3], [51, 6]], "mask", mask="AAAA"),
        shape("dog", [[7, 3], [10, 6]], "mask"),
        shape("dog", None),
        shape("dog", 3),
        {"label": 3, "points": SQUARE},
        {"points": SQUARE},
        3,
    ],
)
def test_broken_shapes_are_one_line(photo, tmp_path, given):
    assert "a.json" in refusal(photo, labelme(tmp_path, given))


def test_marks_of_another_photo_are_refused(photo, tmp_path):
    dog = shape("dog", SQUARE)
    error = refusal(photo, labelme(tmp_path, dog, size=(WIDTH, HEIGHT)))
    assert "40x50 pixels for an image of 50x40" in error
    assert "a.json" in refusal(photo, labelme(tmp_path, dog, size=("x", -3)))
    (tmp_path / "b.json").write_text("{}")
    assert "isn't a JSON file of labelme or COCO" in refusal(photo, tmp_path / "b.json")
    (tmp_path / "b.json").write_text('{"shapes": [], "shapes": [')
    assert "b.json" in refusal(photo, tmp_path / "b.json")
    assert "no such file" in refusal(photo, tmp_path / "none.json")


def coco(folder, *annotations, images=None, name="instances.json"):
    images = images or [{"id": 5, "file_name": "x/a.png", "height": 40, "width": 50}]
    content = {
        "images": images,
        "categories": [{"id": 3, "name": "dog"}, {"id": 90, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 5, **annotation}
            for i, annotation in enumerate(annotations)
        ],
    }
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_cocos_annotations_are_marks(photo, tmp_path):
    runs = pycoco.encode(np.asfortranarray(box_mask(2, 3, 5, 7)))
    rle = {"size": [40, 50], "counts": runs["counts"].decode()}
    dog = {"category_id": 3, "segmentation": [[10, 5, 20, 5, 20, 15, 10, 15]]}
    dogs = dog, {"category_id": 3, "segmentation": rle, "iscrowd": 0}
    cat = {"category_id": 90, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
    crowd = {"category_id": 90, "segmentation": rle, "iscrowd": 1}
    path = coco(tmp_path, *dogs, crowd)
    marked = read(photo, path)  # but for the crowd, there is one category
    both = box_mask(5, 10, 10, 10) | box_mask(2, 3, 5, 7)
    np.testing.assert_array_equal(marked.mask, both)
    assert marked.label == "dog"
    path = coco(tmp_path, *dogs, cat)
    assert read(photo, path, "cat").mask.sum() == 16
    assert "labels cat, dog" in refusal(photo, path)
    other = [{"id": 5, "file_name": "b.png", "height": 40, "width": 50}]
    assert "no image called a.png" in refusal(photo, coco(tmp_path, dog, images=other))
    twice = [
        {"id": i, "file_name": f"{i}/a.png", "height": 40, "width": 50} for i in "ab"
    ]
    assert "2 images called a.png" in refusal(photo, coco(tmp_path, images=twice))
    twice[1] |= {"id": 5, "file_name": f"{tmp_path.name}/a.png"}
    found = read(photo, coco(tmp_path, dog, images=twice))
    assert found.mask.sum() == 100, "the one whose folders are the photo's"
    turned = [{"id": 5, "file_name": "a.png", "height": 50, "width": 40}]
    assert "40x50 pixels for" in refusal(photo, coco(tmp_path, dog, images=turned))
    bad = dog | {"segmentation": [[1, 2, 3, 4, 5, 1e99]]}
    assert "annotation 0 of a.png can't be drawn" in refusal(photo, coco(tmp_path, bad))
    unknown = dog | {"category_id": 7}
    assert "isn't a JSON file of" in refusal(photo, coco(tmp_path, unknown))


def test_marks_that_may_be_of_the_stored_pixels_are_warned_of(tmp_path):
    """labelme turns a photo as its metadata say; who writes COCO's files may not."""
    exif = Image.Exif()
    exif[0x0112] = 3
    photo = tmp_path / "a.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(photo, exif=exif)
    dog = {"category_id": 3, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
    images = [{"id": 5, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}]
    file = coco(tmp_path, dog, images=images)
    for marks in ("box=1,1,5,5", "polygon=1,1,5,5,1,5", file):
        with pytest.warns(InputWarning, match="must be drawn on the turned image"):
            assert read(photo, marks).mask.any()
    assert read(photo, labelme(tmp_path, shape("dog", SQUARE))).mask.any()


def test_supports_are_grouped_by_class(photo, tmp_path):
    box = f"{photo}:box=1,1,5,5"
    mine = labelme(tmp_path, shape("dog", SQUARE))
    theirs = labelme(tmp_path, shape("cat", SQUARE), name="b.json")

    def classes(*texts):
        found = read_supports([parse_support(text) for text in texts])
        return {name: len(masks) for name, (_, masks) in found.items()}

    assert classes(f"b={box}", f"a={box}", f"b={box}") == {"b": 2, "a": 1}
    assert classes(box, box) == {"object": 2}
    assert classes(box, f"{photo}:{mine}") == {"dog": 2}
    with pytest.raises(InputError, match="every --support a name"):
        classes(f"dog={box}", box)
    with pytest.raises(InputError, match="the labels cat, dog"):
        classes(f"{photo}:{mine}", f"{photo}:{theirs}")


def test_what_is_written_for_labelme_is_read_as_marks(photo, tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.random((HEIGHT, WIDTH)) < 0.6  # holes in parts in holes, single pixels
    shapes = [shape("dog", polygon.tolist()) for polygon in outlines(mask)]
    marked = read(photo, labelme(tmp_path, *shapes))
    np.testing.assert_array_equal(marked.mask, mask)

"""Masks in the formats of other tools: what is written is what their readers see."""

import importlib.util
import json
import os

import cv2
import numpy as np
import pytest
from PIL import Image
from predictors import COLOURS, Colours, picture, run_predict, scene
from pycocotools import mask as pycoco
from pycocotools.coco import COCO

from qpenet_jax import InputError
from qpenet_jax.data.prepare.instances import draw_segmentation
from qpenet_jax.masks.coco_json import polygons
from qpenet_jax.masks.labelme import draw_shapes
from qpenet_jax.masks.polygons import fill, outlines
from qpenet_jax.masks.queries import find_queries, frames
from qpenet_jax.masks.tasks import Tasks, Tiles, compete, probability, tiled


@pytest.fixture
def network():
    return Colours()


@pytest.fixture
def photos(tmp_path):
    """Three photos in a folder, and the words of a support of each colour."""
    (tmp_path / "photos/sub").mkdir(parents=True)
    for name, size in {"a.png": (90, 120), "sub/b.png": (60, 100)}.items():
        Image.fromarray(scene(*size)[0]).save(tmp_path / "photos" / name)
    Image.new("RGB", (40, 30), (128, 128, 128)).save(tmp_path / "photos/none.png")
    words = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
        words += ["--support", f"{name}={tmp_path / name}.png:box=8,8,48,48"]
    return words


def run(network, tmp_path, words, *more, query="photos"):
    out = tmp_path / "out"
    given = [*words, "--query", tmp_path / query, "--out", out, *more]
    run_predict(network.segmenter, "--workdir=w", *given)
    return out


def refusal(*given, **options):
    with pytest.raises(InputError) as error:
        run(Colours(), *given, **options)
    return str(error.value)


def indices(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image), image.getpalette()


def test_several_classes_make_one_index_mask(network, photos, tmp_path):
    out = run(network, tmp_path, photos, "--recursive")
    found, palette = indices(out / "a.png")
    truth = scene()[1]
    assert (found == truth).mean() > 0.95
    assert set(np.unique(found)) == {0, 1, 2}
    assert palette[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    summary = json.loads((out / "predictions.json").read_text())
    assert summary["run"] == "w"
    assert [(c["index"], c["name"]) for c in summary["classes"]] == [
        (1, "red"),
        (2, "blue"),
    ]
    a, none, b = summary["images"]
    assert (a["height"], a["width"]) == (90, 120)
    assert a["found"]["blue"]["pixels"] == (found == 2).sum()
    assert 0.5 < a["found"]["blue"]["score"] <= 1
    assert none["found"]["red"] == {"pixels": 0, "score": None}
    assert b["file"] == str(tmp_path / "photos/sub/b.png")
    assert b["files"] == ["sub/b.png", "sub/b_overlay.jpg"]
    assert all((out / name).exists() for image in (a, b) for name in image["files"])
    with Image.open(out / "a_overlay.jpg") as overlay:
        pixels = np.array(overlay).astype(int)
    assert (pixels[45, 10] - pixels[45, 10, 2])[0] > 40, "red has the first colour"
    assert pixels[45, 102, 1] - pixels[45, 102, 2] > 40, "blue has the second, green"
    # Supports and queries are encoded once for all classes.
    assert network.encoded == [("support",)] * 2 + [("query",)] * 3


def test_classes_compete_by_their_margins():
    margins = np.array([[[2, -1, 1, 3]], [[1, -2, 1, 4]], [[0, 0, 0.5, 4]]], np.float32)
    found = compete(margins, probabilities=True)
    np.testing.assert_array_equal(found.index, [[1, 0, 1, 2]])
    np.testing.assert_allclose(found.scores[0], (1 / (1 + np.exp([-2, -1]))).mean())
    assert found.scores[2] is None
    np.testing.assert_allclose(found.probabilities[1], probability(margins[1]))


def test_tasks_are_of_one_segmenter():
    image, mask = picture(40, 50)
    one, other = (Colours().segmenter.learn(image, mask) for _ in range(2))
    with pytest.raises(InputError, match="several segmenters"):
        Tasks({"a": one, "b": other})
    with pytest.raises(InputError, match="0 classes"):
        Tasks({})
    found = Tasks({"a": one}).find(image)
    np.testing.assert_array_equal(found.index, one(image))
    np.testing.assert_array_equal(Tasks({"a": one})(image), one(image))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools under NumPy 2
def test_coco_reads_back_every_mask_bit_for_bit(network, photos, tmp_path):
    formats = "--format=png,coco,coco_polygons"
    out = run(network, tmp_path, photos, "--recursive", formats)
    coco, other = (
        COCO(str(out / f"{name}.json")) for name in ("coco", "coco_polygons")
    )
    assert (coco.imgs, coco.anns.keys()) == (other.imgs, other.anns.keys())
    for number, annotation in other.anns.items():
        assert isinstance(annotation["segmentation"], list)
        assert (
            iou(other.annToMask(annotation), coco.annToMask(coco.anns[number])) > 0.99
        )
        for field in ("area", "bbox", "score", "category_id"):
            assert annotation[field] == coco.anns[number][field]
    files = {image["file_name"]: image["id"] for image in coco.imgs.values()}
    assert set(files) == {"a.png", "none.png", "sub/b.png"}
    assert not coco.getAnnIds(imgIds=[files["none.png"]])
    assert {c["id"]: c["name"] for c in coco.cats.values()} == {1: "red", 2: "blue"}
    for name in ("a.png", "sub/b.png"):
        index, _ = indices(out / name)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[files[name]]))
        assert [a["category_id"] for a in annotations] == [1, 2]
        for annotation in annotations:
            mask = index == annotation["category_id"]
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            np.testing.assert_array_equal(
                draw_segmentation(annotation["segmentation"], *mask.shape), mask
            )
            assert annotation["area"] == mask.sum()
            y, x = np.nonzero(mask)
            box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert annotation["bbox"] == box
            assert 0.5 < annotation["score"] <= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools under NumPy 2
@pytest.mark.parametrize("smooth", [0, 2, 6])
def test_coco_draws_polygons_back_to_the_mask(smooth):
    """Small parts to the pixel; large ones lose corners, and 1 % of the IoU at most."""
    rng = np.random.default_rng(smooth)
    for size in ((40, 60), (97, 31), (300, 400)):
        noise = rng.standard_normal(size)
        mask = (cv2.GaussianBlur(noise, (0, 0), smooth) if smooth else noise) > 0
        mask[10:30, 5:25], mask[15:20, 10:20] = True, False  # a hole
        runs = pycoco.merge(pycoco.frPyObjects(polygons(mask), *size))
        drawn = pycoco.decode(runs) == 1
        assert (mask & drawn).sum() / (mask | drawn).sum() > 0.99
        if smooth < 6:
            np.testing.assert_array_equal(drawn, mask)
    for empty in (np.zeros((5, 7), bool), np.ones((5, 7), bool)):
        assert polygons(empty) == ([[0, 0, 0, 5, 7, 5, 7, 0]] if empty.all() else [])


def test_labelme_reads_back_every_mask(network, photos, tmp_path):
    out = run(network, tmp_path, photos, "--recursive", "--format", "voc,labelme")
    for name in ("a", "sub/b", "none"):
        path = out / f"{name}.json"
        content = json.loads(path.read_text())
        photo = path.parent / content["imagePath"]
        assert photo.samefile(tmp_path / "photos" / f"{name}.png")
        assert not os.path.isabs(content["imagePath"])
        assert content["imageData"] is None
        index, _ = indices(out / "SegmentationClass" / f"{name}.png")
        assert (content["imageHeight"], content["imageWidth"]) == index.shape
        for number, label in enumerate(COLOURS, 1):
            shapes = [s for s in content["shapes"] if s["label"] == label]
            found = draw_shapes(path, shapes, index.shape)
            if name == "none":
                assert not shapes
                continue
            assert iou(found, index == number) >= 0.99
            assert {s["group_id"] for s in shapes} <= {number, None}
    assert "png" not in {p.suffix[1:] for p in out.iterdir()}


@pytest.mark.skipif(not importlib.util.find_spec("labelme"), reason="no labelme")
def test_labelme_itself_reads_what_is_written(network, photos, tmp_path):
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    labelme = pytest.importorskip("labelme", exc_type=ImportError)
    out = run(network, tmp_path, photos, "--format", "png,labelme")
    file = labelme.LabelFile(str(out / "a.json"))
    values = {name: i for i, name in enumerate(COLOURS, 1)}
    drawn, _ = labelme.utils.shapes_to_label((90, 120), file.shapes, values)
    index, _ = indices(out / "a.png")
    for number in values.values():
        assert iou(drawn == number, index == number) >= 0.99


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("smooth", [0, 1, 3])
def test_outlines_of_any_mask_give_it_back(smooth):
    """Parts in holes in parts, parts of a pixel, all that touches the border."""
    rng = np.random.default_rng(smooth)
    for _ in range(30):
        mask = rng.random(rng.integers(1, 60, 2), np.float32)
        mask = cv2.GaussianBlur(mask, (0, 0), smooth) if smooth else mask
        mask = mask >= np.quantile(mask, rng.random())
        polygons = outlines(mask)
        assert all(len(polygon) >= 3 for polygon in polygons)
        drawn = [fill(polygon, mask.shape) for polygon in polygons]
        np.testing.assert_array_equal(np.any(drawn, axis=0), mask)
    assert outlines(np.zeros((5, 6), bool)) == []


def test_a_large_outline_saves_corners_and_keeps_99_percent():
    ring = scene(900, 1200)[1] == 1
    halves = outlines(ring)
    assert len(halves) == 2
    assert sum(map(len, halves)) < 200
    found = np.any([fill(polygon, ring.shape) for polygon in halves], axis=0)
    assert iou(found, ring) >= 0.99


def test_probabilities_have_16_bits(network, photos, tmp_path):
    out = run(network, tmp_path, photos, "--probability")
    index, _ = indices(out / "a.png")
    found = [cv2.imread(str(out / f"a_probability_{c}.png"), -1) for c in COLOURS]
    assert found[0].dtype == np.uint16
    assert found[0].shape == (90, 120)
    sure = np.max(found, axis=0) > 32768
    np.testing.assert_array_equal(sure, index > 0)
    assert len(np.unique(found[0])) > 256
    summary = json.loads((out / "predictions.json").read_text())
    mean = found[0][index == 1].mean() / 65535
    assert abs(summary["images"][0]["found"]["red"]["score"] - mean) < 1e-4
    out = run(network, tmp_path, photos[:2], "--probability")
    assert (out / "a_probability.png").exists()


def test_an_interrupted_run_leaves_no_summary(network, photos, tmp_path):
    out = run(network, tmp_path, photos, "--format=png,coco")
    assert (out / "coco.json").exists()
    path = tmp_path / "photos/z.jpg"
    Image.fromarray(scene()[0]).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"z\.jpg: broken image"):
        run(network, tmp_path, photos, "--format=png,coco")
    assert (out / "a.png").exists()
    assert not (out / "coco.json").exists()
    assert not (out / "predictions.json").exists()


def test_results_in_each_others_place_are_refused(photos, tmp_path):
    for name in ("predictions", "coco"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        query = f"{name}.png"
        error = refusal(tmp_path, photos, "--format=coco,labelme", query=query)
        assert f"two results would be called {tmp_path / 'out' / name}.json" in error
    assert not (tmp_path / "out").exists()


def test_results_never_replace_marks(photos, tmp_path):
    for option, taken in (
        ("--format=labelme", "a.json"),
        ("--format=coco", "coco.json"),
        ("--format=voc", "SegmentationClass/a.png"),
        ("--probability", "a_probability.png"),
    ):
        marks = tmp_path / "out" / taken
        marks.parent.mkdir(parents=True, exist_ok=True)
        if marks.suffix == ".png":
            Image.new("L", (64, 64), 1).save(marks)
        else:
            shape = {"label": "red", "points": [[1, 1], [9, 1], [9, 9]]}
            marks.write_text(json.dumps({"shapes": [shape]}))
        before = marks.read_bytes()
        support = ["--support", f"{tmp_path / 'red.png'}:{marks}"]
        error = refusal(tmp_path, support, option, query="photos/a.png")
        assert f"over the input {marks}" in error
        assert marks.read_bytes() == before


def test_a_file_that_isnt_written_isnt_touched(network, photos, tmp_path):
    """COCO's file of an earlier call may be the marks of this one."""
    out = run(network, tmp_path, photos, "--format=coco")
    before = (out / "coco.json").read_bytes()
    support = f"red={tmp_path / 'photos/a.png'}:{out / 'coco.json'}"
    run(network, tmp_path, ["--support", support])
    assert (out / "coco.json").read_bytes() == before
    found = np.array(Image.open(out / "a.png"))
    assert ((found == 255) == (scene()[1] == 1)).mean() > 0.95


def test_tiles_cover_every_pixel_with_the_overlap_that_is_asked_for():
    for length, side, overlap in ((100, 40, 0.25), (101, 16, 0.5), (40, 40, 0.0)):
        seen = np.zeros((length, length), int)
        places = list(Tiles(side, overlap).cover(length, length))
        for place in places:
            assert seen[place].shape == (side, side)
            seen[place] += 1
        assert seen.min() == 1
        starts = sorted({rows.start for rows, _ in places})
        assert all(np.diff(starts) <= side - overlap * side + 1)
    for bad in ((8, 0.25), (64, -1), (64, 0.95), (64, float("nan"))):
        with pytest.raises(InputError):
            Tiles(*bad)


def test_one_tile_is_the_whole_and_many_agree(network, photos, tmp_path):
    def margins(image):  # what needs no surroundings is found alike in every tile
        yield image[..., 0] - np.float32(127.5)
        yield image[..., 2] / np.float32(64) - 2

    image, _ = scene()
    for tiles in (Tiles(120), Tiles(5000)):
        for whole, part in zip(
            margins(image), tiled(margins, image, tiles), strict=True
        ):
            np.testing.assert_array_equal(part, whole)
    for whole, part in zip(
        margins(image), tiled(margins, image, Tiles(32)), strict=True
    ):
        np.testing.assert_allclose(probability(part), probability(whole), atol=1e-5)
    plain = indices(run(network, tmp_path, photos) / "a.png")[0]
    one = indices(run(network, tmp_path, photos, "--tiles=120") / "a.png")[0]
    np.testing.assert_array_equal(one, plain)
    network.encoded.clear()
    many = indices(
        run(network, tmp_path, photos, "--tiles=64", query="photos/a.png") / "a.png"
    )
    assert (many[0] == scene()[1]).mean() > 0.97
    assert network.encoded.count(("query",)) == 2 * 3  # of 90 and of 120 pixels


def write_video(path, images, code="MJPG"):
    height, width = images[0].shape[:2]
    fourcc = cv2.VideoWriter.fourcc(*code)
    writer = cv2.VideoWriter(str(path), fourcc, 10, (width, height))
    for image in images:
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()


def test_a_video_is_segmented_frame_by_frame(network, photos, tmp_path):
    image, truth = scene()
    write_video(tmp_path / "clip.avi", [image, image[:, ::-1], image])
    formats = "--format=png,coco,labelme"
    out = run(network, tmp_path, photos, formats, query="clip.avi")
    for i, expected in enumerate((truth, truth[:, ::-1], truth)):
        found, _ = indices(out / f"clip/{i:06d}.png")
        assert (found == expected).mean() > 0.95
    summary = json.loads((out / "predictions.json").read_text())
    assert [image["frame"] for image in summary["images"]] == [0, 1, 2]
    coco = json.loads((out / "coco.json").read_text())
    assert coco["images"][1]["file_name"] == "clip/000001.jpg"
    assert (out / "clip/000001.jpg").exists(), "COCO's and labelme's files name images"
    shapes = json.loads((out / "clip/000001.json").read_text())
    assert shapes["imagePath"] == "000001.jpg"
    (query,) = find_queries([out / "clip_overlay.mp4"], recursive=False)
    overlays = list(frames(query))
    assert len(overlays) == 3
    assert overlays[0].pixels.shape == image.shape
    assert [p.name for p in out.iterdir() if ".part" in p.name] == []


def test_broken_videos_are_one_line(photos, tmp_path, capfd):
    write_video(tmp_path / "clip.mp4", [scene()[0]] * 3, "mp4v")
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.avi").write_bytes(b"no video")
    (tmp_path / "empty.mov").write_bytes(b"")
    playlist = f"ffconcat version 1.0\nfile {tmp_path / 'clip.mp4'}\n"
    (tmp_path / "list.mp4").write_text(playlist)
    for name in ("cut.mp4", "none.avi", "empty.mov", "list.mp4"):
        error = refusal(tmp_path, photos, query=name)
        assert error == f"{tmp_path / name}: no frame can be read; convert it to mp4"
        assert not capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folders_videos_are_left_out_and_frames_replace_nothing(
    network, photos, tmp_path, capsys
):
    write_video(tmp_path / "photos/x.avi", [scene()[0]])
    run(network, tmp_path, photos)
    left_out = "1 x .avi, 1 folder(s): give --recursive, give videos by their own"
    assert left_out in capsys.readouterr().err
    write_video(tmp_path / "out.avi", [scene()[0]])
    (tmp_path / "out/out").mkdir()
    Image.fromarray(scene()[0]).save(tmp_path / "out/out/a.png")
    more = ["--query", tmp_path / "out.avi", tmp_path / "out/out/a.png"]
    error = refusal(tmp_path, photos, *more)
    assert f"written into {tmp_path / 'out/out'}, where" in error

"""Masks in the formats of other tools: what is written is what their readers see."""

import functools
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
from qpenet_jax.masks.coco_json import polygons
from qpenet_jax.masks.labelme import labelme_marks
from qpenet_jax.masks.polygons import fill, outlines
from qpenet_jax.masks.queries import find_queries, frames
from qpenet_jax.masks.tasks import Tasks, Tiles, compete, probability, tiled

# Of pycocotools under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def write_photos(folder):
    """Writes three photos and returns the words of a support of each colour."""
    (folder / "photos/sub").mkdir(parents=True)
    for name, size in {"a.png": (90, 120), "sub/b.png": (60, 100)}.items():
        Image.fromarray(scene(*size)[0]).save(folder / "photos" / name)
    Image.new("RGB", (40, 30), (128, 128, 128)).save(folder / "photos/none.png")
    words = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
        words += ["--support", f"{name}={folder / name}.png:box=8,8,48,48"]
    return words


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path)


def run(tmp_path, words, *more, query="photos", network=None):
    out = tmp_path / "out"
    given = [*words, "--query", tmp_path / query, "--out", out, *more]
    run_predict((network or Colours()).segmenter, "--workdir=w", *given)
    return out


def refusal(*given, **options):
    with pytest.raises(InputError) as error:
        run(*given, **options)
    return str(error.value)


def summary_of(out):
    return json.loads((out / "predictions.json").read_text())


def indices(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image), image.getpalette()


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What is written in all formats about photos/, and the network that was used."""
    folder, network = tmp_path_factory.mktemp("written"), Colours()
    options = "--format=png,voc,coco,coco_polygons,labelme", "--probability"
    words = write_photos(folder)
    return run(folder, words, "--recursive", *options, network=network), network


def coco_masks(out, photo, size, name="coco"):
    coco = COCO(str(out / f"{name}.json"))
    (shown,) = [i["id"] for i in coco.imgs.values() if i["file_name"] == photo]
    found = np.zeros((2, *size), bool)
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[shown])):
        assert isinstance(annotation["segmentation"], list) == (name != "coco")
        mask = found[annotation["category_id"] - 1]
        mask |= coco.annToMask(annotation) == 1
        assert name != "coco" or annotation["area"] == mask.sum()
        y, x = np.nonzero(mask)
        box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert annotation["bbox"] == box
        assert 0.5 < annotation["score"] <= 1
    return found


def labelme_masks(out, photo, size):
    path = (out / photo).with_suffix(".json")
    content = json.loads(path.read_text())
    assert (content["imageHeight"], content["imageWidth"]) == size
    assert (content["imageData"], os.path.isabs(content["imagePath"])) == (None, False)
    assert (path.parent / content["imagePath"]).samefile(out.parent / "photos" / photo)
    found = []
    for number, label in enumerate(COLOURS, 1):
        shapes = [s for s in content["shapes"] if s["label"] == label]
        assert {s["group_id"] for s in shapes} <= {number, None}
        drawn = [
            draw() for name, draw in labelme_marks(path, content, size) if name == label
        ]
        found.append(np.any([np.zeros(size, bool), *drawn], axis=0))
    return found


def masks_by_labelme_itself(out, photo, size):
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    labelme = pytest.importorskip("labelme", exc_type=ImportError)
    file = labelme.LabelFile(str((out / photo).with_suffix(".json")))
    values = {name: i for i, name in enumerate(COLOURS, 1)}
    drawn, _ = labelme.utils.shapes_to_label(size, file.shapes, values)
    return [drawn == 1, drawn == 2]


READERS = {
    "coco": (coco_masks, 1),
    "coco_polygons": (functools.partial(coco_masks, name="coco_polygons"), 0.99),
    "labelme": (labelme_masks, 0.99),
    "labelme itself": (masks_by_labelme_itself, 0.99),
}
"""How a format is read, and the least IoU of what is read with the index mask."""


@pytest.mark.parametrize("kind", READERS)
def test_every_format_is_read_back(written, kind):
    read, least = READERS[kind]
    for photo in ("a.png", "sub/b.png", "none.png"):
        index, _ = indices(written[0] / photo)
        found = read(written[0], photo, index.shape)
        for number, mask in enumerate(found, 1):
            expected = index == number
            assert mask.any() == expected.any() == (photo != "none.png")
            assert not expected.any() or iou(mask, expected) >= least


def test_several_classes_make_one_index_mask(written):
    out, network = written
    found, palette = indices(out / "a.png")
    truth = scene()[1]
    assert (found == truth).mean() > 0.95
    assert set(np.unique(found)) == {0, 1, 2}
    assert palette[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    voc, _ = indices(out / "SegmentationClass/a.png")
    np.testing.assert_array_equal(voc, found)
    summary = summary_of(out)
    assert summary["run"] == "w"
    listed = [(c["index"], c["name"]) for c in summary["classes"]]
    assert listed == [(1, "red"), (2, "blue")]
    a, none, b = summary["images"]
    assert (a["height"], a["width"]) == (90, 120)
    assert a["found"]["blue"]["pixels"] == (found == 2).sum()
    assert 0.5 < a["found"]["blue"]["score"] <= 1
    assert none["found"]["red"] == {"pixels": 0, "score": None}
    assert b["file"] == str(out.parent / "photos/sub/b.png")
    assert b["files"][0::2][:2] == ["sub/b.png", "sub/b_overlay.jpg"]
    assert all((out / name).exists() for image in (a, b) for name in image["files"])
    with Image.open(out / "a_overlay.jpg") as overlay:
        pixels = np.array(overlay).astype(int)
    assert (pixels[45, 10] - pixels[45, 10, 2])[0] > 40, "red has the first colour"
    assert pixels[45, 102, 1] - pixels[45, 102, 2] > 40, "blue has the second, green"
    # Supports and queries are encoded once for all classes.
    assert network.encoded == [("support",)] * 2 + [("query",)] * 3


def test_probabilities_have_16_bits(written, photos, tmp_path):
    out, _ = written
    index, _ = indices(out / "a.png")
    found = [cv2.imread(str(out / f"a_probability_{c}.png"), -1) for c in COLOURS]
    assert (found[0].dtype, found[0].shape) == (np.uint16, (90, 120))
    np.testing.assert_array_equal(np.max(found, axis=0) > 32768, index > 0)
    assert len(np.unique(found[0])) > 256
    mean = found[0][index == 1].mean() / 65535
    score = summary_of(out)["images"][0]["found"]["red"]["score"]
    assert abs(score - mean) < 1e-4
    run(tmp_path, photos[:2], "--probability")
    assert (tmp_path / "out/a_probability.png").exists()


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


def drawn(mask):
    """Returns a mask's polygons as labelme draws them and as pycocotools does."""
    pieces = [fill(polygon, mask.shape) for polygon in outlines(mask)]
    runs = pycoco.merge(pycoco.frPyObjects(polygons(mask), *mask.shape))
    return np.any(pieces, axis=0), pycoco.decode(runs) == 1


@pytest.mark.parametrize("smooth", [0, 1, 3])
def test_polygons_of_any_mask_give_it_back(smooth):
    """Parts in holes in parts, parts of a pixel, all that touches the border."""
    rng = np.random.default_rng(smooth)
    for _ in range(30):
        mask = rng.random(rng.integers(1, 60, 2), np.float32)
        mask = cv2.GaussianBlur(mask, (0, 0), smooth) if smooth else mask
        mask = mask >= np.quantile(mask, rng.random())
        assert all(len(polygon) >= 3 for polygon in outlines(mask))
        for found in drawn(mask):
            np.testing.assert_array_equal(found, mask)
    empty = np.zeros((5, 7), bool)
    assert outlines(empty) == polygons(empty) == []
    assert polygons(~empty) == [[0, 0, 0, 5, 7, 5, 7, 0]]


def test_large_polygons_save_corners_and_keep_99_percent():
    ring = scene(900, 1200)[1] == 1
    halves = outlines(ring)
    assert len(halves) == 2
    assert sum(map(len, halves)) < 200
    noise = np.random.default_rng(6).standard_normal((300, 400))
    for mask in (ring, cv2.GaussianBlur(noise, (0, 0), 6) > 0):
        assert all(iou(found, mask) >= 0.99 for found in drawn(mask))


def test_an_interrupted_run_leaves_no_summary(photos, tmp_path):
    out = run(tmp_path, photos, "--format=png,coco")
    assert (out / "coco.json").exists()
    path = tmp_path / "photos/z.jpg"
    Image.fromarray(scene()[0]).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    assert "z.jpg: broken image" in refusal(tmp_path, photos, "--format=png,coco")
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


@pytest.mark.parametrize(
    ("option", "taken"),
    [
        ("--format=png", "a.png"),
        ("--format=labelme", "a.json"),
        ("--format=coco", "coco.json"),
        ("--format=voc", "SegmentationClass/a.png"),
        ("--probability", "a_probability.png"),
    ],
)
def test_results_never_replace_marks(photos, tmp_path, option, taken):
    marks = tmp_path / "out" / taken
    marks.parent.mkdir(parents=True)
    shape = {"label": "red", "points": [[1, 1], [9, 1], [9, 9]]}
    if marks.suffix == ".png":
        Image.new("L", (64, 64), 1).save(marks)
    else:
        marks.write_text(json.dumps({"shapes": [shape]}))
    before = marks.read_bytes()
    support = ["--support", f"{tmp_path / 'red.png'}:{marks}"]
    error = refusal(tmp_path, support, option, query="photos/a.png")
    assert f"over the input {marks}" in error
    assert marks.read_bytes() == before


def test_a_file_that_isnt_written_isnt_touched(photos, tmp_path):
    """COCO's file of an earlier call may be the marks of this one."""
    out = run(tmp_path, photos, "--format=coco")
    assert not list(out.glob("*.png"))
    before = (out / "coco.json").read_bytes()
    support = f"red={tmp_path / 'photos/a.png'}:{out / 'coco.json'}"
    run(tmp_path, ["--support", support])
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


def test_one_tile_is_the_whole_and_many_agree(photos, tmp_path):
    def margins(image):  # what needs no surroundings is found alike in every tile
        yield image[..., 0] - np.float32(127.5)
        yield image[..., 2] / np.float32(64) - 2

    image, truth = scene()
    for tiles, close in ((Tiles(120), 0), (Tiles(5000), 0), (Tiles(32), 1e-5)):
        parts = tiled(margins, image, tiles)
        for whole, part in zip(margins(image), parts, strict=True):
            np.testing.assert_allclose(probability(part), probability(whole), 0, close)
    plain = indices(run(tmp_path, photos) / "a.png")[0]
    one = indices(run(tmp_path, photos, "--tiles=120") / "a.png")[0]
    np.testing.assert_array_equal(one, plain)
    network = Colours()
    options = {"query": "photos/a.png", "network": network}
    many, _ = indices(run(tmp_path, photos, "--tiles=64", **options) / "a.png")
    assert (many == truth).mean() > 0.97
    assert network.encoded.count(("query",)) == 2 * 3  # of 90 and of 120 pixels


def write_video(path, images, code="MJPG"):
    fourcc = cv2.VideoWriter.fourcc(*code)
    writer = cv2.VideoWriter(str(path), fourcc, 10, images[0].shape[1::-1])
    for image in images:
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()


def test_a_video_is_segmented_frame_by_frame(photos, tmp_path):
    image, truth = scene()
    write_video(tmp_path / "clip.avi", [image, image[:, ::-1], image])
    out = run(tmp_path, photos, "--format=png,coco,labelme", query="clip.avi")
    for i, expected in enumerate((truth, truth[:, ::-1], truth)):
        found, _ = indices(out / f"clip/{i:06d}.png")
        assert (found == expected).mean() > 0.95
    assert [image["frame"] for image in summary_of(out)["images"]] == [0, 1, 2]
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
    playlist = f"ffconcat version 1.0\nfile {tmp_path / 'clip.mp4'}\n"
    broken = {"cut.mp4": whole[: len(whole) // 2], "list.mp4": playlist.encode()}
    for name, content in (broken | {"none.avi": b"no video", "empty.mov": b""}).items():
        (tmp_path / name).write_bytes(content)
        error = refusal(tmp_path, photos, query=name)
        assert error == f"{tmp_path / name}: no frame can be read; convert it to mp4"
        assert not capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folders_videos_are_left_out_and_frames_replace_nothing(
    photos, tmp_path, capsys
):
    write_video(tmp_path / "photos/x.avi", [scene()[0]])
    run(tmp_path, photos)
    left_out = "1 x .avi, 1 folder(s): give --recursive, give videos by their own"
    assert left_out in capsys.readouterr().err
    write_video(tmp_path / "out.avi", [scene()[0]])
    (tmp_path / "out/out").mkdir()
    Image.fromarray(scene()[0]).save(tmp_path / "out/out/a.png")
    more = ["--query", tmp_path / "out.avi", tmp_path / "out/out/a.png"]
    error = refusal(tmp_path, photos, *more)
    assert f"written into {tmp_path / 'out/out'}, where" in error

"""What the page of `qpenet demo` calls: no browser and no Gradio is needed here."""

import io
import itertools
import json
import os
import re
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from predictors import Colours, scene
from test_cli import refused

from qpenet_jax import InputError
from qpenet_jax.cli.main import main
from qpenet_jax.data.images import read_image
from qpenet_jax.demo import page, photos, segmenting
from qpenet_jax.demo.grabcut import object_around
from qpenet_jax.demo.intermediates import intermediate_pictures
from qpenet_jax.demo.page import Closing
from qpenet_jax.demo.segmenting import Calls
from qpenet_jax.evaluation.pictures import PREDICTION
from qpenet_jax.paper.sheets import AUX, BACKGROUND, MAIN

ABOUT = {"version": "1", "method": "prototype", "run": None, "backbone": "resnet50"}


@pytest.fixture
def calls(tmp_path):
    (tmp_path / "cache").mkdir()
    return Calls(Colours().segmenter, ABOUT, tmp_path / "cache")


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return str(path)


@pytest.fixture
def ring(tmp_path):
    """A photo with a red ring, and the editor's value with the ring marked."""
    file = save(tmp_path / "given/ring.png", scene()[0])
    return [file], [photos.editor_value(Path(file), scene()[1] == 1)]


def opened(archive):
    with zipfile.ZipFile(archive) as content:
        return {name: content.read(name) for name in content.namelist()}


def test_a_zip_holds_what_predict_writes(calls, ring, tmp_path, monkeypatch):
    """Byte for byte, as if the photos lay beside the masks."""
    files, values = ring
    folder = tmp_path / "photos"
    for name, size in {"a.jpg": (90, 120), "b.jpg": (700, 500)}.items():
        save(folder / name, scene(*size)[0])
    queries = [str(folder / "a.jpg"), str(folder / "b.jpg")]
    archive, *_ = calls.segment(files, values, queries, "", False)

    save(tmp_path / "mask.png", 255 * (scene()[1] == 1).astype(np.uint8))
    monkeypatch.setattr("qpenet_jax.segmenter.load", lambda *_, **__: calls.segmenter)
    monkeypatch.setattr("qpenet_jax.__version__", "1")
    monkeypatch.chdir(folder)
    words = [
        "--support",
        f"{files[0]}:{tmp_path / 'mask.png'}",
        "--backbone",
        "resnet50",
    ]
    words += ["--format", "png,coco,coco_polygons,labelme", "--probability"]
    main(["predict", *words, "--query", "a.jpg", "b.jpg", "--out", "."])
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    del written["a.jpg"], written["b.jpg"]
    found = opened(archive)
    assert found == written
    assert len(found) == 2 * 4 + 3
    with Image.open(io.BytesIO(found["a.png"])) as mask:
        assert ((np.array(mask) == 255) == (scene()[1] == 1)).mean() > 0.95
    assert json.loads(found["a.json"])["imagePath"] == "a.jpg"


def test_all_that_is_shown(calls, ring, tmp_path):
    files, values = ring
    none = np.full((30, 40, 3), 128, np.uint8)
    queries = [files[0], save(tmp_path / "none.png", none)]
    archive, masks, probabilities, inside, marked = calls.segment(
        files, values, queries, "a ring", True
    )
    share = round(100 * (scene()[1] == 1).mean())
    shown = rf"ring\.png: {share} % of the photo, score 0\.[5-9]"
    assert re.search(shown, masks[0].caption)
    assert masks[1].caption == "none.png: nothing found"
    assert len(masks) == len(probabilities) == 2
    assert len(marked) == 1
    assert inside == []
    summary = json.loads(opened(archive)["predictions.json"])
    assert [c["name"] for c in summary["classes"]] == ["a ring"]
    assert str(tmp_path) not in json.dumps(summary), "no path of the server"


def test_photos_of_any_kind_are_read_as_predict_reads_them(tmp_path):
    """As telephones, scanners and programs store them, and larger than on the page."""
    pixels, exif = scene()[0], Image.Exif()
    exif[0x0112] = 6
    stored = {
        "turned.png": (np.rot90(pixels).copy(), {"exif": exif}),
        "alpha.png": (np.dstack([pixels, np.full((90, 120), 99, np.uint8)]), {}),
        "deep.png": (pixels[..., 0].astype(np.uint16) * 257, {}),
        "large.jpg": (scene(900, 1200)[0], {}),
    }
    for name, (content, options) in stored.items():
        path = Path(save(tmp_path / name, content, **options))
        pixels = read_image(path)
        np.testing.assert_array_equal(photos.read_photo(path), pixels)
        height, width = pixels.shape[:2]
        mask = np.zeros((height, width), bool)
        mask[: height // 2] = True
        value = photos.editor_value(path, mask)
        shown = value["background"].shape[:2]
        assert shown[1] / shown[0] == pytest.approx(width / height, 0.01)
        assert max(shown) == min(max(height, width), 640)
        (support,) = photos.supports_of([path], [value])
        np.testing.assert_array_equal(support.pixels, pixels)
        assert support.mask[: height // 2 - 2].all()
        assert not support.mask[height // 2 + 2 :].any()


def test_what_is_missing_is_one_line(calls, ring, tmp_path):
    files, values = ring
    broken, gone = tmp_path / "broken.jpg", tmp_path / "gone.png"
    broken.write_bytes(b"\xff\xd8\xff\xe0" + 99 * b"x")
    for message, *given in (
        ("add one, and mark it", [], [], files, ""),
        ("ring.png: nothing is marked", files, [None], files, ""),
        ("no photos to segment: add 1 to 50", files, values, None, ""),
        ("51 photos to segment", files, values, 51 * files, ""),
        ("broken.jpg", files, values, [str(broken)], ""),
        ("gone.png: no such file", files, values, [str(gone)], ""),
        ("a name of 99 signs", files, values, files, 99 * "x"),
        ("on one line", files, values, files, "a\x07b"),
    ):
        with pytest.raises(InputError) as caught:
            calls.segment(*given, False)
        assert message in str(caught.value)
        assert str(tmp_path) not in str(caught.value), "no path of the server"
    with pytest.raises(InputError, match="6 photos to mark: give 5"):
        calls.show_marks(6 * files, [])
    assert not list(tmp_path.rglob("masks.zip"))


def test_a_huge_photo_is_refused_by_its_header(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    save(path, np.zeros((70, 80, 3), np.uint8))
    monkeypatch.setattr(photos, "MOST_PIXELS", 70 * 80 - 1)
    monkeypatch.setattr(photos, "read_image", None)
    with pytest.raises(InputError, match=r"huge\.png has 80 x 70 pixels: scale it"):
        photos.read_photo(path)


def test_edges_are_found_around_what_is_painted(calls, ring):
    """The blue disc beside the ring."""
    files, _ = ring
    dot = np.zeros(scene()[1].shape, bool)
    dot[43:48, 100:105] = True
    value = calls.find_object(0, files, photos.editor_value(Path(files[0]), dot))
    marked, truth = photos.read_marks(value), scene()[1] == 2
    assert (marked & truth).sum() / (marked | truth).sum() > 0.9
    assert photos.read_marks(calls.find_object(0, files, None)) is None


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (700, 500)])
def test_objects_are_found_in_photos_of_any_shape(size):
    picture = scene(*size)[0]
    nothing = np.zeros(size, bool)
    assert not object_around(picture, nothing).any()
    assert object_around(picture, ~nothing).all()
    touched = nothing.copy()
    touched[size[0] // 2, size[1] // 2] = True
    found = object_around(picture, touched)
    assert found[touched].all()
    np.testing.assert_array_equal(found, object_around(picture, touched))


def test_marks_stay_with_their_photo(calls, ring, tmp_path):
    files, values = ring
    other = save(tmp_path / "other/ring.png", scene(60, 60)[0])
    both = calls.show_marks([other, *files], files, *values)
    np.testing.assert_array_equal(photos.read_marks(both[1]), scene()[1] == 1)
    (left,) = calls.show_marks([other], [other, *files], *both)
    assert photos.read_marks(both[0]) is photos.read_marks(left) is None


def test_results_have_names_of_their_own(tmp_path):
    given = ["a.jpg", "A.png", "a.png", "a_probability.jpg", "coco.jpg"]
    given += ["predictions.png", "x_overlay.png", "x.jpg", "image.jpg", "image.jpg"]
    paths = [tmp_path / name for name in given]
    names = list(map(str, segmenting.result_names(paths)))
    assert names[:3] == ["a", "A_2", "a_3"]
    assert names[3:6] == ["a_probability_2", "coco_2", "predictions_2"]
    assert names[-2:] == ["image", "image_2"]
    ends = ("", "_probability", "_overlay")
    written = [f"{name}{end}".casefold() for name in names for end in ends]
    assert len(set(written)) == len(written)


LEFT, RIGHT = np.s_[:, :4], np.s_[:, 4:]


def on_grid(where, side=9):
    """Return logits that are foreground in a part of the grid."""
    logits = np.zeros((side, side, 2), np.float32)
    logits[..., 0] = 1
    logits[(*where, 1)] = 3
    return logits


def test_inside_shows_what_the_parts_found(ring):
    files, values = ring
    (support,) = photos.supports_of([Path(f) for f in files], values)
    query = np.full((40, 40, 3), 128, np.uint8)
    ramp = np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)
    out = {"y_pre": on_grid(LEFT), "A_main": ramp, "A_aux": ramp}
    out |= {"y_bg_q": on_grid(RIGHT), "y_rev": on_grid(LEFT)[None]}
    shown = intermediate_pictures(query, [support], out, 65)
    parts = [picture.caption.split(".")[0] for picture in shown]
    assert parts == ["PPG", "DPE", "DPE", "GBC", "DPE"]
    pre, main, aux, background, regions = (picture.pixels for picture in shown)

    def coloured(pixels, colour):
        return abs(pixels.astype(int) - (64 + np.array(colour) // 2)).max(-1) < 12

    assert coloured(pre, PREDICTION)[:, 10:80].mean() > 0.9
    assert not coloured(pre, PREDICTION)[:, 120:].any()
    assert coloured(background, BACKGROUND)[:, 130:210].mean() > 0.9
    assert main.shape == aux.shape == (224, 224, 3)
    assert coloured(regions, MAIN).any() or coloured(regions, AUX).any()
    assert "ring.png" in shown[-1].caption
    assert intermediate_pictures(query, [support], {"y_bg_q": out["y_bg_q"]}, 65)


def test_a_network_is_looked_into(ring, tmp_path):
    class Network(Colours):
        def decode(self, *given, named=False):
            margin = super().decode(*given)
            return (margin, {"y_bg_q": on_grid(LEFT)[None]}) if named else margin

    about, (files, values) = ABOUT | {"method": "qpenet", "run": "r"}, ring
    calls = Calls(Network().segmenter, about, tmp_path)
    *_, inside, _ = calls.segment(files, values, 4 * files, "", False)
    captions = [picture.caption for picture in inside]
    assert len(captions) == segmenting.MOST_INTERMEDIATES
    assert all("GBC. What P_global" in caption for caption in captions)
    assert captions[0].startswith("ring.png: ")


def test_an_example_fills_everything_in(calls):
    name = segmenting.CHOSEN[0]
    files, values, queries, preview, label = calls.show_example(name)
    supports = photos.supports_of([Path(f) for f in files], values)
    assert len(supports) == segmenting.EXAMPLE_SUPPORTS
    assert len(queries) == segmenting.EXAMPLE_QUERIES
    assert all((s.mask == 1).mean() >= segmenting.LEAST for s in supports)
    assert len(preview) == 4
    assert label == name
    assert all(os.path.dirname(f).startswith(str(calls.cache)) for f in files)


def test_the_page_says_what_segments():
    assert "features of `resnet50` are compared" in page.introduction(ABOUT)
    run = ABOUT | {"run": "runs/a"}
    assert "the run runs/a" in page.introduction(run | {"backbone": None})
    assert "network of `runs/a`" in page.introduction(run | {"method": "qpenet"})


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'qpenet-jax[demo]'" in refused(capsys, "demo")
    assert "from 1 to 65535" in refused(capsys, "demo", "--port", "0")


def test_the_end_waits_for_the_call_under_way():
    work, begun, errors = Closing(), threading.Event(), []

    def long_call():
        with work.segmenting:
            begun.set()
            try:
                for _ in work.while_open(itertools.repeat(0)):
                    pass
            except InputError as error:
                errors.append(str(error))

    thread = threading.Thread(target=long_call)
    thread.start()
    assert begun.wait(20)
    work.close()
    assert errors == ["the page has been closed"]
    thread.join(20)

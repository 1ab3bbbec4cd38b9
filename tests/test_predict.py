"""`qpenet predict` around the network: what is read, written, left out and refused."""

import weakref

import numpy as np
import pytest
from PIL import Image
from predictors import SIDE, Red, picture, run_predict
from test_cli import refused

from qpenet_jax import InputError, Segmenter
from qpenet_jax.masks.queries import find_queries
from qpenet_jax.masks.writers import MaskWriter, segment_files

SEGMENT = Segmenter(Red(), SIDE)


@pytest.fixture
def support(tmp_path):
    image, mask = picture(40, 50)
    Image.fromarray(image).save(tmp_path / "support.png")
    Image.fromarray(255 * mask).save(tmp_path / "mask.png")
    return f"{tmp_path / 'support.png'}:{tmp_path / 'mask.png'}"


def run(support, query, out, *more):
    run_predict(SEGMENT, "--support", support, "--query", query, "--out", out, *more)


def refusal(*given):
    with pytest.raises(InputError) as error:
        run(*given)
    return str(error.value)


def queries(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(30, 44)[0]).save(path)
    return folder


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_results_are_never_put_among_the_queries(tmp_path, support):
    folder = queries(tmp_path / "photos", "a.png", "b.jpg")
    (tmp_path / "link").symlink_to(folder)
    before = contents(tmp_path)
    for query, out, *more in (
        (folder, folder),
        (folder, tmp_path / "link"),
        (folder / "a.png", folder),
        (folder, folder / "new", "--recursive"),
        (tmp_path, folder, "--recursive"),
    ):
        assert str(out) in refusal(support, query, out, *more)
    assert contents(tmp_path) == before
    run(support, folder, folder / "masks")  # nobody will read that folder
    assert (folder / "masks" / "a.png").exists()


def test_results_never_replace_a_support_or_its_mask(tmp_path, support):
    folder = queries(tmp_path / "photos", "support.jpg", "mask.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mask.png").hardlink_to(tmp_path / "mask.png")
    before = contents(tmp_path)
    for name, out in (("support", ""), ("mask", ""), ("mask", "out/")):
        error = refusal(support, folder / f"{name}.jpg", tmp_path / out)
        assert f"over the input {tmp_path / name}.png" in error
    assert contents(tmp_path) == before


def test_what_a_folder_holds_beside_images_is_said(capsys, tmp_path, support):
    folder = queries(tmp_path / "photos", "a.png", "sub/a.JPG", "sub/.hidden/c.png")
    for name in ("._a.png", ".DS_Store", "x.heic", "y.heic", "z", "sub/t.txt"):
        (folder / name).write_bytes(b"no image")
    run(support, folder, tmp_path / "flat")
    printed = capsys.readouterr()
    left_out = "left out: 2 x .heic, 1 x without ending, 1 folder(s): give"
    assert left_out in printed.err
    assert "1 mask(s)" in printed.out
    out = tmp_path / "deep"
    run(support, folder, out, "--recursive")
    printed = capsys.readouterr()
    assert "left out: 2 x .heic, 1 x .txt, 1 x without ending\n" in printed.err
    written = {str(path.relative_to(out)) for path in contents(out)}
    masks = {"a.png", "a_overlay.jpg", "sub/a.png", "sub/a_overlay.jpg"}
    assert written == masks | {"predictions.json"}
    _, truth = picture(30, 44)
    with Image.open(out / "sub/a.png") as found:
        assert ((np.asarray(found) == 255) == truth).mean() > 0.9
    folder = queries(tmp_path / "none", "sub/b.jpg")
    (folder / "x.heic").write_bytes(b"")
    error = refusal(support, folder, tmp_path / "out")
    assert "holds no image" in error
    assert "1 x .heic, 1 folder(s): give --recursive" in error

    queries(tmp_path / "photos", "a.jpg")
    error = refusal(support, tmp_path / "photos", tmp_path / "out")
    assert "called 'a'" in error


def test_a_format_that_is_none_is_refused_before_anything_is_read(capsys, tmp_path):
    words = ["predict", "--support", "a:b", "--query", "c", "--out", tmp_path / "out"]
    assert "--format 'tiff': choose" in refused(capsys, *words, "--format=tiff")


def test_home_is_found_in_every_path(monkeypatch, tmp_path, support):
    monkeypatch.setenv("HOME", str(tmp_path))
    queries(tmp_path / "photos", "a.png")
    run("~/support.png:~/mask.png", "~/photos/a.png", "~/out")
    assert (tmp_path / "out" / "a.png").exists()


def test_no_more_than_two_queries_are_in_memory(tmp_path):
    """However many there are; the second is the one that is being read."""
    task = SEGMENT.learn_classes({"object": picture(40, 50)})
    kept, most = [], []

    def find(pixels):
        kept.append(weakref.ref(pixels))
        most.append(sum(image() is not None for image in kept))
        return task.find(pixels)

    folder = queries(tmp_path / "photos", *(f"{i}.png" for i in range(9)))
    writer = MaskWriter(tmp_path / "out", ("object",))
    assert segment_files(find, find_queries([folder], False), writer) == 9
    assert max(most) <= 2

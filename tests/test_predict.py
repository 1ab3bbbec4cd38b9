"""`qpenet predict` around the network: what is read, written, left out and refused."""

import weakref

import numpy as np
import pytest
from PIL import Image
from predictors import SIDE, Red, picture, run_predict
from test_cli import refused

from qpenet_jax import InputError, Segmenter
from qpenet_jax.core.errors import InputWarning
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
    before = contents(tmp_path)
    for name in ("support.jpg", "mask.jpg"):
        folder = queries(tmp_path / "photos", name)
        error = refusal(support, folder / name, tmp_path)
        assert f"over the input {tmp_path / name[:-4]}.png" in error
    assert contents(tmp_path).items() >= before.items()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mask.png").hardlink_to(tmp_path / "mask.png")
    error = refusal(support, folder / "mask.jpg", tmp_path / "out")
    assert "over the input" in error


def test_what_a_folder_holds_beside_images_is_said(capsys, tmp_path, support):
    folder = queries(tmp_path / "photos", "a.png", "sub/b.JPG", "sub/.hidden/c.png")
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
    masks = {"a.png", "a_overlay.jpg", "sub/b.png", "sub/b_overlay.jpg"}
    assert written == masks | {"predictions.json"}
    _, truth = picture(30, 44)
    with Image.open(out / "sub/b.png") as found:
        assert ((np.asarray(found) == 255) == truth).mean() > 0.9
    folder = queries(tmp_path / "none", "sub/b.jpg")
    (folder / "x.heic").write_bytes(b"")
    error = refusal(support, folder, tmp_path / "out")
    assert "holds no image" in error
    assert "1 x .heic, 1 folder(s): give --recursive" in error


def test_images_of_one_name_in_different_folders_keep_apart(tmp_path, support):
    folder = queries(tmp_path / "photos", "a/x.png", "b/x.png")
    run(support, folder, tmp_path / "out", "--recursive")
    assert (tmp_path / "out/a/x.png").exists()
    assert (tmp_path / "out/b/x.png").exists()
    queries(folder, "a/x.jpg")
    error = refusal(support, folder, tmp_path / "out", "--recursive")
    assert "called 'a/x'" in error


def test_a_support_that_metadata_turn_by_180_degrees_is_warned_of(tmp_path):
    image, mask = picture(40, 50)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(image).save(tmp_path / "s.jpg", exif=exif)
    Image.fromarray(mask).save(tmp_path / "m.png")
    query = queries(tmp_path / "photos", "a.png")
    support = f"{tmp_path / 's.jpg'}:{tmp_path / 'm.png'}"
    with pytest.warns(InputWarning, match=r"s\.jpg: .*must be drawn on the turned"):
        run(support, query, tmp_path / "out")


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

"""`qpenet predict` around the network: what is read, written, left out and refused."""

import weakref

import numpy as np
import pytest
from PIL import Image
from test_cli import refused
from test_segmenter import SEGMENT, picture

from qpenet_jax.cli.main import main
from qpenet_jax.core.errors import InputWarning
from qpenet_jax.masks import annotations
from qpenet_jax.masks import queries as queries_of


@pytest.fixture(autouse=True)
def _red_is_foreground(monkeypatch):
    """A stand-in for the run: red pixels are foreground, whatever the support."""
    monkeypatch.setattr("qpenet_jax.segmenter.load", lambda *_, **__: SEGMENT)


@pytest.fixture
def support(tmp_path):
    image, mask = picture(40, 50)
    Image.fromarray(image).save(tmp_path / "support.png")
    Image.fromarray(255 * mask).save(tmp_path / "mask.png")
    return f"{tmp_path / 'support.png'}:{tmp_path / 'mask.png'}"


def words(support, query, out, *more):
    given = ["predict", "--workdir", "run", "--support", support]
    return [str(w) for w in (*given, "--query", query, "--out", out, *more)]


def queries(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(30, 44)[0]).save(path)
    return folder


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_results_are_never_put_among_the_queries(capsys, tmp_path, support):
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
        assert str(out) in refused(capsys, *words(support, query, out, *more))
    assert contents(tmp_path) == before
    main(words(support, folder, folder / "masks"))  # nobody will read that folder
    assert (folder / "masks" / "a.png").exists()


def test_results_never_replace_a_support_or_its_mask(capsys, tmp_path, support):
    before = contents(tmp_path)
    for name in ("support.jpg", "mask.jpg"):
        folder = queries(tmp_path / "photos", name)
        error = refused(capsys, *words(support, folder / name, tmp_path))
        assert f"over the input {tmp_path / name[:-4]}.png" in error
    assert contents(tmp_path).items() >= before.items()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mask.png").hardlink_to(tmp_path / "mask.png")
    assert "over the input" in refused(
        capsys, *words(support, folder / "mask.jpg", tmp_path / "out")
    )


def test_what_a_folder_holds_beside_images_is_told(capsys, tmp_path, support):
    folder = queries(tmp_path / "photos", "a.png", "sub/b.JPG", "sub/.hidden/c.png")
    for name in ("._a.png", ".DS_Store", "x.heic", "y.heic", "z", "sub/t.txt"):
        (folder / name).write_bytes(b"no image")
    main(words(support, folder, tmp_path / "flat"))
    told = capsys.readouterr()
    assert "left out: 2 x .heic, 1 x without ending, 1 folder(s): give" in told.err
    assert "1 mask(s)" in told.out
    out = tmp_path / "deep"
    main(words(support, folder, out, "--recursive"))
    told = capsys.readouterr()
    assert "left out: 2 x .heic, 1 x .txt, 1 x without ending\n" in told.err
    written = {str(path.relative_to(out)) for path in contents(out)}
    masks = {"a.png", "a_overlay.jpg", "sub/b.png", "sub/b_overlay.jpg"}
    assert written == masks | {"predictions.json"}
    _, truth = picture(30, 44)
    with Image.open(out / "sub/b.png") as found:
        assert ((np.asarray(found) == 255) == truth).mean() > 0.9


def test_a_folder_without_images_says_what_it_has(capsys, tmp_path, support):
    folder = queries(tmp_path / "photos", "sub/b.jpg")
    (folder / "x.heic").write_bytes(b"")
    error = refused(capsys, *words(support, folder, tmp_path / "out"))
    assert "holds no image" in error
    assert "1 x .heic, 1 folder(s): give --recursive" in error


def test_images_of_one_name_in_different_folders_keep_apart(capsys, tmp_path, support):
    folder = queries(tmp_path / "photos", "a/x.png", "b/x.png")
    main(words(support, folder, tmp_path / "out", "--recursive"))
    assert (tmp_path / "out/a/x.png").exists()
    assert (tmp_path / "out/b/x.png").exists()
    capsys.readouterr()
    queries(folder, "a/x.jpg")
    error = refused(capsys, *words(support, folder, tmp_path / "out", "--recursive"))
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
        main(words(support, query, tmp_path / "out"))


def test_home_is_found_in_every_path(monkeypatch, tmp_path, support):
    monkeypatch.setenv("HOME", str(tmp_path))
    queries(tmp_path / "photos", "a.png")
    main(words("~/support.png:~/mask.png", "~/photos/a.png", "~/out"))
    assert (tmp_path / "out" / "a.png").exists()


def test_no_more_than_two_queries_are_in_memory(tmp_path, support, monkeypatch):
    """However many there are; the second is the one that is being read."""
    read, kept, most = annotations.read_image, [], []

    def watched(*args, **options):
        pixels = read(*args, **options)
        kept.append(weakref.ref(pixels))
        most.append(sum(image() is not None for image in kept[1:]))  # of the queries
        return pixels

    monkeypatch.setattr(annotations, "read_image", watched)
    monkeypatch.setattr(queries_of, "read_image", watched)
    folder = queries(tmp_path / "photos", *(f"{i}.png" for i in range(9)))
    main(words(support, folder, tmp_path / "out"))
    assert len(kept) == 1 + 9
    assert max(most) <= 2

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import image_size, read_image, read_label, read_mask

SMOOTH = np.stack(
    np.broadcast_arrays(
        np.arange(0, 240, 10)[:, None], np.arange(0, 160, 10)[None], np.array(90)
    ),
    axis=-1,
).astype(np.uint8)
"""24 x 16, its corners all different."""

GREY = SMOOTH[..., 0] + SMOOTH[..., 1] // 4


def saved(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def same(array: np.ndarray, expected: np.ndarray) -> None:
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, expected)


def test_rgb_and_grey(tmp_path):
    same(read_image(saved(tmp_path / "rgb.png", SMOOTH)), SMOOTH)
    grey = read_image(str(saved(tmp_path / "grey.png", GREY)))
    same(grey, np.repeat(GREY[..., None], 3, axis=2))


def test_alpha_is_dropped_and_colours_below_it_kept(tmp_path):
    alpha = np.full((24, 16, 1), 7, np.uint8)
    rgba = saved(tmp_path / "rgba.png", np.concatenate([SMOOTH, alpha], axis=2))
    same(read_image(rgba), SMOOTH)


@pytest.mark.parametrize("transparency", [None, 0, b"\x00\x80\xff"])
def test_palette_image_is_read_as_colours(tmp_path, transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([2, 0, 1])
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "p.png", **options)
    expected = np.array([[[0, 0, 255], [255, 0, 0], [0, 255, 0]]])
    same(read_image(tmp_path / "p.png"), expected)


def test_cmyk_jpeg(tmp_path):
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[:, 8:] = (0, 255, 255, 0)  # No ink is white, magenta and yellow make red.
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "c.jpg", quality=95)
    rgb = read_image(tmp_path / "c.jpg").astype(int)
    assert abs(rgb[8, 2] - (255, 255, 255)).max() < 8
    assert abs(rgb[8, 13] - (255, 0, 0)).max() < 8


def test_16_bit_grey_is_divided_by_257(tmp_path):
    values = np.array([[0, 128, 129, 257, 300 * 100, 65535]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    for name in ("deep.png", "deep.tif"):
        rgb = read_image(saved(tmp_path / name, values))
        same(rgb, np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "d.png"), SMOOTH[..., ::-1].astype(np.uint16) * 257)
    same(read_image(tmp_path / "d.png"), SMOOTH)


def test_32_bit_is_refused(tmp_path):
    path = saved(tmp_path / "f.tif", np.ones((2, 2), np.float32))
    with pytest.raises(InputError, match=r"f\.tif: 32-bit"):
        read_image(path)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, SMOOTH),
        (2, SMOOTH[:, ::-1]),
        (3, SMOOTH[::-1, ::-1]),
        (6, np.rot90(SMOOTH, -1)),
        (8, np.rot90(SMOOTH, 1)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_applied(tmp_path, orientation, upright, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"x.{suffix}", SMOOTH, exif=exif)
    image = read_image(path)
    assert image_size(path) == image.shape[:2] == upright.shape[:2]
    tolerance = 0 if suffix == "png" else 12
    assert abs(image.astype(int) - upright).max() <= tolerance


def test_exif_orientation_of_a_16_bit_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "x.png", GREY.astype(np.uint16) * 257, exif=exif)
    same(read_image(path)[..., 0], np.rot90(GREY, -1))


def test_large_photograph(tmp_path):
    big = Image.new("L", (8000, 6000), 200)
    big.save(tmp_path / "big.jpg")
    assert image_size(tmp_path / "big.jpg") == (6000, 8000)
    image = read_image(tmp_path / "big.jpg")
    assert image.shape == (6000, 8000, 3)
    assert image[-1, -1].tolist() == [200, 200, 200]


def truncated_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    saved(path, noise)
    path.write_bytes(path.read_bytes()[:-600])


def truncated_png(path: Path) -> None:
    saved(path, np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    path.write_bytes(path.read_bytes()[:-600])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.jpg", truncated_jpeg, "broken image .*truncated"),
        ("a.png", truncated_png, "broken image"),
        ("a.jpg", lambda path: path.write_bytes(b"hello"), "not an image"),
        ("a.jpg", lambda path: path.write_bytes(b""), "not an image"),
        ("a.jpg", lambda path: None, "no such file"),
        ("a.jpg", Path.mkdir, "broken image"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_label])
def test_unreadable_file_is_one_line_with_its_name(
    tmp_path, read, name, write, message
):
    path = tmp_path / name
    write(path)
    if read is read_label and write is truncated_jpeg:
        message = "mode RGB"
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_decompression_bomb_is_an_input_error(tmp_path, monkeypatch):
    path = saved(tmp_path / "bomb.png", GREY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"bomb\.png: far too many pixels"):
        read_image(path)


LABEL = np.array([[0, 5, 20], [255, 1, 0]], np.uint8)


def test_label_of_a_palette_file_is_its_indices(tmp_path):
    image = Image.new("P", (3, 2))
    image.putpalette([(50 * i) % 256 for i in range(768)])
    image.putdata(LABEL.ravel().tolist())
    image.save(tmp_path / "p.png")
    same(read_label(tmp_path / "p.png"), LABEL)


def test_label_of_a_small_palette_file(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 99])
    image.putdata([0, 2, 1])
    image.save(tmp_path / "p.png", bits=2)
    same(read_label(tmp_path / "p.png"), np.array([[0, 2, 1]]))


def test_label_of_a_grey_file_is_its_values(tmp_path):
    same(read_label(saved(tmp_path / "l.png", LABEL)), LABEL)


def test_label_of_a_bilevel_file(tmp_path):
    path = saved(tmp_path / "b.png", np.array([[True, False, True]]))
    same(read_label(path), np.array([[1, 0, 1]]))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_label_in_colour_is_refused_with_the_remedy(tmp_path, mode):
    path = saved(tmp_path / "colour.png", LABEL, mode)
    with pytest.raises(InputError, match=rf"colour\.png.*palette .*mode {mode}; save"):
        read_label(path)


def test_label_of_16_bits_is_refused(tmp_path):
    path = saved(tmp_path / "deep.png", LABEL.astype(np.uint16))
    with pytest.raises(InputError, match=r"deep\.png.*8-bit"):
        read_label(path)


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        ([0, 1], [0, 1]),
        ([1, 1], [1, 1]),
        ([0, 255], [0, 1]),
        ([255, 255], [1, 1]),
        ([0, 1, 255], [0, 1, 255]),
        ([0, 12, 255], [0, 1, 255]),
        ([1, 255], [1, 255]),
    ],
)
def test_mask_values(tmp_path, values, mask):
    path = saved(tmp_path / "m.png", np.array([values], np.uint8))
    same(read_mask(path), np.array([mask]))


def test_mask_without_foreground(tmp_path):
    path = saved(tmp_path / "m.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match=r"m\.png: the mask has no foreground"):
        read_mask(path)


def test_mask_of_two_classes(tmp_path):
    with pytest.raises(InputError, match=r"several foreground values, 1, 5, 20;"):
        read_mask(saved(tmp_path / "m.png", LABEL))

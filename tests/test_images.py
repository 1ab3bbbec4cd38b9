import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from qpenet_jax.core.errors import InputError, InputWarning
from qpenet_jax.data.images import (
    ORIENTATION,
    image_size,
    read_image,
    read_label,
    reread_image,
    warn_of_turn,
)
from qpenet_jax.data.supports import read_mask

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


def palette_image(values: np.ndarray, colours: int = 3) -> Image.Image:
    """Red, green and blue are the indices 0, 1 and 2."""
    image = Image.new("P", values.shape[::-1])
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] + 3 * (colours - 3) * [9])
    image.putdata(values.ravel().tolist())
    return image


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


ALPHA = np.concatenate([SMOOTH, np.full((24, 16, 1), 7, np.uint8)], axis=2)
COLOURS = palette_image(np.array([[2, 0, 1]], np.uint8))
INDEXED = np.array([[[0, 0, 255], [255, 0, 0], [0, 255, 0]]], np.uint8)
CMYK = np.zeros((16, 16, 4), np.uint8)
CMYK[:, 8:] = (0, 255, 255, 0)  # No ink is white, magenta and yellow make red.
INKS = np.full((16, 16, 3), 255, np.uint8)
INKS[:, 8:] = (255, 0, 0)
DEEP = np.array([[0, 128, 129, 257, 300 * 100, 65535]], np.uint16)
DIVIDED = three(np.round(DEEP / 257).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "image", "options", "expected"),
    [
        ("rgb.png", Image.fromarray(SMOOTH), {}, SMOOTH),
        ("grey.png", Image.fromarray(GREY), {}, three(GREY)),
        ("alpha.png", Image.fromarray(ALPHA), {}, SMOOTH),  # dropped, colours kept
        ("palette.png", COLOURS, {}, INDEXED),
        ("palette.png", COLOURS, {"transparency": 0}, INDEXED),
        ("palette.png", COLOURS, {"transparency": b"\x00\x80\xff"}, INDEXED),
        ("cmyk.jpg", Image.fromarray(CMYK, "CMYK"), {"quality": 95}, INKS),
        ("deep.png", Image.fromarray(DEEP), {}, DIVIDED),  # by 257, rounded
        ("deep.tif", Image.fromarray(DEEP), {}, DIVIDED),
    ],
)
def test_every_kind_of_image_is_read_as_rgb(tmp_path, name, image, options, expected):
    image.save(tmp_path / name, **options)
    rgb = read_image(tmp_path / name)
    if name == "cmyk.jpg":  # An edge of colours blurs.
        rgb, expected = rgb[8:9, [2, 13]], expected[8:9, [2, 13]]
    assert rgb.dtype == np.uint8
    within = 7 if name == "cmyk.jpg" else 0
    np.testing.assert_allclose(rgb.astype(int), expected, atol=within)


def test_16_bit_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "d.png"), SMOOTH[..., ::-1].astype(np.uint16) * 257)
    same(read_image(tmp_path / "d.png"), SMOOTH)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def xmp_of(text: str) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999'
        f'/02/22-rdf-syntax-ns#"><rdf:Description {text}</rdf:RDF></x:xmpmeta>'
    ).encode()


TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
"""What makes the stored pixels of each orientation upright."""

UPRIGHT = {orientation: turn(SMOOTH) for orientation, turn in TURNS.items()}


def all_readers_agree(path: Path, upright: np.ndarray, tolerance: int = 0) -> None:
    """Check and use see one picture: header, file, open file and prepared record."""
    data = path.read_bytes()
    images = read_image(path), read_image(BytesIO(data), "x"), reread_image(data, "x")
    for image in images:
        assert image.shape == upright.shape
        assert image.flags.c_contiguous
        assert abs(image.astype(int) - upright).max() <= tolerance
    np.testing.assert_array_equal(images[2], images[0])
    assert image_size(path) == image_size(BytesIO(data), "x") == upright.shape[:2]


def metadata(kind: str, orientation: int, suffix: str) -> dict:
    """Options of Pillow's `save` that state an orientation in EXIF or XMP."""
    lossless = {"lossless": True} if suffix == "webp" else {}
    if kind == "exif":
        return {"exif": exif_of(orientation)} | lossless
    xmp = xmp_of(kind.format(orientation))
    if suffix != "png":
        return {"xmp": xmp} | lossless
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return {"pnginfo": info}


@pytest.mark.parametrize(
    "kind",
    [
        "exif",
        'tiff:Orientation="{}"/>',
        "><tiff:Orientation>{}</tiff:Orientation></rdf:Description>",
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_or_xmp_turns_an_image(tmp_path, kind, suffix):
    for orientation, upright in UPRIGHT.items():
        options = metadata(kind, orientation, suffix)
        path = saved(tmp_path / f"x.{suffix}", SMOOTH, **options)
        all_readers_agree(path, upright, 12 if suffix == "jpg" else 0)


@pytest.mark.parametrize(
    ("exif", "expected"), [(6, 6), (1, 1), (0, 1), (9, 1), (255, 1)]
)
def test_exif_counts_where_xmp_says_otherwise(tmp_path, exif, expected):
    """A value that isn't there turns nothing."""
    more = {"xmp": xmp_of('tiff:Orientation="8"/>')} if exif in (1, 6) else {}
    path = saved(tmp_path / "x.jpg", SMOOTH, exif=exif_of(exif), **more)
    all_readers_agree(path, UPRIGHT[expected], 12)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_tiff_is_turned_once(tmp_path, compression, mode):
    """Pillow turns a TIFF while it loads the pixels, and tells the size upright."""
    plain = Image.fromarray(SMOOTH).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        plain = Image.fromarray(GREY.astype(np.uint16) * 257)
    plain.save(tmp_path / "plain.tif")
    stored = read_image(tmp_path / "plain.tif")
    for orientation, turn in TURNS.items():
        tags = ImageFileDirectory_v2()
        tags[ORIENTATION] = orientation
        path = tmp_path / "x.tif"
        plain.save(path, tiffinfo=tags, compression=compression)
        all_readers_agree(path, turn(stored))


def test_labels_and_16_bit_images_are_turned_by_their_own_metadata(tmp_path):
    label = (np.arange(24 * 16).reshape(24, 16) % 5).astype(np.uint8)
    exif, tags = exif_of(6), ImageFileDirectory_v2()
    tags[ORIENTATION] = 6
    path = saved(tmp_path / "m.png", label, exif=exif)
    same(read_label(path), np.rot90(label, -1))
    path = saved(tmp_path / "m.tif", label, tiffinfo=tags)
    same(read_label(path), np.rot90(label, -1))
    path = saved(tmp_path / "x.png", GREY.astype(np.uint16) * 257, exif=exif)
    same(read_image(path)[..., 0], np.rot90(GREY, -1))


@pytest.mark.parametrize(
    ("orientation", "pixels", "warns"),
    [
        (1, SMOOTH, False),
        (3, SMOOTH, True),
        (2, SMOOTH, True),
        (6, SMOOTH, False),  # a mask on the stored pixels has another size
        (6, SMOOTH[:16], True),
    ],
)
def test_a_turn_that_the_masks_size_cant_tell_is_warned_of(
    tmp_path, orientation, pixels, warns
):
    exif = exif_of(orientation)
    path = saved(tmp_path / "x.jpg", pixels, exif=exif)
    mask = saved(tmp_path / "m.png", pixels[..., 0])
    turned = saved(tmp_path / "t.png", pixels[..., 0], exif=exif)
    warn_of_turn(path, turned)
    if not warns:
        warn_of_turn(path, mask)
        return
    for given in (mask, None):
        with pytest.warns(InputWarning, match=r"x\.jpg: .*exiftool -n -Orientation=1"):
            warn_of_turn(path, given)


def png(height: int, width: int, bits: int, rows: bytes) -> bytes:
    """A grey PNG of so many bits a pixel, made by hand: Pillow can't."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, part in (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""):
        checksum = struct.pack(">I", zlib.crc32(kind + part))
        data += struct.pack(">I", len(part)) + kind + part + checksum
    return data


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_label_of_few_bits_holds_what_is_stored(bits):
    """Pillow fills 0..255 with the values, and makes 1 of 4 bits a 17."""
    values = np.random.default_rng(0).integers(0, 2**bits, (5, 7)).astype(np.uint8)
    places = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :]
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in places)
    label = read_label(BytesIO(png(5, 7, bits, rows)), name="a.png")
    np.testing.assert_array_equal(label, values)


def test_all_readers_agree_on_real_photographs(shared_voc):
    photos = sorted((shared_voc / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))[:20]
    for path in photos:
        all_readers_agree(path, read_image(path))


def truncated(path: Path) -> None:
    shape = (64, 64, 3) if path.suffix == ".jpg" else (64, 64)
    saved(path, np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    path.write_bytes(path.read_bytes()[:-600])


def holding(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def showing(pixels: np.ndarray, mode: str | None = None) -> Callable[[Path], object]:
    return lambda path: saved(path, pixels, mode)


LABEL = np.array([[0, 5, 20], [255, 1, 0]], np.uint8)


def test_a_label_is_the_indices_of_a_palette_or_the_values_of_grey(tmp_path):
    for bits, values in ((8, LABEL), (2, np.array([[0, 2, 1]], np.uint8))):
        palette_image(values, 2**bits).save(tmp_path / "p.png", bits=bits)
        same(read_label(tmp_path / "p.png"), values)
    same(read_label(saved(tmp_path / "l.png", LABEL)), LABEL)
    path = saved(tmp_path / "b.png", np.array([[True, False, True]]))
    same(read_label(path), np.array([[1, 0, 1]]))


BROKEN = [
    ("a.png", truncated, "broken image"),
    ("a.jpg", holding(b"hello"), "not an image"),
    ("a.jpg", holding(b""), "not an image"),
    ("a.jpg", lambda path: None, "no such file"),
    ("a.jpg", Path.mkdir, "broken image"),
    ("bomb.png", holding(png(60_000, 60_000, 8, b"")), "far too many pixels"),
]


@pytest.mark.parametrize(
    ("read", "name", "write", "message"),
    [
        *((read, *row) for read in (read_image, read_label) for row in BROKEN),
        (read_image, "a.jpg", truncated, "broken image .*truncated"),
        (read_label, "a.jpg", truncated, "mode RGB"),
        (read_image, "f.tif", showing(np.ones((2, 2), np.float32)), "32-bit"),
        *(
            (read_label, "a.png", showing(LABEL, mode), f"palette .*mode {mode}; save")
            for mode in ("RGB", "RGBA", "LA", "I;16")
        ),
        (read_mask, "m.png", showing(np.zeros_like(LABEL)), "mask has no foreground"),
        (read_mask, "m.png", showing(LABEL), r"several foreground values, 1, 5, 20;"),
    ],
)
def test_what_cant_be_read_is_one_line_with_the_files_name(
    tmp_path, read, name, write, message
):
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(error.value)


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

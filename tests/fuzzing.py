"""Odd and broken inputs, made by a random generator: the same seed, the same file."""

import copy
import io
import json
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

Rng = np.random.Generator


def chance(rng: Rng, share: float) -> bool:
    return bool(rng.random() < share)


def one_of(rng: Rng, choices: Any) -> Any:
    choices = list(choices)
    return choices[int(rng.integers(len(choices)))]


# --- any file, any JSON -------------------------------------------------------------


def damaged(rng: Rng, data: bytes) -> bytes:
    """Cuts, overwrites, shifts and repeats parts of a file, mostly near its start."""
    out = bytearray(data)
    for _ in range(one_of(rng, (1, 1, 1, 3))):
        at = int(rng.integers(len(out) + 1)) % one_of(rng, (64, 4096, 2**40))
        end = at + int(2 ** rng.uniform(0, 10))
        match int(rng.integers(10)):
            case 0:
                del out[at:]
            case 1:
                del out[at:end]
            case 2:
                out[at:end] = rng.bytes(end - at)
            case 3:
                out[at:at] = rng.bytes(end - at)
            case 4:
                out[at:at] = out[at:end]
            case 5:
                out[at : at + 4] = one_of(rng, (b"\xff" * 4, bytes(4), b"\x7f\xff" * 2))
            case _ if at < len(out):
                out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


DEEP: Any = []
for _ in range(900):
    DEEP = [DEEP]

ODD = (None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 1e9, 2**31, 2**63, 2**200)
ODD += (float("nan"), float("inf"), "", "a", "0", "\ud800", "\0", "../x", "/etc", "é")
ODD += ("x" * 5000, [], {}, [[]], [0], {"a": 1}, [None], ["a", "a"], DEEP)


def changed(rng: Rng, tree: Any) -> Any:
    """Returns a JSON tree in which some values are replaced, moved, doubled or gone."""
    tree = copy.deepcopy(tree)
    for _ in range(one_of(rng, (1, 1, 1, 3))):
        places = list(_places(tree))
        if not places:
            break
        parent, key = one_of(rng, places)
        other, name = one_of(rng, places)
        match int(rng.integers(6)):
            case 0 | 1 | 2:
                parent[key] = one_of(rng, ODD)
            case 3:
                parent[key] = copy.deepcopy(other[name])
            case 4:
                del parent[key]
            case 5 if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            case 5:
                parent[f"{key}{one_of(rng, 'x. _')}"] = parent[key]
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yields all dicts and lists with each of their keys; few of a long list."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def json_file(rng: Rng, tree: Any) -> bytes:
    """Writes a tree that is changed, or the bytes of which are damaged."""
    if chance(rng, 0.25):
        return damaged(rng, json.dumps(tree).encode())
    return json.dumps(changed(rng, tree)).encode()


# --- images and masks ---------------------------------------------------------------

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")
MODES += ("HSV", "I", "F", "I;16", "I;16B", "La", "RGBa")
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "WEBP": ".webp"}
FORMATS["BMP"] = ".bmp"
OTHER_FORMATS = {"GIF": ".gif", "PPM": ".ppm", "JPEG2000": ".jp2", "TGA": ".tga"}
SUFFIXES = (*FORMATS.values(), ".jpeg", ".tiff", ".PNG", ".JPG")
EDGES = (1, 2, 3, 7, 30_000)


def random_size(rng: Rng) -> tuple[int, int]:
    """Returns width and height, 1 to 30,000; never both large."""
    width, height = (
        one_of(rng, EDGES) if chance(rng, 0.2) else int(rng.integers(1, 90))
        for _ in range(2)
    )
    return (width, height) if width * height < 10**7 else (width, 1)


def image_file(rng: Rng) -> tuple[bytes, str]:
    """Returns the bytes of an image of any mode and format, and an ending for it."""
    while True:
        image = _noise(rng, one_of(rng, MODES), random_size(rng))
        formats = FORMATS if chance(rng, 0.9) else OTHER_FORMATS
        kind = one_of(rng, formats)
        try:
            data = _written(rng, image, kind)
        except Exception:  # Pillow can't write this mode, size or option so
            continue
        if chance(rng, 0.3):
            data = damaged(rng, data)
        ending = one_of(rng, SUFFIXES) if chance(rng, 0.1) else formats[kind]
        return data, ending


def _noise(rng: Rng, mode: str, size: tuple[int, int]) -> Image.Image:
    length = len(Image.new(mode, size).tobytes())
    image = Image.frombytes(mode, size, rng.bytes(length))
    if mode in ("P", "PA"):
        image.putpalette(rng.bytes(768))
    return image


def turned(rng: Rng) -> Image.Exif:
    """Returns metadata with any orientation, also with none that there is."""
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(0, 10))
    return exif


def _written(rng: Rng, image: Image.Image, kind: str) -> bytes:
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    if chance(rng, 0.4):
        options["exif"] = turned(rng)
    if chance(rng, 0.1) and kind in ("JPEG", "PNG", "WEBP"):
        turn = f'<x:xmpmeta tiff:Orientation="{rng.integers(0, 10)}"/>'
        options["xmp"] = turn.encode()
    if chance(rng, 0.1) and kind in ("PNG", "GIF", "TIFF", "WEBP"):
        options |= {"save_all": True, "append_images": [image.transpose(0)]}
    if chance(rng, 0.1) and kind == "PNG" and image.mode in ("P", "L", "RGB"):
        clear = int(rng.integers(256))
        options["transparency"] = (clear,) * 3 if image.mode == "RGB" else clear
    if kind == "TIFF":
        ways = (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4")
        options["compression"] = one_of(rng, ways)
    if kind == "JPEG":
        options["progressive"] = chance(rng, 0.3)
    if chance(rng, 0.1):
        options["icc_profile"] = rng.bytes(200)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


LABELS = ((0, 1), (0, 1, 2), (0, 2, 255), (1, 255), (0, 2), (0, 1, 2, 255))
LABELS += ((0, 255), (0,), (1,), (0, 7), (0, 200))


def mask_file(rng: Rng, size: tuple[int, int]) -> bytes:
    """Returns a PNG with a few labels, mostly as it should be."""
    if chance(rng, 0.05):
        return image_file(rng)[0]
    if chance(rng, 0.07):
        size = (size[1] + int(rng.integers(2)), size[0])
    values = np.array(one_of(rng, LABELS), np.uint8)
    image = Image.fromarray(rng.choice(values, size[::-1]))
    options: dict[str, Any] = {}
    match int(rng.integers(9)):
        case 0:
            image = image.convert(one_of(rng, ("1", "RGB", "RGBA", "LA", "I;16")))
        case 1 | 2 | 3:
            image.putpalette(rng.bytes(768))
            options["bits"] = 8 if values.max() > 3 else one_of(rng, (2, 4, 8))
        case 4:
            options["exif"] = turned(rng)
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return damaged(rng, out.getvalue()) if chance(rng, 0.15) else out.getvalue()


# --- PyTorch's pickles ---------------------------------------------------------------


class Calls:
    """Pickles as a call of a function, which a careless reader would make."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def attack(rng: Rng, program: bytes, witness: str) -> bytes:
    """Puts a call that writes a file into a pickle, alone or at a random operation."""
    write = f"open({witness!r}, 'w')"
    ways = {os.system: f"touch {witness}", eval: write, exec: write, os.mkdir: witness}
    function = one_of(rng, ways)
    protocol = int(rng.integers(0, 6))
    call = pickle.dumps(Calls(function, ways[function]), protocol)
    if chance(rng, 0.3):
        return pickle.dumps({"a": Calls(function, ways[function])}, protocol)
    places = [at for _, _, at in pickletools.genops(program) if at]
    at = one_of(rng, places[:200])
    return program[:at] + call[2:-1] + b"0" + program[at:]


def zipped(rng: Rng, members: dict[str, bytes], damage: bool) -> bytes:
    """Writes a zip whose members, sums and all, are right but for what is damaged."""
    out = io.BytesIO()
    victim = one_of(rng, members) if damage else None
    if damage and chance(rng, 0.6):
        victim = "archive/data.pkl"
    way = int(rng.integers(6))
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            if name == victim and way == 0:
                continue
            if name == victim and way == 1:
                archive.writestr(f"{name}x", data)
                continue
            data = damaged(rng, data) if name == victim else data
            packed = zipfile.ZIP_DEFLATED if way == 2 and name == victim else 0
            archive.writestr(name, data, packed)
    return out.getvalue()

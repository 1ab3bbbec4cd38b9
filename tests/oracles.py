"""What odd inputs mean, worked out again by Pillow, NumPy, PyTorch, pycocotools."""

import io
import json
import math
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as rle

try:
    import torch
except ImportError:  # comes with the extra [parity]
    torch: Any = None


def image(data: bytes) -> np.ndarray:
    """RGB of an image file, upright; 16-bit grey divided by 257."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture: Any = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if picture.mode.startswith("I;16"):
            grey = np.floor(np.asarray(picture).astype(float) / 257 + 0.5)
            return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return np.asarray(picture.convert("RGB"))


def size(data: bytes) -> tuple[int, int]:
    """Width and height of an upright image; of what is no image, any."""
    try:
        height, width = image(data).shape[:2]
    except Exception:  # whatever Pillow raises
        return 9, 8
    return width, height


def label(data: bytes) -> np.ndarray:
    """The values of a label map, upright."""
    picture: Any = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert picture.mode in ("1", "L", "P"), f"a label map of mode {picture.mode}"
    return np.asarray(picture).astype(np.uint8)


def mask(data: bytes) -> np.ndarray:
    """A support's mask: 1 the object, 255 ignored."""
    values = label(data)
    marked = sorted(set(np.unique(values)) - {0, 255}) or [255]
    assert len(marked) == 1, f"several values: {marked}"
    assert (values == marked[0]).any(), "no object"
    return np.where(values == marked[0], 1, np.where(values == 255, 255, 0))


def pickles(data: bytes) -> list[bytes]:
    """The five pickles of a legacy PyTorch file, and the rest."""
    stream, parts = io.BytesIO(data), []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(data[start : stream.tell()])
    return [*parts, data[stream.tell() :]]


def members(data: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of what a PyTorch zip has to hold; its folder is "archive"."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        plain = [(n, f"archive/{n.partition('/')[2]}") for n in archive.namelist()]
        needed = ("archive/data.pkl", "archive/data/", "archive/byteorder")
        return [(n, archive.read(old)) for old, n in plain if n.startswith(needed)]


DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2"}
DTYPES |= {"I8": "i1", "U8": "u1", "BOOL": "?"}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file of weights, by PyTorch unless it is .safetensors."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        head, found = json.loads(data[8 : 8 + length]), {}
        for name, entry in head.items():
            if name != "__metadata__":
                kind: Any = DTYPES.get(entry["dtype"], jnp.bfloat16)
                first, end = (8 + length + at for at in entry["data_offsets"])
                flat = np.frombuffer(data[first:end], kind)
                found[name] = flat.reshape(entry["shape"])
    else:
        file = io.BytesIO(_plain(data) if data.startswith(b"PK") else data)
        found = torch.load(file, map_location="cpu", weights_only=True)
        for wrapper in ("state_dict", "model_state_dict", "model"):
            if isinstance(found.get(wrapper), dict):
                found = found[wrapper]
                break
        found = {name: _numpy(tensor) for name, tensor in found.items()}
    return found


def _plain(data: bytes) -> bytes:
    """Write a PyTorch zip anew, without what newer versions put into it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/version", "3\n")
        for name, content in members(data):
            archive.writestr(name, content)
    return out.getvalue()


def _numpy(tensor: Any) -> np.ndarray:
    if tensor.dtype != torch.bfloat16:
        return tensor.detach().numpy()
    return tensor.detach().float().numpy().astype(jnp.bfloat16)


def coco_labels(path: Path) -> dict[str, np.ndarray]:
    """Label maps as pycocotools draws them, by the names of the images."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    ranks = {i: r for r, i in enumerate(sorted(c["id"] for c in content["categories"]))}
    found = {}
    for photo in content["images"]:
        size = photo["height"], photo["width"]
        shown = [a for a in content["annotations"] if a["image_id"] == photo["id"]]
        shown = [a for a in shown if not a["iscrowd"]]
        if not shown:
            continue
        drawn = np.zeros(size, np.uint8)
        for one in shown:
            drawn[_drawn(one["segmentation"], size)] = ranks[one["category_id"]] + 1
        found[Path(photo["file_name"]).stem] = drawn
    return found


def _drawn(parts: Any, size: tuple[int, int]) -> np.ndarray:
    if isinstance(parts, list):
        parts = [part for part in parts if len(part) >= 6]
        encoded = rle.merge(rle.frPyObjects(parts, *size))
    elif isinstance(parts["counts"], list):
        encoded = rle.frPyObjects(parts, *size)
    else:
        encoded = parts
    return rle.decode(encoded) > 0


def coco_mask(path: Path, label: str) -> np.ndarray:
    """What one category marks in the only photo of a file of COCO's."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    (photo,) = content["images"]
    ids = [c["id"] for c in content["categories"] if str(c["name"]) == label]
    return np.any(
        [
            _drawn(one["segmentation"], (photo["height"], photo["width"]))
            for one in content["annotations"]
            if one["category_id"] in ids and not one.get("iscrowd")
            if one["image_id"] == photo["id"]
        ],
        axis=0,
    )


def labelme_mask(path: Path, label: str) -> np.ndarray:
    """What one label marks in a photo of 50 x 40, as labelme's `shape_to_mask` does."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    canvas = Image.new("L", (50, 40))
    pen = ImageDraw.Draw(canvas)
    for shape in content["shapes"]:
        if shape["label"] != label:
            continue
        points = [tuple(point) for point in shape["points"]]
        kind = shape.get("shape_type") or "polygon"
        if kind == "rectangle":
            (a, b), (c, d) = points
            pen.rectangle((min(a, c), min(b, d), max(a, c), max(b, d)), 1, 1)
        elif kind == "circle":
            (a, b), (c, d) = points
            r = math.hypot(a - c, b - d)
            pen.ellipse((a - r, b - r, a + r, b + r), 1, 1)
        else:
            drawn = Image.new("L", (50, 40))
            ImageDraw.Draw(drawn).polygon(points, 1, 1)
            canvas.paste(1, mask=drawn.point(lambda x: 255 * x))
    return np.array(canvas)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a JSON config by their dotted names."""
    found = {}
    for name, value in tree.items():
        where = f"{prefix}{name}"
        found |= flat(value, f"{where}.") if isinstance(value, dict) else {where: value}
    return found


def lines(path: Path) -> list[str]:
    """The stripped lines of a text."""
    text = path.read_bytes().decode("utf-8-sig")
    return [line.strip() for line in text.rstrip().splitlines()]

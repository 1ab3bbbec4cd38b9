"""What `predict` writes: masks in the formats of several tools, scores, a summary."""

import contextlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import refuse_overwriting, write_whole
from qpenet_jax.evaluation.pictures import class_overlay, voc_colour
from qpenet_jax.masks.coco_json import CocoFile
from qpenet_jax.masks.labelme import labelme_file
from qpenet_jax.masks.queries import Frame, Query, frames
from qpenet_jax.masks.tasks import Segmentation
from qpenet_jax.masks.videos import frame_rate, overlay_video

SUMMARY = Path("predictions.json")

COCO = {name: Path(f"{name}.json") for name in ("coco", "coco_polygons")}
"""Files in COCO's format, about all images, by the name of their format."""

Mask = UInt8[np.ndarray, "h w"]

VOC_FOLDER = Path("SegmentationClass")

FORMAT = "qpenet_jax predictions 1"
"""The format of the summary, which stands in it."""


class MaskWriter:
    """Files below `out` for each image that is segmented.

    A file is written whole or not at all. The files about all images, the summary and
    COCO's, are written by `finish`; those of an earlier call are deleted before the
    first mask is written, so that none is about masks that are no longer there.
    """

    def __init__(
        self,
        out: Path,
        classes: Sequence[str],
        formats: Sequence[str] = ("png",),
        *,
        probabilities: bool = False,
        about: Mapping[str, Any] | None = None,
        photos: Path | None = None,
    ):
        """Writes nothing yet.

        `about` stands in the summary: the version, the run and the like. `photos` is
        the folder of queries with relative paths, by default the working folder.
        """
        self.out, self.classes, self.formats = out, tuple(classes), tuple(formats)
        self.probabilities, self._photos = probabilities, photos or Path()
        self._images: list[dict[str, Any]] = []
        listed = [
            {"index": i, "name": name, "colour": list(voc_colour(i))}
            for i, name in enumerate(self.classes, 1)
        ]
        self._summary = {"format": FORMAT, **(about or {}), "classes": listed}
        self._coco = {
            COCO[name]: CocoFile(self.classes, polygons=name == "coco_polygons")
            for name in COCO
            if name in self.formats
        }

    def refuse_clashes(self, queries: Iterable[Query], read: Sequence[Path]) -> None:
        """Refuses results in each other's place, or in that of a file that is read.

        Raises:
            InputError: naming them.
        """
        files, folders = [self.out / name for name in (SUMMARY, *self._coco)], set()
        for query in queries:
            if query.is_video:
                files.append(self.overlay_video(query))
                frame = self._files(query.name / "0", is_video=True)
                folders |= {path.parent for path in frame.values()}
            else:
                files += self._files(query.name, is_video=False).values()
        path, times = Counter(files).most_common(1)[0]
        if times > 1:
            raise InputError(f"two results would be called {path}: rename an image")
        for folder in folders:
            taken = [path for path in files if path.is_relative_to(folder)]
            real = folder.resolve()
            taken += [path for path in read if path.resolve().is_relative_to(real)]
            if taken:
                raise InputError(
                    f"the masks of a video's frames would be written into {folder}, "
                    f"where {taken[0]} is: choose another --out"
                )
        refuse_overwriting([*files, *(folder / "0.png" for folder in folders)], read)

    def add(self, query: Query, frame: Frame, found: Segmentation) -> None:
        """Writes what was found in an image, or in a frame of a video.

        Raises InputError where that can't be written.
        """
        if not self._images:
            for name in (SUMMARY, *self._coco):
                (self.out / name).unlink(missing_ok=True)
        files = self._files(frame.name, query.is_video)
        for what, path in files.items():
            write_whole(path, self._content(what, path, query, frame, found))
        photo = (
            files["frame"].relative_to(self.out) if "frame" in files else query.shown
        )
        for coco in self._coco.values():
            coco.add(photo.as_posix(), found)
        self._images.append(self._summed_up(query, frame, found, files))

    def finish(self) -> None:
        """Writes the files that are about all images; raises InputError if it can't."""
        for name, coco in self._coco.items():
            write_whole(self.out / name, json.dumps(coco.content))
        summary = self._summary | {"images": self._images}
        write_whole(self.out / SUMMARY, json.dumps(summary, indent=1))

    def overlay_video(self, query: Query) -> Path:
        """Returns the video of the overlays of a video's frames."""
        return self.out / f"{query.name}_overlay.mp4"

    def _files(self, name: Path, is_video: bool) -> dict[str, Path]:
        """Returns the files of an image by what they hold."""
        files: dict[str, Path] = {}
        if "png" in self.formats:
            files["png"] = Path(f"{name}.png")
        if "voc" in self.formats:
            files["voc"] = VOC_FOLDER / f"{name}.png"
        if not is_video:
            files["overlay"] = Path(f"{name}_overlay.jpg")
        elif {*COCO, "labelme"} & set(self.formats):  # their files name images
            files["frame"] = Path(f"{name}.jpg")
        if "labelme" in self.formats:
            files["labelme"] = Path(f"{name}.json")
        if self.probabilities:
            several = len(self.classes) > 1
            for i, label in enumerate(self.classes):
                ending = f"_{label}" if several else ""
                files[f"probability {i}"] = Path(f"{name}_probability{ending}.png")
        return {what: self.out / path for what, path in files.items()}

    def _content(self, what, path, query: Query, frame: Frame, found: Segmentation):
        """Returns what is to be written into one of an image's files."""
        match what.split():
            case ["png"] if len(self.classes) == 1:
                return _png(255 * found.index)
            case ["png" | "voc"]:
                return _png(found.index, PALETTE)
            case ["overlay"]:
                overlay = class_overlay(frame.pixels, found.index, len(self.classes))
                return _encoded(Image.fromarray(overlay), "JPEG", quality=75)
            case ["frame"]:
                image = Image.fromarray(frame.pixels)
                return _encoded(image, "JPEG", quality=95)  # others may train on it
            case ["labelme"]:
                photo = self._photos / query.path
                if query.is_video:
                    photo = path.with_suffix(".jpg")
                content = labelme_file(path, photo, found, self.classes)
                return json.dumps(content, indent=1)
        number = int(what.split()[1])
        levels = np.rint(65535 * found.probabilities[number]).astype(np.uint16)
        return cv2.imencode(".png", levels)[1].tobytes()

    def _summed_up(self, query, frame, found, files) -> dict[str, Any]:
        counts = np.bincount(found.index.ravel(), minlength=len(self.classes) + 1)
        height, width = found.index.shape
        number = {} if frame.number is None else {"frame": frame.number}
        return {
            "file": str(query.path),
            **number,
            "height": height,
            "width": width,
            "found": {
                name: {"pixels": int(counts[i]), "score": found.scores[i - 1]}
                for i, name in enumerate(self.classes, 1)
            },
            "files": [path.relative_to(self.out).as_posix() for path in files.values()],
        }


PALETTE = [channel for index in range(256) for channel in voc_colour(index)]


def _png(mask: Mask, palette: Sequence[int] = ()) -> bytes:
    """Returns a PNG of 8 bits, grey or with the colours of a palette."""
    image = Image.fromarray(mask)
    if palette:
        image.putpalette(palette)
    # Masks are long runs of one value: a quarter of the time, and no larger.
    return _encoded(image, "PNG", compress_type=zlib.Z_RLE)


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def segment_files(
    find: Callable[[UInt8[np.ndarray, "h w 3"]], Segmentation],
    queries: Iterable[Query],
    results: MaskWriter,
) -> int:
    """Writes what `find` finds in every image and frame; returns how many they were.

    One image at a time is in memory. Raises InputError where a file is broken or can't
    be written; what was written before stays, without a summary.
    """
    count = 0
    for query in queries:
        video = contextlib.nullcontext()
        if query.is_video:
            path, rate = results.overlay_video(query), frame_rate(query.path)
            video = overlay_video(path, rate, len(results.classes))
        with video as add:
            for frame in frames(query):
                found = find(frame.pixels)
                results.add(query, frame, found)
                count += 1
                if add is not None:
                    add(frame.pixels, found)
    results.finish()
    return count

"""Videos: frames read one after the other, overlays written."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from qpenet_jax.core.errors import InputError, InputWarning
from qpenet_jax.evaluation.pictures import class_overlay
from qpenet_jax.masks.tasks import Segmentation

RGB = UInt8[np.ndarray, "h w 3"]

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".m4v", ".webm"}
"""What is read as a video where it is named; in a folder, videos are left out."""

# OpenCV reads it whenever it opens a video. With other options of FFmpeg, a file that
# calls itself a video could be a list of others, and of addresses to fetch.
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = (
    "protocol_whitelist;file|format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm"
)
# FFmpeg prints lines of its own about a broken file; this is read at its first use.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def read_video(path: Path) -> Iterator[RGB]:
    """Yields a video's frames as RGB, upright; one at a time is in memory.

    Warns if it has fewer frames than its header has.

    Raises:
        InputError: no frame can be read.
    """
    with _opened(path) as video:
        expected, count = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0
        read, frame = video.read()
        if not read:
            raise InputError(f"{path}: no frame can be read; convert it to mp4")
        while read:
            count += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            read, frame = video.read()
    if count < expected:
        message = f"{path}: only {count} of {expected} frames could be read"
        warnings.warn(message, InputWarning, stacklevel=2)


def frame_rate(path: Path) -> float:
    """Returns a video's frames a second by its header, 25 where it has none."""
    with _opened(path) as video:
        rate = video.get(cv2.CAP_PROP_FPS)
    return rate if 0 < rate < 1000 else 25.0


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    path.open("rb").close()  # the system's own message, where it can't be read
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    cv2.utils.logging.setLogLevel(level)
    try:
        yield video
    finally:
        video.release()


@contextlib.contextmanager
def overlay_video(
    path: Path, rate: float, classes: int
) -> Iterator[Callable[[RGB, Segmentation], None]]:
    """Yields a function that adds the overlay of a frame to a video.

    The video has another name until all went well; else it is deleted. Raises
    InputError where OpenCV can't write it.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}.part.mp4")
    writer: Any = cv2.VideoWriter()

    def add(pixels: RGB, found: Segmentation) -> None:
        overlay = class_overlay(pixels, found.index, classes)
        if not writer.isOpened():
            path.parent.mkdir(parents=True, exist_ok=True)
            code = cv2.VideoWriter.fourcc(*"mp4v")
            if not writer.open(str(part), code, rate, overlay.shape[1::-1]):
                raise InputError(f"{path}: this OpenCV can't write such a video")
        writer.write(cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR))

    try:
        yield add
        writer.release()
        if part.exists():
            part.replace(path)
    finally:
        writer.release()
        part.unlink(missing_ok=True)

"""TensorBoard's file of events, written at once: an error of the disk ends the run.

The writer of tensorboardX has a thread, and when that has died of a full disk, the next
events wait for it for ever.
"""

import contextlib
import socket
import time
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

PREFIX = "events.out.tfevents."

RGB = 3
"""TensorBoard's number of an image's colours."""

KINDS: Any = event_pb2  # whose classes are made when it is imported
Summary: Any = summary.Summary


class Events(contextlib.AbstractContextManager):
    """Writes a new file of events into a folder; to be used in a `with`.

    TensorBoard reads the files in the order of their names, which begin with the time:
    this one's comes last even if the clock was turned back. Events of earlier files
    from `purge_step` on aren't shown any more. Methods raise OSError.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        """Opens the file; makes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        names = (path.name.split(".") for path in folder.glob(f"{PREFIX}*"))
        before = [int(name[3]) for name in names if name[3].isdigit()]
        stamp = max([int(time.time()), *(second + 1 for second in before)])
        path = folder / f"{PREFIX}{stamp:010d}.{socket.gethostname()}"
        self._file = RecordWriter(str(path))
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            log = KINDS.SessionLog(status=KINDS.SessionLog.START)
            self._write(session_log=log, step=purge_step)

    def __exit__(self, *_: object) -> None:
        """Closes the file, unless the error of the `with` left it unwritten."""
        with contextlib.suppress(OSError):
            self._file.close()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Writes a value."""
        self._write(summary=summary.scalar(name, value), step=step)

    def add_image(self, name: str, png: Path, step: int) -> None:
        """Writes the image of a PNG file."""
        with Image.open(png) as picture:
            width, height = picture.size
        shown = Summary.Image(
            height=height,
            width=width,
            colorspace=RGB,
            encoded_image_string=png.read_bytes(),
        )
        value = Summary.Value(tag=name, image=shown)
        self._write(summary=Summary(value=[value]), step=step)

    def _write(self, **fields: Any) -> None:
        event = KINDS.Event(wall_time=time.time(), **fields)
        self._file.write(event.SerializeToString())
        self._file.flush()

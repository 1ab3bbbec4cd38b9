"""TensorBoard's file of events, written at once: an error of the disk ends the run.

The writer of tensorboardX has a thread, and when that has died of a full disk, the next
events wait for it for ever.
"""

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from qpenet_jax.core import cluster
from qpenet_jax.runs.evaluator import FIGURE

PREFIX = "events.out.tfevents."

PROTO: Any = event_pb2  # whose classes are made when it is imported


class Events(contextlib.AbstractContextManager):
    """Writes a new file of events into a folder; to be used in a `with`.

    TensorBoard reads the files of a folder in the order of their names, which begin
    with the time; this one's is the last even if the clock was turned back. Events of
    earlier files from `purge_step` on aren't shown any more. Methods raise OSError.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        """Opens the file; makes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        earlier = [int(path.name.split(".")[3]) for path in folder.glob(f"{PREFIX}*")]
        stamp = max([time.time_ns(), *(each + 1 for each in earlier)])
        path = folder / f"{PREFIX}{stamp}.{socket.gethostname()}"
        self._file = RecordWriter(str(path))
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            log = PROTO.SessionLog(status=PROTO.SessionLog.START)
            self._write(session_log=log, step=purge_step)

    def __exit__(self, *_: object) -> None:
        """Closes the file, unless the error of the `with` left it unwritten."""
        with contextlib.suppress(OSError):
            self._file.close()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Writes a value."""
        self._write(summary=summary.scalar(name, value), step=step)

    def add_image(self, name: str, file: Path, step: int) -> None:
        """Writes the image of a file."""
        with Image.open(file) as opened:
            pixels = np.asarray(opened)
        shown = summary.image(name, pixels, dataformats="HWC")
        self._write(summary=shown, step=step)

    def _write(self, **fields: Any) -> None:
        event = PROTO.Event(wall_time=time.time(), **fields)
        self._file.write(event.SerializeToString())
        self._file.flush()


def fetched(metrics: Sequence[Any]) -> list[dict[str, float]]:
    """Returns the metrics of some steps as numbers, fetched from the device at once."""
    steps: Any = jax.device_get(metrics)
    return [{name: float(value) for name, value in m.items()} for m in steps]


def speeds(config: Any, steps: int, start: float, waited: float) -> dict[str, float]:
    """Returns how fast some steps were that began at `start`, by `perf_counter`.

    Evaluating and saving don't belong to it.
    """
    seconds = time.perf_counter() - start
    images = steps * config.batch_size * (config.shots + 1)
    return {
        "images_per_second": images / seconds,
        "step_seconds": seconds / steps,
        "waiting_for_data": waited / seconds,
    }


def open_events(workdir: Path, start: int) -> contextlib.AbstractContextManager:
    """Returns a new file of TensorBoard events in the first process, else None."""
    if not cluster.is_first():
        return contextlib.nullcontext()
    return Events(workdir, purge_step=start + 1)


def write_scalars(
    events: Events | None, group: str, values: Mapping[str, float], step: int
) -> None:
    """Writes values for TensorBoard, in the first process."""
    if events:
        for name, value in values.items():
            events.add_scalar(f"{group}/{name}", value, step)


def write_results_events(workdir: Path, results: Mapping[str, Any]) -> None:
    """Writes the final scores and the figure for TensorBoard, in the first process."""
    if not cluster.is_first():
        return
    step = results["step"]
    with Events(workdir) as events:
        events.add_scalar("eval/miou", results["miou"], step)
        events.add_scalar("eval/fb_iou", results["fb_iou"], step)
        events.add_image("episodes", workdir / FIGURE, step)

"""What TensorBoard shows of a training: events, and the trace of some steps.

Events are written at once, and an error of the disk ends the run: the writer of
tensorboardX has a thread, and when that has died of a full disk, the next events wait
for it for ever.
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

WARM_UP = 10
"""Steps before those that are traced: they compile, and fill the buffers."""


class Events(contextlib.AbstractContextManager):
    """Writes a new file of events into a folder; to be used in a `with`.

    Of several processes only the first writes, the others' events go nowhere.
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
        self._file = RecordWriter(str(path)) if cluster.is_first() else None
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            log = PROTO.SessionLog(status=PROTO.SessionLog.START)
            self._write(session_log=log, step=purge_step)

    def __exit__(self, *_: object) -> None:
        """Closes the file, unless the error of the `with` left it unwritten."""
        with contextlib.suppress(OSError):
            if self._file:
                self._file.close()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Writes a value."""
        self._write(summary=summary.scalar(name, value), step=step)

    def add_scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Writes values of one group, which TensorBoard shows together."""
        for name, value in values.items():
            self.add_scalar(f"{group}/{name}", value, step)

    def add_image(self, name: str, file: Path, step: int) -> None:
        """Writes the image of a file."""
        with Image.open(file) as opened:
            pixels = np.asarray(opened)
        shown = summary.image(name, pixels, dataformats="HWC")
        self._write(summary=shown, step=step)

    def _write(self, **fields: Any) -> None:
        if not self._file:
            return
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


def write_results_events(workdir: Path, results: Mapping[str, Any]) -> None:
    """Writes the final scores and the figure for TensorBoard, in the first process."""
    if not cluster.is_first():
        return
    step = results["step"]
    with Events(workdir) as events:
        final = {name: results[name] for name in ("miou", "fb_iou")}
        events.add_scalars("eval", final, step)
        events.add_image("episodes", workdir / FIGURE, step)


class Profile(contextlib.AbstractContextManager):
    """Traces `steps` steps into `plugins/profile` of a workdir; none if it is 0.

    Tracing begins WARM_UP steps after the start, or as late as the steps that are left
    allow.
    """

    def __init__(self, workdir: Path, steps: int, start: int, total: int):
        """Chooses among the steps from `start` to `total`; nothing is traced yet."""
        self._workdir, self._trace = workdir, contextlib.ExitStack()
        first = start + 1 + max(min(WARM_UP, total - start - steps), 0)
        self.steps = range(first, min(first + steps, total + 1))

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Returns the name of a step in the trace, which the first step begins."""
        if number in self.steps[:1]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would double it
            trace = jax.profiler.trace(self._workdir, profiler_options=options)
            self._trace.enter_context(trace)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def finished(self, number: int, result: Any) -> None:
        """Ends the trace after its last step, when the device is done with it."""
        if number in self.steps[-1:]:
            jax.block_until_ready(result)
            self._trace.close()

    def __exit__(self, *_: object) -> None:
        """Ends a trace whose training was stopped."""
        self._trace.close()

"""What is told of a training while it runs: bar, TensorBoard events, warnings."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.runs.events import Events
from qpenet_jax.runs.trainer import Trainer
from qpenet_jax.training import health


class Progress(contextlib.AbstractContextManager):
    """Collects the steps' metrics and tells them; stops a training that diverges."""

    def __init__(self, trainer: Trainer, workdir: Path, start: int):
        """Begins after `start` steps."""
        self._rate, config = trainer.learning_rate, trainer.config
        self._images = config.batch_size * (config.shots + 1)
        self._watch = health.Watch()
        self._recent: list[Any] = []  # metrics of the steps since the last `tell`
        self._writer = None
        if cluster.is_first():
            self._writer = Events(workdir, purge_step=start + 1)
        self._bar = tqdm(
            total=trainer.steps,
            initial=start,
            desc="training",
            unit="step",
            disable=not cluster.is_first(),
        )
        self.restart_clock()

    def __exit__(self, *_: object) -> None:
        """Closes the bar and the file of events."""
        self._bar.close()
        if self._writer is not None:
            self._writer.__exit__()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the `with` as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, measured: Any) -> None:
        """Takes a step's metrics; they stay on the device.

        We run ahead of it by this step alone. So batches don't pile up in its memory,
        and we wait for data only when it soon will.
        """
        if self._recent:
            jax.block_until_ready(self._recent[-1])
        self._recent.append(measured)
        self._bar.update()

    def tell(self, step: int, saved: int | None) -> None:
        """Tells what the steps up to this one measured.

        Raises:
            NotFinite: the loss isn't finite any more; it names the checkpoint `saved`.
        """
        # All at once: a step's values would make the device wait for us.
        history = fetched(self._recent)
        values = history[-1]
        for number, each in enumerate(history, step - len(history) + 1):
            stop_on_nan(each, number, saved)
        for warning in self._watch(history) if cluster.is_first() else ():
            self._bar.write(warning, file=sys.stderr)
        self._bar.set_postfix({k: f"{values[k]:.2f}" for k in ("loss", "iou")})
        seconds = time.perf_counter() - self._start
        steps = len(self._recent)
        values["learning_rate"] = float(np.asarray(self._rate(step - 1)))
        values["images_per_second"] = steps * self._images / seconds
        values["step_seconds"] = seconds / steps
        values["waiting_for_data"] = self._waited / seconds
        self.scalars("train", values, step)
        self._recent = []

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Writes values for TensorBoard, in the first process."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def restart_clock(self) -> None:
        """Counts the speed from now on: evaluating and saving don't belong to it."""
        self._start, self._waited = time.perf_counter(), 0.0


def fetched(metrics: Any) -> list[dict[str, float]]:
    """Returns the metrics of some steps as numbers, fetched from the device at once."""
    steps: Any = jax.device_get(metrics)
    return [{name: float(value) for name, value in m.items()} for m in steps]


class NotFinite(InputError):
    """Training diverged: `what` isn't finite any more since `step`."""

    def __init__(self, what: str, step: int, saved: int | None):
        self.what, self.step = what, step
        kept = "none is saved yet" if saved is None else f"step {saved} is kept"
        super().__init__(
            f"{what} at step {step}; last good checkpoint: {kept}; start again in a "
            "new --workdir with --config.recipe=stable or a lower config.optimizer.lr"
        )


def stop_on_nan(values: Mapping[str, float], step: int, saved: int | None) -> None:
    """Raises NotFinite if the loss or the gradient is not finite any more."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise NotFinite(f"{name} is {values[name]}", step, saved)

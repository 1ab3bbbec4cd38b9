"""A trace of some steps of a training, which TensorBoard or xprof opens."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

WARM_UP = 10
"""Steps before those that are traced: they compile, and fill the buffers."""


class Profile(contextlib.AbstractContextManager):
    """Traces `steps` steps into `plugins/profile` of a workdir; none if it is 0.

    Tracing begins WARM_UP steps after the start, or as late as the steps that are left
    allow.
    """

    def __init__(self, workdir: Path, steps: int, start: int, total: int):
        """Chooses among the steps from `start` to `total`; nothing is traced yet."""
        self._workdir, self._running = workdir, False
        first = start + 1 + max(min(WARM_UP, total - start - steps), 0)
        self.steps = range(first, min(first + steps, total + 1))

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Names a step in the trace, which the first begins."""
        if number in self.steps and not self._running:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would double it
            jax.profiler.start_trace(self._workdir, profiler_options=options)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def finished(self, number: int, result: Any) -> None:
        """Ends the trace after its last step, when the device is done with it."""
        if self._running and number == self.steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def __exit__(self, *_: object) -> None:
        """Ends a trace whose training was stopped."""
        if self._running:
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

"""Ctrl-C and SIGTERM: a flag that the training loop and an evaluation read."""

import contextlib
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qpenet_jax.core import cluster

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_any = jax.jit(jnp.any)


class StopSignal(contextlib.AbstractContextManager):
    """Sets `asked` when a signal arrives; a second one stops the process at once."""

    asked = False
    _any_asked: Any = False

    def __enter__(self) -> "StopSignal":
        """Catches the signals."""
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler)
        print("\nstopping after this step; again to stop at once", file=sys.stderr)

    def in_any_process(self, split: NamedSharding) -> bool:
        """Returns whether any process was asked to stop, the same in all of them.

        Called once a step. With several processes it returns what the call before has
        asked the devices, which share a batch by `split`: so no process waits.
        """
        if cluster.count() == 1:
            return self.asked
        flags = np.full(len(split.addressable_devices), self.asked)
        flags = jax.make_array_from_process_local_data(split, flags)
        before, self._any_asked = bool(self._any_asked), _any(flags)
        return before

"""Ctrl-C and SIGTERM: a flag that the training loop and an evaluation read."""

import contextlib
import signal
import sys
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal(contextlib.AbstractContextManager):
    """Sets `asked` when a signal arrives; a second one stops the process at once."""

    asked = False

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

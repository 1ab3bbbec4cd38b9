"""Ctrl-C and SIGTERM while training: at once, but no step and no save is cut in two."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from qpenet_jax.core import cluster
from qpenet_jax.core.last_words import SPREAD

SIGNALS = (signal.SIGINT, signal.SIGTERM)


SOON = 0.05
"""Seconds after which a lost stop is raised once more."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM; the message says what is kept."""


class StopSignal:
    """Raises Interrupted where a signal arrives, or notes it while `postponed`.

    A second signal of the same kind stops the process at once. One that another of
    several processes got counts as well, but not as a second.
    """

    def __init__(self):
        """Does nothing yet: signals are caught inside of the `with`."""
        self.asked = False
        self._postponed = False
        self._before = {}
        self._hook: Any = None
        self._once_more: threading.Timer | None = None

    def __enter__(self) -> "StopSignal":
        """Catches the signals."""
        self._before = {n: signal.signal(n, self._on_signal) for n in SIGNALS}
        if cluster.count() > 1:
            self._before[SPREAD] = signal.signal(SPREAD, self._on_others_signal)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Gives the signals back to whoever had them.

        Raises:
            Interrupted: one arrived that nothing has acted on, too late to stop work.
        """
        if sys.unraisablehook == self._on_unraisable:  # nobody has another since
            sys.unraisablehook = self._hook
        if self._once_more:
            self._once_more.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.asked and kind is None:
            raise Interrupted("stopped when all was done and saved")

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Only note a signal, in `asked`; raise Interrupted when the `with` ends."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False
        self._raise_if_asked()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raises Interrupted where a signal arrives, for a part of what is postponed."""
        self._postponed = False
        try:
            self._raise_if_asked()
            yield
        finally:
            self._postponed = True

    def _on_signal(self, number: int, frame: object) -> None:
        again, self.asked = self.asked, True
        signal.signal(number, signal.default_int_handler)
        cluster.tell_stop()
        if self._postponed:
            print("\nstopping after this step; again to stop at once", file=sys.stderr)
        elif not again:
            self._raise_if_asked()

    def _on_others_signal(self, number: int, frame: object) -> None:
        again, self.asked = self.asked, True
        if not self._postponed and not again:
            self._raise_if_asked()

    def _on_unraisable(self, unraisable: Any) -> None:
        """Raises a stop again that came while Python was cleaning up, and so got lost.

        Other processes have heard of it, and wait for this one to stop.
        """
        if not issubclass(unraisable.exc_type, Interrupted):
            self._hook(unraisable)
            return
        signal.signal(signal.SIGTERM, self._on_lost_signal)
        main = threading.main_thread().ident
        sent = signal.pthread_kill, (main, signal.SIGTERM)
        self._once_more = threading.Timer(SOON, *sent)
        self._once_more.start()

    def _on_lost_signal(self, number: int, frame: object) -> None:
        signal.signal(number, signal.default_int_handler)
        if not self._postponed:
            self._raise_if_asked()

    def _raise_if_asked(self) -> None:
        if self.asked:
            raise Interrupted("stopped: the same command goes on")

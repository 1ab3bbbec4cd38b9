"""Calls that are under way: Python must not end in the middle of one.

The server's threads are cut off where they are at the end of the process. In the middle
of JAX or OpenCV that would abort it, with a message of C++.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator

from qpenet_jax.core.errors import InputError


class Work:
    """Counts calls, lets those that take long stop early, and waits for the last."""

    def __init__(self):
        self._changed = threading.Condition()
        self._calls, self._closed = 0, False

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Counts what is done meanwhile; raises InputError after `close`."""
        with self._changed:
            self._refuse_if_closed()
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def while_open(self, steps: Iterable[int]) -> Iterator[int]:
        """Yields steps of a call; raises InputError before the next one once closed."""
        for step in steps:
            self._refuse_if_closed()
            yield step

    def close(self) -> None:
        """Lets no call begin, and wait until those that have begun are through."""
        self._closed = True
        with self._changed:
            self._changed.wait_for(lambda: not self._calls)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise InputError("the page has been closed")

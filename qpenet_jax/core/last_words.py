"""What a process says when another one is gone, before JAX makes it end as well.

JAX notices that a process is gone and aborts the others, from a thread of its own in
C++, with a page of log and status 134. Nothing of that can be configured. So C's
standard error goes to a file, in which a thread of Python reads why, and an abort waits
the seconds that this thread needs to tell it in one line and to end the process.
"""

import ctypes
import os
import platform
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import NoReturn

from jax.errors import JaxRuntimeError

PAUSE = 0.5
"""Seconds between two looks at the log."""

GONE = getattr(os, "EX_TEMPFAIL", 75)
"""The exit code of a process that ends because another one is gone: try again."""

STOPPED = 130
"""The exit code of a process that was asked to stop."""

LOST = re.compile(
    r"(?i)gloo|nccl|rccl|socket closed|connection (reset|refused|closed)|"
    r"coordination service|CoordinationService|heartbeat|tasks? .*(unhealthy|died)"
)
"""In what a computation or JAX's service fails with: that another process is gone."""

FATAL = "distributed service detected fatal errors"

NOISE = re.compile(r"coordination_service|client\.h|preemption|\[Gloo\]")
"""Lines of the log that are about joining and leaving, and of no use to a user."""

SPREAD = getattr(signal, "SIGUSR2", signal.SIGTERM)
"""The signal that a process gives itself where another one was asked to stop."""


class Watch:
    """Reads C's standard error, and whether another process was asked to stop."""

    def __init__(self, stop_told: Callable[[], bool]):
        """Sends C's standard error to a file; `stop_told` asks the other processes."""
        self._stop_told, self._spread = stop_told, False
        self._ended = threading.Event()
        self._speaking, self._status = threading.Lock(), 0
        with tempfile.NamedTemporaryFile() as log:  # it stays open after its name goes
            self._told = open(log.name, errors="replace")  # noqa: SIM115
            _redirect(log.name)

    def start(self) -> None:
        """Begins to watch, in threads: to ask others may take long if one is gone."""
        for work in (self._read, self._listen):
            threading.Thread(target=work, daemon=True).start()
        threading.excepthook = self._on_error

    def stop(self) -> None:
        """Ends the watch."""
        self._ended.set()

    def settle(self, status: int) -> None:
        """Lets the process end with `status` and no word of others from here on.

        JAX may still abort it, while it waits for a service that is gone.
        """
        with self._speaking:
            self._status = self._status or status

    def _read(self) -> None:
        """Tells what C's standard error gets; end the process where JAX aborts it."""
        while not self._ended.wait(PAUSE):
            text = self._told.read()
            if FATAL in text:
                self.end(text)
            for line in text.splitlines():
                if not (self._status or NOISE.search(line)):
                    print(line, file=sys.stderr)

    def _listen(self) -> None:
        """Gives this process SPREAD, once, where another was asked to stop."""
        while not (self._ended.wait(PAUSE) or self._status):
            if self._stop_told():
                self._spread = True
                if callable(signal.getsignal(SPREAD)):  # else it would end us unsaved
                    signal.pthread_kill(threading.main_thread().ident or 0, SPREAD)
                return

    def _on_error(self, failed: threading.ExceptHookArgs) -> None:
        """Ends the process if a thread failed as another process is gone."""
        if failed.exc_value is not None and is_loss(failed.exc_value):
            self.end()
        threading.__excepthook__(failed)

    def end(self, text: str = "") -> NoReturn:
        """Ends the process with its last words, whatever its other threads wait for."""
        os._exit(self.last_words(text))

    def last_words(self, text: str = "") -> int:
        """Tells why this process ends, unless it is told, and return its status."""
        with self._speaking:
            self._status = self._status or self._tell(text)
        return self._status

    def _tell(self, text: str) -> int:
        if self._spread:
            print("\nstopped: the same command goes on", file=sys.stderr, flush=True)
            return STOPPED
        named = re.search(r"heartbeats\):\s*((?:[\w/:]*\d+[\s,]*)+)", text)
        gone = named[1].split()[-1].split(":")[-1] if named else ""
        who = f"process {gone}" if gone.isdigit() else "another process"
        print(
            f"\nerror: {who} is gone, so this one ends as well: see what that one "
            "printed; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return GONE


def is_loss(error: BaseException) -> bool:
    """Returns whether something failed as another process is gone."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, JaxRuntimeError) and LOST.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


def _redirect(log: str) -> None:
    """Sends C's standard error to a file, and let an abort wait; with glibc alone.

    Python's own, and that of processes that this one starts, stay as they are. The
    handler of the abort is C's `sleep` itself: it is called with the signal's number,
    which is 6, and needs nothing that a process in such a state may lack.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    c = ctypes.CDLL(None)
    c.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(c.fopen(os.fsencode(log), b"a"))
    c.setvbuf(stream, None, 2, 0)  # _IONBF
    ctypes.c_void_p.in_dll(c, "stderr").value = stream.value
    c.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    c.signal(signal.SIGABRT, ctypes.cast(c.sleep, ctypes.c_void_p))

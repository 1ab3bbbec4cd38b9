"""What a process says when another one is gone, before JAX makes it end as well.

JAX notices that a process is gone and aborts the others, from a thread of its own in
C++, with a page of log and status 134. Nothing of that can be configured. So C's
standard error goes to a file, in which a thread of Python reads why, and an abort waits
the seconds that this thread needs to tell it in one line and to end the process.
"""

import contextlib
import ctypes
import os
import platform
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

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
        """Send C's standard error to a file; `stop_told` asks the other processes."""
        self._stop_told, self._spread = stop_told, False
        self._ended = threading.Event()
        self._speaking, self._status = threading.Lock(), 0
        handle, name = tempfile.mkstemp(prefix="qpenet_xla_", suffix=".log")
        os.close(handle)
        self.log = Path(name)
        self._told = self.log.open(errors="replace")
        _redirect(self.log)

    def start(self) -> None:
        """Begin to watch, in a thread."""
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """End the watch and remove the file."""
        self._ended.set()
        self._told.close()
        self.log.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._ended.wait(PAUSE):
            with contextlib.suppress(ValueError):  # closed meanwhile
                text = self._told.read()
                if FATAL in text:
                    status = self.last_words(text)
                    self.log.unlink(missing_ok=True)
                    os._exit(status)
                for line in text.splitlines():
                    if not NOISE.search(line):
                        print(line, file=sys.stderr)
            if not self._spread and self._stop_told():
                self._spread = True
                if callable(signal.getsignal(SPREAD)):  # else it would end us unsaved
                    signal.pthread_kill(threading.main_thread().ident or 0, SPREAD)

    def last_words(self, text: str = "") -> int:
        """Tell why this process ends, unless it is told, and return its status."""
        with self._speaking:
            self._status = self._status or self._tell(text)
        return self._status

    def _tell(self, text: str) -> int:
        if self._spread or self._stop_told():
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


def _redirect(log: Path) -> None:
    """Send C's standard error to a file, and let an abort wait; with glibc alone.

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

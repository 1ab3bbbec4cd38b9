"""Several processes that train one network: they connect, exchange values, end.

JAX finds the cluster, connects its processes, and ends those whose peer is gone. All
processes call the functions here in the same order; a process alone passes through them
without touching JAX's devices.
"""

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from qpenet_jax.core.errors import InputError

HEARTBEAT = 30
"""Seconds without a message after which JAX regards a process as ended."""

PATIENCE = 300
"""Seconds within which all processes must start."""

GRACE = 3
"""Seconds that process 0 waits before it ends, so that the others can end first."""

NO_CLUSTER = ("coordinator_address should be defined", "before any JAX calls")
"""Parts of JAX's messages where no cluster is detected, or it is too late for one."""

T = TypeVar("T")

_index, _count = 0, 1


def index() -> int:
    """Returns which of the processes this is; 0 in a process alone."""
    return _index


def count() -> int:
    """Returns the number of processes."""
    return _count


def is_first() -> bool:
    """Returns whether this process writes files and prints, for all."""
    return _index == 0


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Becomes one of several processes, as given or as JAX detects a cluster.

    To be called before JAX's first computation. A process alone stays as it is.

    Raises:
        InputError: options that don't fit together, or the processes can't connect.
    """
    global _index, _count
    given = (coordinator, processes, process) != (None, None, None)
    if given:
        _check(coordinator, processes, process)
    # It would take SIGTERM away from training/interruptions.py.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with warnings.catch_warnings():  # in every pod without Kubernetes' package
            warnings.simplefilter("ignore")
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=PATIENCE,
                heartbeat_timeout_seconds=HEARTBEAT,
            )
    except Exception as error:  # of several types: no cluster, no network, no answer
        _refuse_or_stay_alone(error, given)
        return
    _index, _count = jax.process_index(), jax.process_count()
    if not is_first():  # process 0 prints for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as we live


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None or processes is None or process is None:
        raise InputError(
            "--coordinator, --processes and --process belong together: give all three, "
            "or none where a cluster starts the processes"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 2**16):
        raise InputError(
            f"--coordinator {coordinator}: give a host and a port of process 0, such "
            "as node1:9876"
        )
    if not 0 <= process < processes:
        raise InputError(
            f"--process {process} --processes {processes}: number the processes from 0 "
            f"to {processes - 1}"
        )


def _refuse_or_stay_alone(error: Exception, given: bool) -> None:
    """Refuses to work alone where others wait; warns if others may."""
    reason = " ".join(str(error).split())[:200]
    if given or isinstance(error, jax.errors.JaxRuntimeError):
        raise InputError(
            f"this process can't join the others ({reason}): start all of them within "
            f"{PATIENCE} s, with the same --coordinator, a host and a free port of "
            "process 0"
        ) from None
    if not any(text in reason for text in NO_CLUSTER):
        print(
            f"warning: this process works alone: {reason}; if it is one of several, "
            "give --coordinator, --processes and --process",
            file=sys.stderr,
        )


def gather(value: bytes) -> list[bytes]:
    """Returns the values of all processes, in their order, when all have given one."""
    if count() == 1:
        return [value]
    lengths = multihost_utils.process_allgather(np.int32(len(value))).tolist()
    # A power of two: every other length would be compiled anew.
    room = 1 << max(lengths).bit_length()
    padded = np.frombuffer(value.ljust(room, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]


def by_first(decide: Callable[[], T]) -> T:
    """Returns what process 0 finds by `decide`, in all processes.

    It must be a value of JSON. If `decide` raises InputError, all processes do.
    """
    if count() == 1:
        return decide()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome["found"] = decide()
        except InputError as error:
            outcome["refused"] = str(error)
    outcome = json.loads(gather(json.dumps(outcome).encode())[0])
    if "refused" in outcome:
        raise InputError(outcome["refused"])
    return outcome["found"]


def any_of(flag: bool) -> bool:
    """Returns whether the flag is set in any of the processes."""
    return b"1" in gather(b"1" if flag else b"0")


def warn(text: str) -> None:
    """Prints a warning, if there is one, to the standard error of the first process."""
    if text and is_first():
        print(f"warning: {text}", file=sys.stderr)


def leave(status: Any = 0) -> None:
    """Leaves the other processes: when all have done so if all went well, else at once.

    With another status than 0 it ends this process, without waiting for the others,
    which may wait for it in a computation; JAX ends them. In a process alone it does
    nothing.
    """
    if count() == 1:
        return
    if status == 0:
        jax.distributed.shutdown()
        return
    if sys.exc_info()[0] not in (None, SystemExit):
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if is_first():
        time.sleep(GRACE)
    os._exit(status if isinstance(status, int) else 1)

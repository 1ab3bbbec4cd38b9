"""Several processes that work as one: they join, agree, and end together.

JAX finds the cluster, connects its processes and notices one that is gone; what they
tell each other here goes through the service that JAX keeps for that. A process alone
passes through all of this without touching JAX's devices.
"""

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src import clusters, distributed  # what JAX's own libraries use of it

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.last_words import Watch, is_loss

HEARTBEAT = 30
"""Seconds without a sign of life after which JAX takes a process for gone."""

PATIENCE = 300
"""Seconds in which all processes have to have started."""

POLL = 500
"""Milliseconds between two looks at whether another process has answered."""

GRACE = 5
"""Seconds that process 0 leaves the others for ending as it does."""

T = TypeVar("T")


def index() -> int:
    """Returns which of the processes this is; 0 in a process alone."""
    return distributed.global_state.process_id


def count() -> int:
    """Returns the number of processes that work as one."""
    return distributed.global_state.num_processes


def is_first() -> bool:
    """Returns whether this process writes files and prints, for all."""
    return index() == 0


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
    given = (coordinator, processes, process)
    if given == (None, None, None):
        coordinator, processes, process = _detected()
    else:
        coordinator, processes, process = _checked(*given)
    if processes in (None, 1):
        return
    # It would take SIGTERM away from runs.stopping, which spreads it by `tell_stop`.
    jax.config.update("jax_enable_preemption_service", False)
    global _watch
    _watch = Watch(_stop_told)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"process {process} of {processes} can't join the others at {coordinator} "
            f"({reason}): start all of them within {PATIENCE} s, with the same "
            "--coordinator, a host and a free port of process 0"
        ) from None
    _watch.start()
    if not is_first():  # process 0 tells what there is to tell
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as we live


_watch: Watch | None = None
_rounds: Counter[str] = Counter()


def _checked(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str, int, int]:
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
    return coordinator, processes, process


def _detected() -> tuple[str | None, int | None, int | None]:
    """Returns what JAX detects of a cluster: address, processes, process."""
    find = clusters.ClusterEnv.auto_detect_unset_distributed_params
    try:
        with warnings.catch_warnings():  # in every pod without Kubernetes' package
            warnings.simplefilter("ignore")
            return find(None, None, None, None, None, PATIENCE)[:3]
    except Exception as error:  # of several types: a pod that is no job, no network
        reason = " ".join(str(error).split())[:200]
        print(
            f"warning: this process works alone: {reason}; if it is one of several, "
            "give --coordinator, --processes and --process",
            file=sys.stderr,
        )
        return None, None, None


def gather(value: bytes, topic: str) -> list[bytes]:
    """Returns the values of all processes, in their order, once all have given theirs.

    All call it equally often for a `topic`, whatever else they do. Signals are acted on
    while it waits.
    """
    if count() == 1:
        return [value]
    client = _client()
    _rounds[topic] += 1
    mine = f"qpenet/{topic}/{_rounds[topic]}"
    client.key_value_set_bytes(f"{mine}/{index()}", value)
    values = [_awaited(f"{mine}/{process}") for process in range(count())]
    # That all are in this round says that all have read the one before.
    client.key_value_delete(f"qpenet/{topic}/{_rounds[topic] - 1}/{index()}")
    return values


def _awaited(key: str) -> bytes:
    while True:
        try:
            return _client().blocking_key_value_get_bytes(key, POLL)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise


def _client() -> Any:
    return distributed.global_state.client


def by_first(decide: Callable[[], T], topic: str) -> T:
    """Returns what process 0 finds by `decide`, in all processes.

    It has to be what JSON can tell. Raises InputError in all if it does there.
    """
    if count() == 1:
        return decide()
    told: dict[str, Any] = {}
    if is_first():
        try:
            told["found"] = decide()
        except InputError as error:
            told["refused"] = str(error)
    told = json.loads(gather(json.dumps(told).encode(), topic)[0])
    if "refused" in told:
        raise InputError(told["refused"])
    return told["found"]


def any_of(flag: bool, topic: str) -> bool:
    """Returns whether the flag is set in any of the processes."""
    return b"1" in gather(b"1" if flag else b"0", topic)


def warn(text: str) -> None:
    """Prints a warning, if there is one, to the standard error of the first process."""
    if text and is_first():
        print(f"warning: {text}", file=sys.stderr)


STOP = "qpenet-stop"
"""Where a process that was asked to stop tells it to the others."""


def tell_stop() -> None:
    """Asks all other processes to stop, as this one was asked."""
    if count() > 1:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"{STOP}/{index()}", "", allow_overwrite=True)


def _stop_told() -> bool:
    """Returns whether any process was asked to stop, as far as can be known."""
    try:
        return bool(_client().key_value_dir_get(STOP))
    except jax.errors.JaxRuntimeError:
        return False


def _let_others_end() -> None:
    """Gives the others time to end as this one does: JAX aborts them without it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"qpenet-left/{index()}", "")
        deadline = time.monotonic() + GRACE
        while is_first() and time.monotonic() < deadline:
            if len(_client().key_value_dir_get("qpenet-left")) == count():
                break
            time.sleep(0.1)


@contextlib.contextmanager
def losses_told() -> Iterator[None]:
    """Turns what a computation fails with that a lost process took part in to a line.

    It raises SystemExit then.
    """
    try:
        yield
    except Exception as error:
        if _watch is None or not is_loss(error):
            raise
        sys.exit(_watch.last_words())


def leave(status: Any = 0) -> None:
    """Ends this process' part: with the others if all went well, else at once.

    With another status than 0 it ends the process; the others, who may wait for it in a
    computation, end when JAX notices. In a process alone it does nothing.
    """
    if _watch is None:
        return
    if status == 0:
        try:
            gather(b"", "end")
        except jax.errors.JaxRuntimeError:
            status = _watch.last_words()
    if status == 0:
        _watch.stop()
        jax.distributed.shutdown()
        return
    if sys.exc_info()[0] not in (None, SystemExit):
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    status = status if isinstance(status, int) else 1
    _watch.settle(status)
    _let_others_end()
    os._exit(status)

"""What the device can; loops over batches that several devices share.

Each of them goes through its part, as many rows at once as fit.
"""

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import PartitionSpec

BATCH_AXIS = "data"
"""Name of the mesh's axis over which batches are split."""


def on_each_device(f: Callable[..., Any], *batches: Any, shared: Any = ()) -> Any:
    """Returns `f(shared, *batches)`, every device taking its part of the batches.

    For functions that treat the images of a batch one by one in a loop: XLA would
    gather all of a batch that is split over devices before it takes one image out.
    Without a mesh of several devices (`jax.set_mesh`) it is the plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(BATCH_AXIS, 1) == 1:
        return f(shared, *batches)
    split, whole = PartitionSpec(BATCH_AXIS), PartitionSpec()
    specs = (whole, *(split for _ in batches))
    mapped = jax.shard_map(f, in_specs=specs, out_specs=split, check_vma=False)
    return mapped(shared, *batches)


def row_by_row(f: Callable[..., Any], *batches: Any, at_once: int = 1) -> Any:
    """Returns `f(*rows)` of every row of the batches, so many of them at once.

    Every device goes through its own part, as `on_each_device` says.
    """

    def our_part(_, *ours):
        size = None if at_once == 1 else at_once
        return jax.lax.map(lambda row: f(*row), ours, batch_size=size)

    return on_each_device(our_part, *batches)


_ONLY_DEFAULTS = contextvars.ContextVar("only_defaults", default=False)


def by_platform(*operands: Any, cpu: Callable[..., Any], default: Callable[..., Any]):
    """Returns what either function does: on a CPU `cpu`, elsewhere `default`."""
    if only_defaults():
        return default(*operands)
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=default)


def only_defaults() -> bool:
    """Returns whether the default is traced alone; see `default_formulations`."""
    return _ONLY_DEFAULTS.get()


@contextlib.contextmanager
def default_formulations() -> Iterator[None]:
    """Traces the default of `by_platform` alone, for formats that know no platforms.

    What was jitted before isn't traced again.
    """
    before = _ONLY_DEFAULTS.set(True)
    try:
        yield
    finally:
        _ONLY_DEFAULTS.reset(before)


AT_ONCE = 2**26
"""Numbers that an array of a loop's round may hold off the CPU: 256 MiB of float32, of
which a round has several."""


def rows_at_once(count: int, row_size: int) -> int:
    """Returns how many of `count` rows make a round, so that the rounds are even.

    An array with `row_size` numbers a row then holds AT_ONCE at most, or one row.
    """
    rounds = min(-(-count * row_size // AT_ONCE), count)
    return -(-count // rounds)


def from_ampere_on() -> bool:
    """Whether the device is NVIDIA's of capability 8.0 or later.

    Those have TF32, and cuDNN's flash attention for 16 bits.
    """
    device = jax.devices()[0]
    version = re.fullmatch(r"(\d+)\.\d", getattr(device, "compute_capability", ""))
    return device.platform == "gpu" and version is not None and int(version[1]) >= 8

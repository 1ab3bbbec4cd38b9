"""What a device can compute, and loops over batches that several devices share.

Each device goes through its part of a batch, as many rows at once as fit.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

BATCH_AXIS = "data"
"""Name of the mesh's axis over which batches are split."""


def on_each_device(
    f: Callable[..., Any], *batches: Any, shared: tuple[Any, ...] = ()
) -> Any:
    """Returns `f(*shared, *batches)`, every device taking its part of the batches.

    It serves functions that loop over the images of a batch: XLA would gather a batch
    that is split over devices before it takes one image out. Without a mesh of several
    devices (`jax.set_mesh`) it is an ordinary call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(BATCH_AXIS, 1) == 1:
        return f(*shared, *batches)
    split, whole = PartitionSpec(BATCH_AXIS), PartitionSpec()
    specs = (*(whole for _ in shared), *(split for _ in batches))
    mapped = jax.shard_map(f, in_specs=specs, out_specs=split, check_vma=False)
    return mapped(*shared, *batches)


def row_by_row(
    f: Callable[..., Any], *batches: Any, at_once: int, cpu: Callable[..., Any]
) -> Any:
    """Returns `f(*rows)` for every row of the batches, `at_once` of them at once.

    A CPU computes `cpu(*rows)`, one row after the other. Every device goes through its
    own part, as in `on_each_device`.
    """

    def rounds(f, size):
        def one_device(*parts):
            return jax.lax.map(lambda row: f(*row), parts, batch_size=size)

        return functools.partial(on_each_device, one_device)

    size = None if at_once == 1 else at_once
    return by_platform(*batches, cpu=rounds(cpu, None), default=rounds(f, size))


only_defaults: Any = jax.make_user_context(False)
"""Whether `by_platform` traces its default alone, for formats that know no platforms:
`only_defaults.value`, which is true within `with only_defaults(True)`."""


def by_platform(*operands: Any, cpu: Callable[..., Any], default: Callable[..., Any]):
    """Returns the result of `cpu` on a CPU and of `default` on other devices."""
    if only_defaults.value:
        return default(*operands)
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=default)


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
    """Returns whether the device is an NVIDIA GPU of capability 8.0 or later.

    Those have TF32, and cuDNN's flash attention for 16 bits.
    """
    device = jax.devices()[0]
    version = re.fullmatch(r"(\d+)\.\d", getattr(device, "compute_capability", ""))
    return device.platform == "gpu" and version is not None and int(version[1]) >= 8

"""How a batch is shared by the devices: data parallel, everything else replicated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.models.ops.devices import BATCH_AXIS


def shardings(
    batch_size: int, accumulate: int = 1
) -> tuple[NamedSharding, NamedSharding]:
    """Returns (replicated, split over the batch) for all processes' devices.

    Of every process the batch is split over the largest number of devices that divides
    what it has of each of the `accumulate` parts that a step goes through.

    Raises:
        InputError: the processes can't have equal shares of every part.
    """
    theirs = _by_process()
    part, rest = divmod(batch_size, len(theirs) * accumulate)
    if rest:
        times = f" {accumulate} times" if accumulate > 1 else ""
        raise InputError(
            f"config.batch_size={batch_size} can't be shared{times} by {len(theirs)} "
            f"processes: choose a multiple of {len(theirs) * accumulate}, or start "
            "fewer processes"
        )
    most = min(len(devices) for devices in theirs)
    used = next(n for n in range(most, 0, -1) if part % n == 0)
    devices = [device for own in theirs for device in own[:used]]
    mesh = Mesh(np.array(devices), (BATCH_AXIS,))
    return (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec(BATCH_AXIS)),
    )


def _by_process() -> list[list[Any]]:
    """Returns the devices of every process, in the processes' order."""
    devices = jax.devices()
    processes = sorted({device.process_index for device in devices})
    return [[d for d in devices if d.process_index == p] for p in processes]


def idle_devices(batch_size: int, accumulate: int = 1) -> str:
    """Returns a line about devices that have no part of the batch; empty if all do."""
    total, used = jax.device_count(), shardings(batch_size, accumulate)[1].mesh.size
    if used == total:
        return ""
    return (
        f"config.batch_size={batch_size} is shared by {used} of {total} devices, the "
        f"others idle: all work where it is a multiple of {total * accumulate}"
    )


def global_batch(batch: Episode, sharding: NamedSharding) -> Any:
    """Places this process's part of a batch on its devices."""
    place = jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: place(sharding, np.asarray(x)), batch)


def one_copy(tree: Any) -> Any:
    """Returns a tree of arrays that every device has, on this process' first alone."""

    def first(leaf):
        shared = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return leaf.addressable_data(0) if shared else leaf

    return jax.tree.map(first, tree)


def any_asked(flag: bool, split: NamedSharding) -> jax.Array:
    """Returns whether the flag is set in any process, as devices will find it out.

    Steps are taken in the same order everywhere, so all processes see the same.
    """
    place = jax.make_array_from_process_local_data
    return _any(place(split, np.full(len(split.addressable_devices), flag)))


_any = jax.jit(jnp.any)

"""How a batch is shared by the devices: data parallel, everything else replicated."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qpenet_jax.core.types import Episode
from qpenet_jax.models.ops.devices import BATCH_AXIS


def shardings(batch_size: int) -> tuple[NamedSharding, NamedSharding]:
    """Return (replicated, split over the batch) for all devices.

    The batch is split over the largest number of devices that divides it.
    """
    devices = jax.devices()
    count = next(n for n in range(len(devices), 0, -1) if batch_size % n == 0)
    mesh = Mesh(np.array(devices[:count]), (BATCH_AXIS,))
    return (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec(BATCH_AXIS)),
    )


def global_batch(batch: Episode, sharding: NamedSharding) -> Any:
    """Place this process's part of a batch on its devices."""
    place = jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: place(sharding, np.asarray(x)), batch)

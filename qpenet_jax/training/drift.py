"""The authors' training as it was: batch norm of the frozen backbone drifts.

Their validation in the middle of an epoch put the backbone back into training mode,
to the end of that epoch (docs/released.md). Off unless `config.backbone.drift`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PyTree, UInt8

from qpenet_jax.backbones.registry import Backbone, normalize
from qpenet_jax.core.types import BATCH_STATISTICS, Array, Episode


def drifts(step: Int[Array, ""], epoch: int) -> Bool[Array, ""]:
    """Returns whether batch norm is in training mode in a step; the first is 0.

    So it is in the second half of every epoch of `epoch` steps but the first epoch,
    which had no validation in its middle.
    """
    return (step >= epoch) & (step % epoch >= epoch // 2)


def drifting_features(
    backbone: Backbone,
    weights: PyTree[Array],
    statistics: PyTree[Array],
    batch: Episode,
) -> tuple[tuple[Float[Array, "b 1 h w f"], Float[Array, "b h w f"]], PyTree[Array]]:
    """Returns support and query features by the batch's statistics, and the new ones.

    As upstream, all queries of the batch go through before all supports, one each.
    """
    query, statistics = _moved(backbone, weights, statistics, batch.query_image)
    images = batch.support_images[:, 0]
    support, statistics = _moved(backbone, weights, statistics, images)
    return (support[:, None], query), statistics


def _moved(backbone, weights, statistics, images: UInt8[Array, "b height width 3"]):
    x = normalize(images, backbone.mean, backbone.std)
    module: Any = backbone.module
    variables = {"params": weights, BATCH_STATISTICS: statistics}
    stages, changed = module.apply(variables, x, mutable=[BATCH_STATISTICS])
    maps = jnp.concatenate([stages[name] for name in backbone.stages], axis=-1)
    return jax.lax.stop_gradient(maps), changed[BATCH_STATISTICS]

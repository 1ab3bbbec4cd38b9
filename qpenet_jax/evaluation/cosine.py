"""The training-free baseline: nearest of two prototypes by cosine."""

import jax.numpy as jnp
from jaxtyping import Float, Integer

from qpenet_jax.core.types import Array
from qpenet_jax.models.ops import resize_align_corners
from qpenet_jax.models.prototypes import (
    activation_map,
    foreground_on_grid,
    masked_average_pool,
)


def nearest_prototype(
    support_features: Float[Array, "b k h w f"],
    support_masks: Integer[Array, "b k H W"],
    query_features: Float[Array, "b h w f"],
) -> tuple[Float[Array, "b H W 2"], dict[str, Array]]:
    """Calls a query pixel foreground if it is closer to the supports' foreground mean.

    Logits are the cosines to the mean of the background (0) and of the foreground (1),
    each averaged over the K supports; pixels labelled 255 belong to neither. It has no
    parameters: what QPENet learns is what it gains over this.
    """
    height, width = support_masks.shape[-2:]
    cosines = [
        activation_map(query_features, prototype)
        for prototype in prototypes(support_features, support_masks)
    ]
    logits = jnp.stack(cosines, axis=-1)
    return resize_align_corners(logits, (height, width)), {"cosines": logits}


def prototypes(
    support_features: Float[Array, "b k h w f"],
    support_masks: Integer[Array, "b k H W"],
) -> tuple[Float[Array, "b f"], Float[Array, "b f"]]:
    """Returns the supports' mean of the background and of the foreground."""
    grid = support_features.shape[2], support_features.shape[3]
    foreground = foreground_on_grid(support_masks, grid)
    background = foreground_on_grid(1 - support_masks.astype(jnp.int32), grid)
    of_background, of_foreground = (
        masked_average_pool(support_features, m).mean(1)
        for m in (background, foreground)
    )
    return of_background, of_foreground

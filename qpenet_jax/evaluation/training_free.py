"""Segmentation without training, by cosines to prototypes of the same features.

`nearest_prototype` takes the supports' prototypes as they are. `self_supported` mixes
them with the query's own: what a query shows resembles itself more than any support
does, so the pixels that are surely like the supports' object, and those that surely
aren't, make prototypes again. Source: Fan et al., Self-Support Few-Shot Semantic
Segmentation, ECCV 2022, without its background of each pixel, which finds less here
(docs/starter.md).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from qpenet_jax.core.types import Array
from qpenet_jax.models.ops import resize_align_corners
from qpenet_jax.models.prototypes import (
    NORM_EPSILON,
    activation_map,
    foreground_on_grid,
    masked_average_pool,
)

SHARPNESS = 10.0
"""What differences of cosines are multiplied by, before they are taken for logits."""

SURE = {"background": 0.6, "foreground": 0.7}
"""Probability from which on a pixel of the query is taken for a prototype."""

FEWEST = 12
"""Pixels that are taken at least: the surest, where fewer are sure enough."""


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


def self_supported(
    support_features: Float[Array, "b k h w f"],
    support_masks: Integer[Array, "b k H W"],
    query_features: Float[Array, "b h w f"],
    query_photo: Bool[Array, "b h w"],
) -> tuple[Float[Array, "b H W 2"], dict[str, Array]]:
    """Calls a query pixel foreground if it is closer to the foreground's prototype.

    Prototypes are halfway between the supports' means and those of the query, all of
    length 1; `query_photo` is false beside the photo. Logits are cosines, to the
    background (0) and to the foreground (1). `out` holds them on the grid, and which
    pixels of the query were taken. It has no parameters.
    """
    of_supports = prototypes(support_features, support_masks)
    background, foreground = (activation_map(query_features, p) for p in of_supports)
    likely = jax.nn.sigmoid(SHARPNESS * (foreground - background))
    out, cosines = {}, []
    for (ground, least), of_support, probability in zip(
        SURE.items(), of_supports, (1 - likely, likely), strict=True
    ):
        sure = _sure(probability, query_photo, least)
        own = masked_average_pool(query_features, sure)
        mixed = _unit(of_support) + _unit(own)  # a cosine doesn't see the length
        cosines.append(activation_map(query_features, mixed))
        out[f"sure_{ground}"] = sure
    out["cosines"] = jnp.stack(cosines, axis=-1)
    height, width = support_masks.shape[-2:]
    return resize_align_corners(out["cosines"], (height, width)), out


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), NORM_EPSILON)


def _sure(probability, photo, least):
    """Returns the pixels of a photo that are likely enough, or the FEWEST likeliest."""
    inside = jnp.where(photo, probability, -1.0)
    flat = inside.reshape(inside.shape[0], -1)
    likeliest, _ = jax.lax.top_k(flat, min(FEWEST, flat.shape[1]))
    return photo & (inside >= jnp.minimum(likeliest[:, -1], least)[:, None, None])

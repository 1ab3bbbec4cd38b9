"""Prototypes, activation maps and region masks: pure functions, no parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from qpenet_jax.core.types import FEATURE_STRIDE, Array

MAP_EPSILON = 5e-4
"""Added to the area under a mask, so that an empty region gives the zero prototype."""

NORM_EPSILON = 1e-8
"""Smallest vector norm of the cosine (the default of PyTorch's cosine similarity)."""


def masked_average_pool(
    features: Float[Array, "*b h w c"], mask: Bool[Array, "*b h w"]
) -> Float[Array, "*b c"]:
    """Averages the features under a mask (MAP in eqs 1, 3, 7 and 8).

    An empty mask gives the zero vector.
    """
    weights = mask.astype(features.dtype)
    total = jnp.einsum("...hwc,...hw->...c", features, weights)
    return total / (weights.sum((-2, -1))[..., None] + MAP_EPSILON)


def activation_map(
    features: Float[Array, "b h w c"], prototype: Float[Array, "b c"]
) -> Float[Array, "b h w"]:
    """Returns the cosine of every feature to the prototype (eqs 13 and 14).

    A zero vector on either side gives 0, with finite gradients.
    """
    dot = jnp.einsum("bhwc,bc->bhw", features, prototype)
    return dot / (_norm(features) * _norm(prototype)[:, None, None])


def _norm(x):
    """Returns the length of the last axis, at least NORM_EPSILON.

    The root is taken of the bounded square: the gradient of the root at 0 is infinite.
    """
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1), NORM_EPSILON**2))


def foreground_margin(logits: Float[Array, "*b 2"]) -> Float[Array, "*b"]:
    """Returns the logit of class 1 minus that of class 0; positive: class 1 wins."""
    return logits[..., 1] - logits[..., 0]


def predicted(logits: Float[Array, "*b h w 2"]) -> Bool[Array, "*b h w"]:
    """Returns where class 1 wins: the hard mask of eqs 3, 5, 6 and 11, no gradient."""
    return jax.lax.stop_gradient(logits[..., 1] > logits[..., 0])


def foreground_on_grid(
    mask: Integer[Array, "*b H W"], grid: tuple[int, int]
) -> Bool[Array, "*b h w"]:
    """Brings a {0, 1, 255} mask to the feature grid: true where foreground.

    Feature cell (i, j) is centred on pixel (8 i, 8 j), so resizing with align_corners
    picks exactly these pixels. 255 counts as background. Raises ValueError unless the
    sides are 8 n + 1 and the grid n + 1.
    """
    height, width = mask.shape[-2:]
    sides = tuple(FEATURE_STRIDE * (cells - 1) + 1 for cells in grid)
    if (height, width) != sides:
        raise ValueError(f"sides {height} x {width} do not fit the grid {grid}")
    return mask[..., ::FEATURE_STRIDE, ::FEATURE_STRIDE] == 1

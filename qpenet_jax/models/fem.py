"""FEM: the decoder of PFENet (Tian et al., TPAMI 2020), of rows 1 to 3 of Table III."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from qpenet_jax.core.types import Array
from qpenet_jax.models.layers import ConvReLU, Head, MergePrototype, Residual
from qpenet_jax.models.ops import along_sides, resize_align_corners
from qpenet_jax.models.ops.devices import row_by_row, rows_at_once

LEVELS = 4
"""Grids of the pyramid, each half as fine as the one before: 60, 30, 15 and 8."""


class FEM(nn.Module):
    """Merges query and prototypes on four grids; the finer ones feed the coarser."""

    make_head: Callable[..., Head]

    @nn.compact
    def __call__(
        self,
        F_q: Float[Array, "b h w c"],
        P_bg: Float[Array, "b c"],
        P_fg: Float[Array, "b p"],
        maps: Float[Array, "b h w m"],
        *,
        train: bool,
    ) -> dict[str, Array | tuple[Array, ...]]:
        """Returns the logits `y_final` [b, h, w, 2] and `y_inner`, one a grid.

        The QPENet paper doesn't say how P_bg enters. Here as in NERTNet (Liu et al.,
        CVPR 2022), whose global prototype it is: filtered out on every grid, as in eq
        12, before the foreground is merged. The maps are resized as PFENet's prior is.
        """
        _, h, w, c = F_q.shape
        levels, inner = [], []
        for i in range(LEVELS):
            grid = (-(-h // 2**i), -(-w // 2**i))  # rounded up
            pooled = along_sides(pooling_matrix, F_q, grid)
            filtered = MergePrototype(c, name=f"filter{i}")(pooled, P_bg)
            cues = jnp.concatenate([filtered, resize_align_corners(maps, grid)], -1)
            x = MergePrototype(c, name=f"merge{i}")(cues, P_fg)
            if levels:
                finer = resize_align_corners(levels[-1], grid)
                both = jnp.concatenate([x, finer], axis=-1)
                x = x + ConvReLU(c, name=f"finer{i}")(both)
            x = Residual(name=f"residual{i}")(x)
            inner.append(self.make_head(name=f"inner_head{i}")(x, train=train))
            levels.append(resize_align_corners(x, (h, w)))
        x = ConvReLU(c, name="reduce")(jnp.concatenate(levels, axis=-1))
        x = Residual(name="reduce_residual")(x)
        y_final = self.make_head(name="head")(x, train=train)
        return {"y_final": y_final, "y_inner": tuple(inner)}


def pooling_matrix(source: int, target: int) -> np.ndarray:
    """Returns the `[target, source]` matrix of adaptive average pooling.

    Row r is the mean over floor(r s / t) .. ceil((r + 1) s / t) - 1: where t doesn't
    divide s the windows overlap and differ in length (PyTorch's convention).
    """
    r, i = np.arange(target)[:, None], np.arange(source)
    window = (i >= r * source // target) & (i < -(-(r + 1) * source // target))
    return (window / window.sum(axis=1, keepdims=True)).astype(np.float32)


PRIOR_EPSILON = 1e-7
"""Added to both denominators of the prior mask, as PFENet does."""


def prior_mask(
    support_features: Float[Array, "b k y x f"],
    M_s: Bool[Array, "b k y x"],
    query_features: Float[Array, "b h w f"],
) -> Float[Array, "b h w"]:
    """Returns PFENet's prior: each query cell's best cosine to a support foreground.

    It is stretched to 0..1 for each support, then averaged over the K supports; without
    foreground it is 0. PFENet and the released network give it layer4, QPENet with
    `prior` the features that it has.
    """
    b, k = support_features.shape[:2]
    each = (
        support_features.reshape(b * k, -1, support_features.shape[-1]),
        M_s.reshape(b * k, -1),
        jnp.repeat(query_features.reshape(b, -1, query_features.shape[-1]), k, axis=0),
    )
    at_once = rows_at_once(b * k, each[0].shape[1] * each[2].shape[1])
    best = row_by_row(_best_cosine, *each, at_once=at_once, cpu=_best_cosine_in_blocks)
    low, high = (f(best, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
    stretched = (best - low) / (high - low + PRIOR_EPSILON)
    return stretched.reshape(b, k, *query_features.shape[1:3]).mean(axis=1)


PRIOR_BLOCK = 450
"""Support cells that a CPU compares at once; those without foreground never are."""


def _best_cosine(
    support: Float[Array, "n f"], mask: Bool[Array, " n"], query: Float[Array, "m f"]
) -> Float[Array, " m"]:
    """Returns each query cell's best cosine to a support cell, 0 to those cut out."""
    cosines = _cosines(support, query)
    return jnp.where(mask[:, None], cosines, 0).max(0)


def _cosines(
    rows: Float[Array, "n f"], query: Float[Array, "m f"]
) -> Float[Array, "n m"]:
    lengths, query_lengths = (jnp.linalg.norm(x, axis=1) for x in (rows, query))
    return rows @ query.T / (lengths[:, None] * query_lengths[None] + PRIOR_EPSILON)


def _best_cosine_in_blocks(
    support: Float[Array, "n f"], mask: Bool[Array, " n"], query: Float[Array, "m f"]
) -> Float[Array, " m"]:
    """Returns what `_best_cosine` does, from the cells with foreground alone."""
    block = min(PRIOR_BLOCK, len(mask))
    order = jnp.argsort(~mask, stable=True)
    order = jnp.concatenate([order, order[: -len(mask) % block]])  # whole blocks
    count = mask.sum()

    def compare(i, best):
        places = jax.lax.dynamic_slice_in_dim(order, i * block, block)
        cosines = _cosines(support[places], query)
        real = i * block + jnp.arange(block) < count
        return jnp.maximum(best, jnp.where(real[:, None], cosines, -jnp.inf).max(0))

    nothing = jnp.where(mask.all(), -jnp.inf, 0.0)
    start = jnp.full(len(query), nothing, query.dtype)
    return jax.lax.fori_loop(0, -(-count // block), compare, start)

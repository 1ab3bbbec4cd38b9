"""Training losses (paper III.F, eqs 17-19)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import softplus
from jaxtyping import Bool, Float, Integer

from qpenet_jax.core.types import IGNORE, Array
from qpenet_jax.models.ops import resize_align_corners
from qpenet_jax.models.prototypes import foreground_margin

Weight = float | Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the terms; the paper names alpha and beta and gives no values.

    The defaults write eqs 17 to 19 as they stand. `recipes.RECIPES` holds others.
    """

    alpha: Weight = 1.0
    beta: Weight = 1.0
    pre: Weight = 1.0
    rev: Weight = 1.0
    final: Weight = 1.0
    aux: Weight = 0.6  # the released system's auxiliary head, not in the paper
    inner: Weight = 1.0  # predictions on FEM's grids, as in PFENet


def resized_margin(
    logits: Float[Array, "*b h w 2"], size: tuple[int, int]
) -> Float[Array, "*b H W"]:
    """Returns the foreground margin, resized with align_corners to the image's size.

    Two-class cross entropy depends on this difference only, and resizing is linear, so
    one channel is resized instead of two.
    """
    difference = foreground_margin(logits)
    folded = difference.reshape(-1, *difference.shape[-2:])[..., None]
    return resize_align_corners(folded, size).reshape(*difference.shape[:-2], *size)


def cross_entropy(
    logits: Float[Array, "*b h w 2"], mask: Integer[Array, "*b H W"]
) -> Float[Array, ""]:
    """Returns the mean two-class cross entropy over all pixels of the batch but 255's.

    L_bce of eq 17. No valid pixel at all gives 0.
    """
    m = resized_margin(logits, (mask.shape[-2], mask.shape[-1]))
    return _mean(softplus(jnp.where(mask == 1, -m, m)), mask != IGNORE)


def background_mining(
    logits: Float[Array, "*b h w 2"], mask: Integer[Array, "*b H W"]
) -> Float[Array, ""]:
    """Returns L_bm of eq 18 (Liu et al., NERTNet, CVPR 2022); class 1 is background.

    Per image, foreground pixels are pushed to "not background"; half as hard, all valid
    pixels are pulled to "background". The mean over images.
    """
    m = resized_margin(logits, (mask.shape[-2], mask.shape[-1]))
    area = (-2, -1)
    not_background = _mean(softplus(m), mask == 1, area)
    background = _mean(softplus(-m), mask != IGNORE, area)
    return jnp.mean(not_background + 0.5 * background)


def total_loss(
    out: Mapping[str, Any],
    query_mask: Integer[Array, "b H W"],
    support_masks: Integer[Array, "b k H W"],
    weights: LossWeights = LossWeights(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns L of eq 19 and its unweighted terms by name.

    Predictions that a variant of the network doesn't make have no term. Those of FEM's
    grids, y_inner, count as their mean.
    """
    truth = {
        "pre": query_mask,
        "rev": support_masks,
        "final": query_mask,
        "aux": query_mask,
        "inner": query_mask,
    }
    made = [name for name in truth if f"y_{name}" in out]
    each = {
        name: [cross_entropy(y, truth[name]) for y in jax.tree.leaves(out[f"y_{name}"])]
        for name in made
    }
    L_fg = {name: jnp.mean(jnp.stack(losses)) for name, losses in each.items()}
    L_bg = {
        "bg_s": background_mining(out["y_bg_s"], support_masks),
        "bg_q": background_mining(out["y_bg_q"], query_mask),
    }
    foreground = sum(getattr(weights, name) * L_fg[name] for name in made)  # eq 17
    background = L_bg["bg_s"] + L_bg["bg_q"]  # eq 18
    terms = {f"loss_{name}": value for name, value in (L_fg | L_bg).items()}
    return weights.alpha * foreground + weights.beta * background, terms


def _mean(
    values: Float[Array, "..."],
    where: Bool[Array, "..."],
    axis: tuple[int, ...] | None = None,
) -> Float[Array, "..."]:
    """Returns the mean of the chosen values, 0 where none is chosen."""
    count = where.sum(axis).astype(values.dtype)
    return jnp.where(where, values, 0.0).sum(axis) / jnp.maximum(count, 1)

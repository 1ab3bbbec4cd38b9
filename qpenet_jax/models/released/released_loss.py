"""The released system's training loss."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.nn import softplus
from jaxtyping import Float, Integer

from qpenet_jax.core.types import IGNORE, Array
from qpenet_jax.models.losses import LossWeights, cross_entropy, resized_margin


def released_loss(
    out: Mapping[str, Any],
    query_mask: Integer[Array, "b H W"],
    support_masks: Integer[Array, "b k H W"],
    weights: LossWeights,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the released loss and its unweighted terms, named as `total_loss` does.

    With one support it is eqs 17 to 19 by the given weights, and each prediction in the
    supports counts as one in the query does: with K of them the sums are divided by
    1 + K. In the supports' predictions 255 is background, as upstream has it.
    """
    b, k = support_masks.shape[:2]
    truth = jnp.broadcast_to(query_mask[:, None], (b, k, *query_mask.shape[1:]))
    marked = jnp.where(support_masks == IGNORE, 0, support_masks)
    terms = {
        "pre": cross_entropy(out["y_pre_each"], truth),
        "rev": cross_entropy(out["y_rev"], marked),
        "final": cross_entropy(out["y_final"], query_mask),
        "aux": cross_entropy(out["y_aux"], query_mask),
        "bg_s": background_mining(out["y_bg_s"], support_masks),
        "bg_q": background_mining(out["y_bg_q"], query_mask),
    }
    share = 2 / (1 + k)
    cycle = share * (weights.pre * terms["pre"] + k * weights.rev * terms["rev"])
    foreground = cycle + weights.final * terms["final"] + weights.aux * terms["aux"]
    background = share * (terms["bg_q"] + k * terms["bg_s"])
    total = weights.alpha * foreground + weights.beta * background
    return total, {f"loss_{name}": value for name, value in terms.items()}


AREA_EPSILON = 1e-5
"""Added to the number of foreground pixels, as upstream does."""


def background_mining(
    logits: Float[Array, "*b h w 2"], mask: Integer[Array, "*b H W"]
) -> Float[Array, ""]:
    """Returns L_bm as NERTNet's code and the release's have it; class 1 is background.

    Unlike `losses.background_mining` it pulls all pixels to "background", those of 255
    and of the foreground included.
    """
    m = resized_margin(logits, (mask.shape[-2], mask.shape[-1]))
    foreground = (mask == 1).astype(m.dtype)
    area = foreground.sum((-2, -1)) + AREA_EPSILON
    not_background = (softplus(m) * foreground).sum((-2, -1)) / area
    return not_background.mean() + 0.5 * softplus(-m).mean()

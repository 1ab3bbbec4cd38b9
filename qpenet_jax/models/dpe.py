"""DPE: Dual Prototype Evolution (paper III.C.2, eqs 4-8)."""

import functools

import jax.numpy as jnp
from jaxtyping import Bool, Float

from qpenet_jax.core.types import Array
from qpenet_jax.models.layers import Convs, each_support
from qpenet_jax.models.prototypes import masked_average_pool, predicted


def dual_prototypes(
    convs: Convs,
    guide: Float[Array, "b c"],
    F_s: Float[Array, "b k h w c"],
    M_s: Bool[Array, "b k h w"],
    *,
    train: bool,
) -> dict[str, Array]:
    """Segments the supports by a prototype and splits their foreground by the result.

    The guide is P_psd, the query's needs; Table V compares P_pre, the support's own.
    Returns the logits `y_rev` [b, k, h, w, 2] and, as means over the K supports,
    `P_main` (foreground that the guide found) and `P_aux` (the rest), [b, c].
    """
    segment = functools.partial(convs, train=train)
    guides = jnp.broadcast_to(guide[:, None], (*F_s.shape[:2], guide.shape[-1]))
    y_rev = each_support(segment, F_s, guides)  # eq 4
    found = predicted(y_rev)
    M_main = M_s & found  # eq 5
    M_aux = M_s & ~found  # eq 6
    P_main = masked_average_pool(F_s, M_main).mean(axis=1)  # eq 7
    P_aux = masked_average_pool(F_s, M_aux).mean(axis=1)  # eq 8
    return {"y_rev": y_rev, "P_main": P_main, "P_aux": P_aux}

"""PPG: Pseudo-prototype Generation (paper III.C.1, eqs 1-3)."""

from jaxtyping import Bool, Float

from qpenet_jax.core.types import Array
from qpenet_jax.models.layers import Convs
from qpenet_jax.models.prototypes import masked_average_pool, predicted


def preliminary_prototype(
    F_s: Float[Array, "b k h w c"], M_s: Bool[Array, "b k h w"]
) -> Float[Array, "b c"]:
    """Returns `P_pre` of eq 1; K supports count as the mean of their K prototypes."""
    return masked_average_pool(F_s, M_s).mean(axis=1)


def pseudo_prototype(
    convs: Convs,
    P_pre: Float[Array, "b c"],
    F_q: Float[Array, "b h w c"],
    *,
    train: bool,
) -> dict[str, Array]:
    """Segments the query by the support's prototype and pools what was found.

    Returns the logits `y_pre` [b, h, w, 2] and `P_psd` [b, c]. `convs` is shared with
    DPE.
    """
    y_pre = convs(F_q, P_pre, train=train)  # eq 2
    P_psd = masked_average_pool(F_q, predicted(y_pre))  # eq 3
    return {"y_pre": y_pre, "P_psd": P_psd}

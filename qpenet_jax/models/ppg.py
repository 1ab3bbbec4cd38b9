"""PPG: Pseudo-prototype Generation (paper III.C.1, eqs 1-3)."""

from jaxtyping import Array, Bool, Float

from qpenet_jax.models.layers import Convs
from qpenet_jax.models.prototypes import masked_average_pool, predicted


def pseudo_prototype(
    convs: Convs,
    F_q: Float[Array, "b h w c"],
    F_s: Float[Array, "b k h w c"],
    M_s: Bool[Array, "b k h w"],
    *,
    train: bool,
) -> dict[str, Array]:
    """Segment the query by the support's prototype and pool what was found.

    Returns `P_pre` and `P_psd` [b, c] and the logits `y_pre` [b, h, w, 2]. `convs` is
    shared with DPE. K supports count as the mean of their K prototypes.
    """
    P_pre = masked_average_pool(F_s, M_s).mean(axis=1)  # eq 1
    y_pre = convs(F_q, P_pre, train=train)  # eq 2
    P_psd = masked_average_pool(F_q, predicted(y_pre))  # eq 3
    return {"P_pre": P_pre, "y_pre": y_pre, "P_psd": P_psd}

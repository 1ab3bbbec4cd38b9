"""QPENet: the assembly of the paper's Fig. 2 over frozen backbone features."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from qpenet_jax.models.dpe import dual_prototypes
from qpenet_jax.models.ffa import FFA
from qpenet_jax.models.gbc import GBC
from qpenet_jax.models.layers import Conv1x1, Convs, channel_dropout
from qpenet_jax.models.ops import resize_align_corners
from qpenet_jax.models.ppg import pseudo_prototype
from qpenet_jax.models.prototypes import foreground_on_grid


class QPENet(nn.Module):
    """Query-guided Prototype Evolution Network (Cong et al., IEEE TMM 2024).

    Defaults are the paper's; where it is silent, the authors' released system's.
    """

    channels: int = 256
    channel_dropout: float = 0.5
    head_dropout: float = 0.1
    gate_dropout: float = 0.5
    attention_dropout: float = 0.1
    heads: int = 8
    ffn_features: int = 768
    residual: bool = True
    auxiliary_head: bool = True
    shared_reducer: bool = False

    @nn.compact
    def __call__(
        self,
        support_features: Float[Array, "b k h w f"],
        support_masks: Int[Array, "b k H W"],
        query_features: Float[Array, "b h w f"],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b H W 2"], dict[str, Array]]:
        """Return the query's logits at image size and every named intermediate.

        `out` holds P_pre, P_psd, P_main, P_aux, P_bg [b, c]; y_pre, y_bg_q, y_final
        (y_aux) [b, h, w, 2]; y_rev (in training y_bg_s) [b, k, h, w, 2]; A_main, A_aux
        [b, h, w]; M_s [b, k, h, w]. Any K. Sides must be 8 n + 1 pixels; raises
        ValueError if masks and features do not fit. `train` needs a "dropout" key.
        """
        b, k, h, w, f = support_features.shape
        reduce_support = Conv1x1(self.channels, name="reduce_support")
        reduce_query = (
            reduce_support
            if self.shared_reducer
            else Conv1x1(self.channels, name="reduce_query")
        )
        dropout = channel_dropout(self.channel_dropout)
        folded = support_features.reshape(b * k, h, w, f)
        F_s = dropout(reduce_support(folded), deterministic=not train)
        F_s = F_s.reshape(b, k, h, w, -1)
        F_q = dropout(reduce_query(query_features), deterministic=not train)
        M_s = foreground_on_grid(support_masks, (h, w))

        convs = Convs(self.channel_dropout, self.head_dropout, name="convs")
        gbc = GBC(
            self.channel_dropout, self.head_dropout, self.gate_dropout, name="gbc"
        )
        ffa = FFA(
            self.head_dropout,
            self.attention_dropout,
            self.heads,
            self.ffn_features,
            self.residual,
            self.auxiliary_head,
            name="ffa",
        )

        # Foreground: support -> query -> support.
        out = {"M_s": M_s}
        out |= pseudo_prototype(convs, F_q, F_s, M_s, train=train)
        out |= dual_prototypes(convs, out["P_psd"], F_s, M_s, train=train)
        # Background: the global prototype, cleansed for this query.
        out |= gbc(F_q, F_s, train=train)
        # Decoder.
        out |= ffa(F_q, F_s, M_s, out, train=train)

        height, width = support_masks.shape[-2:]
        logits = resize_align_corners(out["y_final"], (height, width))
        return logits, out

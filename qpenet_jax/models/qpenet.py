"""QPENet: the assembly of the paper's Fig. 2 over frozen backbone features."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qpenet_jax.core.errors import InputError
from qpenet_jax.models.dpe import dual_prototypes
from qpenet_jax.models.fem import FEM, prior_mask
from qpenet_jax.models.ffa import FFA, CrossAttention
from qpenet_jax.models.gbc import GBC
from qpenet_jax.models.layers import (
    Conv1x1,
    Convs,
    Head,
    channel_dropout,
    unit_rms,
)
from qpenet_jax.models.ops import resize_align_corners
from qpenet_jax.models.ppg import preliminary_prototype, pseudo_prototype
from qpenet_jax.models.prototypes import activation_map, foreground_on_grid


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
    residual: bool = True  # of FFA, as the next one
    auxiliary_head: bool = True
    shared_reducer: bool = False
    normalize: bool = False  # the backbone's features to a root mean square of 1
    background_scale: float = 1.0  # P_global starts from N(0, this squared)

    # What the rows of Tables III to V change, see variants.py.
    fgpe: bool = True  # foreground prototype evolution: PPG and DPE
    bgpe: bool = True  # background prototype evolution: the cleaner of GBC
    decoder: str = "ffa"  # or "fem"
    prototypes: tuple[str, ...] = ("pre", "main", "aux")  # that the decoder is given
    activation_maps: bool = True  # P_main and P_aux as cosine maps, not broadcast
    sgm: bool = False  # P_pre, not the query's P_psd, segments the supports
    prior: bool = False  # PFENet's prior mask is one more map of the decoder

    def __post_init__(self):
        """Refuse field values that name no network."""
        if self.decoder not in ("ffa", "fem"):
            raise InputError(f"decoder {self.decoder!r}: choose 'ffa' or 'fem'")
        known = ("pre", "main", "aux") if self.fgpe else ("pre",)
        for name in self.prototypes:
            if name not in known:
                known = ", ".join(known)
                raise InputError(
                    f"prototype {name!r} with fgpe={self.fgpe}: choose among {known}"
                )
        super().__post_init__()

    def setup(self):
        """Make what `encode` needs as well; the rest is made where it is used."""
        self.reduce_support = Conv1x1(self.channels)
        self.reduce_query = (
            self.reduce_support if self.shared_reducer else Conv1x1(self.channels)
        )
        self.make_convs = functools.partial(
            Convs, self.channel_dropout, self.head_dropout
        )
        self.gbc = GBC(
            self.make_convs, self.gate_dropout, self.bgpe, self.background_scale
        )

    @nn.compact
    def __call__(
        self,
        support_features: Float[Array, "b k h w f"],
        support_masks: Int[Array, "b k H W"],
        query_features: Float[Array, "b h w f"],
        *,
        train: bool = False,
        P_bg: Float[Array, "b c"] | None = None,
    ) -> tuple[Float[Array, "b H W 2"], dict[str, Any]]:
        """Return the query's logits at image size and every named intermediate.

        `out` holds F_q [b, h, w, c], F_s [b, k, h, w, c]; P_pre, P_psd, P_main, P_aux,
        P_bg [b, c]; y_pre, y_bg_q, y_final (y_aux) [b, h, w, 2]; y_rev (in training
        y_bg_s) [b, k, h, w, 2]; A_main, A_aux [b, h, w]; M_s [b, k, h, w]. Variants
        lack what they don't compute; FEM adds a tuple y_inner, `prior` its map. Any K.
        Sides must be 8 n + 1 pixels; raises ValueError if masks and features do not
        fit. `train` needs a "dropout" key.
        With `P_bg` the features are F_s and F_q already, as `decode` has them.
        """
        b, k, h, w, f = support_features.shape
        F_s, F_q = support_features, query_features
        if P_bg is None:
            dropout = channel_dropout(self.channel_dropout)
            folded = self._scaled(F_s.reshape(b * k, h, w, f))
            F_s = dropout(self.reduce_support(folded), deterministic=not train)
            F_s = F_s.reshape(b, k, h, w, -1)
            F_q = self.reduce_query(self._scaled(F_q))
            F_q = dropout(F_q, deterministic=not train)
        M_s = foreground_on_grid(support_masks, (h, w))

        make_head = functools.partial(Head, self.head_dropout)
        make_cross = functools.partial(
            CrossAttention, self.heads, self.ffn_features, self.attention_dropout
        )

        # Foreground: support -> query -> support.
        out: dict[str, Any] = {"F_s": F_s, "F_q": F_q, "M_s": M_s}
        out["P_pre"] = preliminary_prototype(F_s, M_s)
        if self.fgpe:
            convs = self.make_convs(name="convs")
            out |= pseudo_prototype(convs, out["P_pre"], F_q, train=train)
            guide = out["P_pre"] if self.sgm else out["P_psd"]
            out |= dual_prototypes(convs, guide, F_s, M_s, train=train)
        # Background: the global prototype, cleansed for this query.
        out |= self.gbc(F_q, F_s, train=train) if P_bg is None else {"P_bg": P_bg}
        # Decoder.
        activation, P_fg = self._foreground(F_q, out)
        if self.prior:
            activation["prior"] = prior_mask(support_features, M_s, query_features)
        out |= activation
        maps = _concatenate([A[..., None] for A in activation.values()], like=F_q)
        if self.decoder == "ffa":
            ffa = FFA(
                make_head, make_cross, self.residual, self.auxiliary_head, name="ffa"
            )
            out |= ffa(F_q, F_s, M_s, out["P_bg"], P_fg, maps, train=train)
        else:
            fem = FEM(make_head, name="fem")
            out |= fem(F_q, out["P_bg"], P_fg, maps, train=train)

        height, width = support_masks.shape[-2:]
        logits = resize_align_corners(out["y_final"], (height, width))
        return logits, out

    def encode(self, features: Float[Array, "b h w f"]) -> tuple[Array, ...]:
        """Return all that evaluation can know of images without their episodes.

        That is F_s and F_q [b, h, w, c], one map if the reducer is shared, and P_bg
        [b, c], which depends on the query alone. With `prior` the features themselves.
        """
        if self.prior:
            return (features,)
        features = self._scaled(features)
        F_q = self.reduce_query(features)
        P_bg = self.gbc(F_q, F_q[:, None], train=False)["P_bg"]
        if self.shared_reducer:
            return F_q, P_bg
        return self.reduce_support(features), F_q, P_bg

    def decode(
        self,
        supports: Sequence[tuple[Array, ...]],
        support_masks: Int[Array, "b k H W"],
        query: tuple[Array, ...],
    ) -> tuple[Float[Array, "b H W 2"], dict[str, Any]]:
        """Return what `__call__` does in evaluation, from encoded images: no y_bg_q."""
        F_s = jnp.stack([encoded[0] for encoded in supports], axis=1)
        if self.prior:
            return self(F_s, support_masks, query[0])
        return self(F_s, support_masks, query[-2], P_bg=query[-1])

    def _scaled(self, features):
        """Return the features as the reducers take them."""
        return unit_rms(features) if self.normalize else features

    def _foreground(self, F_q, out):
        """Return the decoder's activation maps by name and the vectors to broadcast."""
        mapped = [n for n in self.prototypes if self.activation_maps and n != "pre"]
        A = {f"A_{n}": activation_map(F_q, out[f"P_{n}"]) for n in mapped}  # eqs 13, 14
        vectors = [out[f"P_{n}"] for n in self.prototypes if n not in mapped]
        return A, _concatenate(vectors, like=out["P_bg"])


def _concatenate(arrays, like):
    """Join along the channels; of no arrays at all, something `like` with none."""
    nothing = jnp.zeros((*like.shape[:-1], 0), like.dtype)
    return jnp.concatenate([nothing, *arrays], axis=-1)

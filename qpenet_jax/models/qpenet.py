"""QPENet: the assembly of the paper's Fig. 2 over frozen backbone features."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Integer

from qpenet_jax.core.errors import check_choice
from qpenet_jax.core.types import Array
from qpenet_jax.models.dpe import dual_prototypes
from qpenet_jax.models.fem import FEM, prior_mask
from qpenet_jax.models.ffa import FFA, CrossAttention
from qpenet_jax.models.gbc import GBC
from qpenet_jax.models.layers import (
    ConvReLU,
    Convs,
    Head,
    channel_dropout,
    each_support,
    unit_rms,
)
from qpenet_jax.models.ops import resize_align_corners
from qpenet_jax.models.ppg import preliminary_prototype, pseudo_prototype
from qpenet_jax.models.prototypes import activation_map, foreground_on_grid

Role = Literal["support", "query"]
ROLES: tuple[Role, ...] = ("support", "query")


class QPENet(nn.Module):
    """Query-guided Prototype Evolution Network (Cong et al., IEEE TMM 2024).

    Defaults are the paper's; where it is silent, the authors' released system's.
    """

    sees_padding: ClassVar[bool] = False  # where the square holds no photo

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
        """Refuses field values that name no network."""
        check_choice("decoder ", self.decoder, ("ffa", "fem"))
        known = ("pre", "main", "aux") if self.fgpe else ("pre",)
        for name in self.prototypes:
            check_choice(f"with fgpe={self.fgpe}, prototype ", name, known)
        super().__post_init__()

    def setup(self):
        """Makes the layers; only those that are used get parameters."""
        make_head = functools.partial(Head, self.head_dropout)
        make_convs = functools.partial(Convs, self.channel_dropout, self.head_dropout)
        self.reduce_support = ConvReLU(self.channels)
        self.reduce_query = (
            self.reduce_support if self.shared_reducer else ConvReLU(self.channels)
        )
        # Named as Flax would: dropout's draws depend on it.
        self.dropped = channel_dropout(self.channel_dropout, name="Dropout_0")
        self.convs = make_convs()
        self.gbc = GBC(
            self.channels,
            make_convs,
            self.background_scale,
            self.gate_dropout,
            self.bgpe,
        )
        if self.decoder == "ffa":
            make_cross = functools.partial(
                CrossAttention, self.heads, self.ffn_features, self.attention_dropout
            )
            self.ffa = FFA(make_head, make_cross, self.residual, self.auxiliary_head)
        else:
            self.fem = FEM(make_head)

    def __call__(
        self,
        support_features: Float[Array, "b k h w f"],
        support_masks: Integer[Array, "b k H W"],
        query_features: Float[Array, "b h w f"],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b H W 2"], dict[str, Any]]:
        """Returns the query's logits at image size and every named intermediate.

        `out` holds F_q [b, h, w, c], F_s [b, k, h, w, c]; P_pre, P_psd, P_main, P_aux,
        P_bg [b, c]; y_pre, y_bg_q, y_final (y_aux) [b, h, w, 2]; y_rev (in training
        y_bg_s) [b, k, h, w, 2]; A_main, A_aux [b, h, w]; M_s [b, k, h, w]. Variants
        lack what they don't compute; FEM adds a tuple y_inner, `prior` its map. Any K.
        Sides must be 8 n + 1 pixels; raises ValueError if masks and features do not
        fit. `train` needs a "dropout" key.
        """
        encode = functools.partial(self.encode, roles=("support",), train=train)
        supports = each_support(encode, support_features)
        query = self.encode(query_features, ("query",), train=train)
        logits, out = self.decode(supports, support_masks, query, train=train)
        if train:
            out["y_bg_s"] = self.gbc.supports(out["F_s"], train=train)  # eq 9
        return logits, out

    def encode(
        self,
        features: Float[Array, "n h w f"],
        roles: Sequence[Role] = ROLES,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        """Returns all that can be known of images without the others of their episode.

        A support has F_s [n, h, w, c]; a query has F_q [n, h, w, c] and, by GBC,
        y_bg_q [n, h, w, 2] and P_bg [n, c]. With a shared reducer an image that may be
        either has F_q for both. `prior` adds the features.
        """
        encoded = {"features": features} if self.prior else {}
        scaled = unit_rms(features) if self.normalize else features

        def reduced(reducer):
            return self.dropped(reducer(scaled), deterministic=not train)

        if "query" in roles:
            encoded["F_q"] = reduced(self.reduce_query)
            encoded |= self.gbc(encoded["F_q"], train=train)
        if "support" in roles and not (self.shared_reducer and "query" in roles):
            encoded["F_s"] = reduced(self.reduce_support)
        return encoded

    def decode(
        self,
        supports: Mapping[str, Array],
        support_masks: Integer[Array, "b k H W"],
        query: Mapping[str, Array],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b H W 2"], dict[str, Any]]:
        """Returns what `__call__` does, from encoded images: supports [b, k, ...].

        Supports may be cut around their foreground, which is `M_s` [b, k, h, w] then;
        nothing that lies further from it than `Convs.REACH` changes the logits.
        """
        F_s = supports["F_s"] if "F_s" in supports else supports["F_q"]
        F_q, P_bg = query["F_q"], query["P_bg"]
        grid = F_q.shape[1], F_q.shape[2]
        M_s = supports.get("M_s", foreground_on_grid(support_masks, grid))
        out: dict[str, Any] = {"F_s": F_s, "M_s": M_s}
        out |= {name: query[name] for name in ("F_q", "y_bg_q", "P_bg")}

        # Foreground: support -> query -> support.
        out["P_pre"] = preliminary_prototype(F_s, M_s)
        if self.fgpe:
            out |= pseudo_prototype(self.convs, out["P_pre"], F_q, train=train)
            guide = out["P_pre"] if self.sgm else out["P_psd"]
            out |= dual_prototypes(self.convs, guide, F_s, M_s, train=train)
        activation, P_fg = self._foreground(F_q, out)
        if self.prior:
            activation["prior"] = prior_mask(
                supports["features"], M_s, query["features"]
            )
        out |= activation
        # Decoder, by the background prototype that GBC has cleansed for this query.
        maps = _concatenate([A[..., None] for A in activation.values()], like=F_q)
        if self.decoder == "ffa":
            out |= self.ffa(F_q, F_s, M_s, P_bg, P_fg, maps, train=train)
        else:
            out |= self.fem(F_q, P_bg, P_fg, maps, train=train)

        height, width = support_masks.shape[-2:]
        logits = resize_align_corners(out["y_final"], (height, width))
        return logits, out

    def _foreground(self, F_q, out):
        """Returns the decoder's activation maps and its vectors to broadcast."""
        mapped = [n for n in self.prototypes if self.activation_maps and n != "pre"]
        A = {f"A_{n}": activation_map(F_q, out[f"P_{n}"]) for n in mapped}  # eqs 13, 14
        vectors = [out[f"P_{n}"] for n in self.prototypes if n not in mapped]
        return A, _concatenate(vectors, like=out["P_bg"])


def _concatenate(arrays, like):
    """Joins arrays along the channels; none at all give `like` with 0 channels."""
    nothing = jnp.zeros((*like.shape[:-1], 0), like.dtype)
    return jnp.concatenate([nothing, *arrays], axis=-1)

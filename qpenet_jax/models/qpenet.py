"""QPENet: the assembly of the paper's Fig. 2 over frozen backbone features."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
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

Role = Literal["support", "query"]
ROLES: tuple[Role, ...] = ("support", "query")


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

    # What the rows of Tables III to V change, see VARIANTS.
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
        """Make the layers; `nn.Module` gives parameters to those that are used."""
        make_head = functools.partial(Head, self.head_dropout)
        make_convs = functools.partial(Convs, self.channel_dropout, self.head_dropout)
        self.reduce_support = Conv1x1(self.channels)
        self.reduce_query = (
            self.reduce_support if self.shared_reducer else Conv1x1(self.channels)
        )
        # Named as Flax would: dropout's draws depend on it.
        self.dropped = channel_dropout(self.channel_dropout, name="Dropout_0")
        self.convs = make_convs()
        self.gbc = GBC(
            self.channels,
            make_convs,
            self.gate_dropout,
            self.bgpe,
            self.background_scale,
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
        support_masks: Int[Array, "b k H W"],
        query_features: Float[Array, "b h w f"],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b H W 2"], dict[str, Any]]:
        """Return the query's logits at image size and every named intermediate.

        `out` holds F_q [b, h, w, c], F_s [b, k, h, w, c]; P_pre, P_psd, P_main, P_aux,
        P_bg [b, c]; y_pre, y_bg_q, y_final (y_aux) [b, h, w, 2]; y_rev (in training
        y_bg_s) [b, k, h, w, 2]; A_main, A_aux [b, h, w]; M_s [b, k, h, w]. Variants
        lack what they don't compute; FEM adds a tuple y_inner, `prior` its map. Any K.
        Sides must be 8 n + 1 pixels; raises ValueError if masks and features do not
        fit. `train` needs a "dropout" key.
        """
        b, k = support_features.shape[:2]
        folded = support_features.reshape(b * k, *support_features.shape[2:])
        supports = self.encode(folded, ("support",), train=train)
        supports = {n: x.reshape(b, k, *x.shape[1:]) for n, x in supports.items()}
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
        """Return all that can be known of images without the others of their episode.

        Of a support F_s [n, h, w, c]; of a query F_q [n, h, w, c], y_bg_q [n, h, w, 2]
        and P_bg [n, c], by GBC. An image that may be either, over a shared reducer, has
        F_q for both. With `prior` also the features.
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
        support_masks: Int[Array, "b k H W"],
        query: Mapping[str, Array],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b H W 2"], dict[str, Any]]:
        """Return what `__call__` does, from encoded images: supports [b, k, ...]."""
        F_s = supports["F_s"] if "F_s" in supports else supports["F_q"]
        F_q, P_bg = query["F_q"], query["P_bg"]
        M_s = foreground_on_grid(support_masks, (F_q.shape[1], F_q.shape[2]))
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

    def segment_background(
        self, F_q: Float[Array, "b h w c"], prototype: Float[Array, "b c"]
    ) -> Float[Array, "b h w 2"]:
        """Return eq 10's logits by another prototype than P_global, to look at it."""
        return self.gbc.segment(F_q, prototype, train=False)

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


class Variant(NamedTuple):
    """A row of the ablation tables: QPENet's fields and what the paper reports.

    `rows` maps a table to this network's row in it, both counted from 1; Table III is
    3. The paper's class mIoU and FB-IoU are of PASCAL-5i, 1 shot, ResNet-50, in
    percent. `choice` says what the paper leaves open and what was chosen.
    """

    fields: Mapping[str, Any]
    rows: Mapping[int, int]
    miou: float
    fb_iou: float
    choice: str


VARIANTS: Mapping[str, Variant] = {
    "baseline": Variant(
        {"fgpe": False, "bgpe": False, "decoder": "fem", "prototypes": ("pre",)},
        {3: 1},
        62.4,
        74.1,
        "The wiring of FEM with two prototypes is not given: P_global is filtered out "
        "on every grid before P_pre is merged (NERTNet's order). The background "
        "predictions and their loss stay, or nothing would teach P_global; PFENet's "
        "prior mask is left out, as it needs layer4 and no other row has it.",
    ),
    "fgpe": Variant(
        {"bgpe": False, "decoder": "fem"},
        {3: 2},
        64.1,
        75.7,
        "How FEM takes three prototypes is not given: P_pre is broadcast, P_main and "
        "P_aux are activation maps, as in eq 15, brought to every grid.",
    ),
    "fgpe_bgpe": Variant(
        {"decoder": "fem"},
        {3: 3},
        64.5,
        76.2,
        "P_bg of eq 11 takes the place of P_global in FEM; the rest as in `fgpe`.",
    ),
    "fgpe_ffa": Variant(
        {"bgpe": False},
        {3: 4},
        64.8,
        76.3,
        "Eq 12 filters by P_global; its background predictions and loss stay.",
    ),
    "full": Variant(
        {},
        {3: 5, 4: 5, 5: 3},
        65.2,
        76.7,
        "The network of Fig. 2.",
    ),
    "pre": Variant(
        {"prototypes": ("pre",)},
        {4: 1},
        63.3,
        74.6,
        "Not said if the unused prototypes are still made: they are, with the losses "
        "of y_pre and y_rev; eq 15 has fewer channels instead of zeros.",
    ),
    "main": Variant(
        {"prototypes": ("main",)},
        {4: 2},
        61.8,
        72.0,
        "P_main alone could be broadcast as P_pre is: it stays an activation map, so "
        "that rows differ in nothing but what they leave out.",
    ),
    "aux": Variant(
        {"prototypes": ("aux",)},
        {4: 3},
        58.1,
        69.4,
        "An activation map, as in `main`.",
    ),
    "main_aux": Variant(
        {"prototypes": ("main", "aux")},
        {4: 4},
        64.1,
        74.7,
        "Activation maps, as in `main`.",
    ),
    "without_maps": Variant(
        {"activation_maps": False},
        {5: 1},
        61.6,
        73.0,
        "The prototypes are said to join the query features directly: here in eq 15, "
        "whose F_q is filtered by eq 12, in the order P_pre, P_main, P_aux.",
    ),
    "sgm": Variant(
        {"sgm": True},
        {5: 2},
        63.5,
        75.6,
        "How much of SCL's module enters is not said: only eq 4's guide, P_pre (the "
        "mean of K) for P_psd. PPG and its loss stay, so the parameters are the same.",
    ),
}


RESNET50_TO_LAYER3 = 8_543_296
"""Its parameters, two a channel of batch norm as PyTorch counts (frozen)."""

RESNET50_LAYER4 = 14_964_736
"""What layer4 would add; the released system loads it, nothing here needs it."""


def parameter_count(model: QPENet, features: int) -> int:
    """Return the number of trainable parameters over `features` input channels."""
    support = jax.ShapeDtypeStruct((1, 1, 3, 3, features), jnp.float32)
    query = jax.ShapeDtypeStruct((1, 3, 3, features), jnp.float32)
    masks = jax.ShapeDtypeStruct((1, 1, 17, 17), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), support, masks, query)
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def parameter_table() -> str:
    """Return in Markdown the parameters of all variants over ResNet-50, in millions.

    To be set beside the paper's 32.7 M without and 34.6 M with prototype evolution
    (IV.D), whose way of counting it doesn't give.
    """
    lines = [
        "| variant | trainable | with ResNet-50 to layer3 | with its layer4 too |",
        "|---|---:|---:|---:|",
    ]
    for name, variant in VARIANTS.items():
        trainable = parameter_count(QPENet(**variant.fields), 1536)
        to_layer3 = trainable + RESNET50_TO_LAYER3
        millions = (n / 1e6 for n in (to_layer3, to_layer3 + RESNET50_LAYER4))
        cells = f"{name} | {trainable:,}", *(f"{m:.2f} M" for m in millions)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

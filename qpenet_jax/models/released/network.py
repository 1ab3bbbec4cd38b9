"""The network that the authors of QPENet released, over frozen backbone features.

It has the paper's parts, PPG and DPE, GBC and FFA, and others that the paper doesn't
describe: four regions of the supports in place of two, a gate, PFENet's prior mask, a
dynamic convolution and a transformer. `docs/released.md` sets the two side by side.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from qpenet_jax.core.errors import check_choice
from qpenet_jax.core.types import BATCH_STATISTICS, Array
from qpenet_jax.models.fem import prior_mask
from qpenet_jax.models.layers import (
    ConvReLU,
    Convs,
    Head,
    MergePrototype,
    Residual,
    bias_init,
    channel_dropout,
    each_support,
    kernel_init,
    unit_rms,
)
from qpenet_jax.models.ops import resize_align_corners
from qpenet_jax.models.prototypes import (
    activation_map,
    foreground_on_grid,
    masked_average_pool,
    predicted,
)
from qpenet_jax.models.qpenet import ROLES, Role
from qpenet_jax.models.released.background import Background
from qpenet_jax.models.released.tokens import (
    BEHAVIOURS,
    Behaviour,
    Draws,
    flags_on_grid,
    never_one_sided,
)
from qpenet_jax.models.released.transformer import Transformer

NAME = "released"
"""The name of this network in `config.variant`."""

CHOICES = (*BEHAVIOURS, "auto")
"""Values of `behaviour`. "auto" is "released" with one support, else "fixed"."""

LAYER3_CHANNELS = 1024
"""The first channels of a ResNet's features, which its last stage starts from."""


class ReleasedQPENet(nn.Module):
    """The released system; called as `QPENet` is, and also given what is padding.

    `layer4` is the backbone's frozen last stage: for the prior mask the supports go
    through it with everything but their foreground set to 0. For backbones without such
    a stage, the prior is made of the features themselves.
    """

    sees_padding: ClassVar[bool] = True  # where the square holds no photo
    bgpe: ClassVar[bool] = False  # P_bg is a map, which can't take P_global's place

    layer4: nn.Module | None = None
    behaviour: str = "fixed"  # or "released", or "auto": by the number of supports
    channels: int = 256
    channel_dropout: float = 0.5
    head_dropout: float = 0.1
    gate_dropout: float = 0.5
    attention_dropout: float = 0.1
    heads: int = 8
    ffn_features: int = 768
    shared_reducer: bool = False
    normalize: bool = False
    background_scale: float = 0.0

    def __post_init__(self):
        """Refuses a behaviour that doesn't exist."""
        check_choice("behaviour ", self.behaviour, CHOICES)
        super().__post_init__()

    def setup(self):
        """Makes the layers."""
        c = self.channels
        make_convs = functools.partial(Convs, self.channel_dropout, self.head_dropout)
        self.reduce_support = ConvReLU(c)
        self.reduce_query = self.reduce_support if self.shared_reducer else ConvReLU(c)
        self.dropped = channel_dropout(self.channel_dropout)
        self.convs = make_convs()
        self.gbc = Background(c, make_convs, self.background_scale)
        dense = functools.partial(
            nn.Dense, c, kernel_init=kernel_init, bias_init=bias_init(c)
        )
        self.gate1, self.gate2 = dense(), dense()
        self.gate_dropped = nn.Dropout(self.gate_dropout)
        self.filter, self.activate = ConvReLU(c), MergePrototype(c)
        self.activate_residual = Residual()
        self.auxiliary_head = Head(self.head_dropout)
        self.transformer = Transformer(
            self.heads, self.ffn_features, self.attention_dropout
        )
        self.reduce, self.reduce_residual = ConvReLU(c), Residual()
        self.head = Head(self.head_dropout)

    def __call__(
        self,
        support_features: Float[Array, "b k h w f"],
        support_masks: Integer[Array, "b k H W"],
        query_features: Float[Array, "b h w f"],
        support_padding: Bool[Array, "b k H W"] | None = None,
        query_padding: Bool[Array, "b H W"] | None = None,
        draws: tuple[Draws, ...] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b H W 2"], dict[str, Any]]:
        """Returns the query's logits at image size and every named intermediate.

        Padding is true where the square image holds no photo; None means no padding.
        `draws` replaces the transformer's random draws, one for each layer. `train`
        needs a "dropout" key.
        """
        encode = functools.partial(self.encode, roles=("support",), train=train)
        supports = each_support(encode, support_features, support_padding)
        query = self.encode(query_features, query_padding, ("query",), train=train)
        logits, out = self.decode(supports, support_masks, query, draws, train=train)
        if train:
            out["y_bg_s"] = self.gbc.supports(out["F_s"], train=train)
        return logits, out

    def encode(
        self,
        features: Float[Array, "n h w f"],
        padding: Bool[Array, "n H W"] | None = None,
        roles: Sequence[Role] = ROLES,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        """Returns all that can be known of images without the others of their episode.

        For a support these are F_s and its layer3; for a query F_q, its layer4, y_bg_q
        and P_bg.
        """
        n, h, w = features.shape[:3]
        encoded: dict[str, Array] = {
            f"padded_{b}": jnp.zeros((n, h, w), bool)
            if padding is None
            else flags_on_grid(padding, (h, w), b)
            for b in BEHAVIOURS
        }
        scaled = unit_rms(features) if self.normalize else features

        def reduced(reducer):
            return self.dropped(reducer(scaled), deterministic=not train)

        if "query" in roles:
            encoded["F_q"] = reduced(self.reduce_query)
            encoded |= self.gbc(encoded["F_q"], train=train)
            encoded["deep"] = self._deep(self._shallow(features))
        if "support" in roles:
            encoded["shallow"] = self._shallow(features)
            if not (self.shared_reducer and "query" in roles):
                encoded["F_s"] = reduced(self.reduce_support)
        return encoded

    def _shallow(self, features):
        return features if self.layer4 is None else features[..., :LAYER3_CHANNELS]

    def _deep(self, shallow):
        if self.layer4 is None:
            return shallow
        return jax.lax.stop_gradient(self.layer4(shallow))

    def decode(
        self,
        supports: Mapping[str, Array],
        support_masks: Integer[Array, "b k H W"],
        query: Mapping[str, Array],
        draws: tuple[Draws, ...] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b H W 2"], dict[str, Any]]:
        """Returns what `__call__` does, from encoded images: supports [b, k, ...]."""
        F_s = supports["F_s"] if "F_s" in supports else supports["F_q"]
        F_q = query["F_q"]
        grid = (F_q.shape[1], F_q.shape[2])
        M_s = foreground_on_grid(support_masks, grid)
        out: dict[str, Any] = {"F_s": F_s, "M_s": M_s}
        out |= {name: query[name] for name in ("F_q", "y_bg_q", "P_bg", "pi")}
        out |= self._evolve(F_s, M_s, F_q, train=train)
        out["gate"], G = self._activate_support(F_s, M_s, train=train)
        out["G"] = G
        out["prior"] = self._prior(supports["shallow"], M_s, query["deep"])

        maps = {f"A_{n}": activation_map(F_q, out[f"P_{n}"]) for n in MAPS}
        out |= maps
        filtering = [F_q, out["P_bg"], maps["A_delta"], maps["A_gamma"]]
        H1 = self.filter(_concatenate(filtering))
        names = ("A_main", "A_pre", "A_aux")
        activating = [H1, out["prior"], *(maps[n] for n in names), G.mean(axis=1)]
        P_fg = 0.5 * out["P_pre"] + 0.5 * out["P_psd"]
        H2 = self.activate(_concatenate(activating), P_fg)
        out |= {"H1": H1, "H2": H2}
        T0 = self.activate_residual(H2)
        out["y_aux"] = self.auxiliary_head(T0, train=train)

        behaviour = resolve_behaviour(self.behaviour, shots=F_s.shape[1])
        marked = flags_on_grid(support_masks == 1, grid, behaviour)
        T, parts = self.transformer(
            T0,
            query[f"padded_{behaviour}"],
            G,
            never_one_sided(marked),
            supports[f"padded_{behaviour}"],
            behaviour,
            draws,
            train=train,
        )
        U = self.reduce(T)
        V = self.reduce_residual(U)
        out |= {"T0": T0, **parts, "T": T, "U": U, "V": V}
        out["y_final"] = self.head(V, train=train)
        height, width = support_masks.shape[-2:]
        return resize_align_corners(out["y_final"], (height, width)), out

    def _evolve(self, F_s, M_s, F_q, *, train):
        """Returns the prototypes: support -> query -> support, as PPG and DPE.

        `y_pre_each` and `y_rev` are [b, k, h, w, 2], `y_pre` is the mean over the K
        supports, as are the prototypes. Where DPE has two regions there are four: the
        foreground that the query's prototype found (main) or missed (aux), and of the
        background what it took for foreground (delta) or didn't (gamma).
        """
        segment = functools.partial(self.convs, train=train)
        F_q = jnp.broadcast_to(F_q[:, None], F_s.shape)
        P_pre = masked_average_pool(F_s, M_s)
        y_pre = each_support(segment, F_q, P_pre)
        P_psd = masked_average_pool(F_q, predicted(y_pre))
        y_rev = each_support(segment, F_s, P_psd)
        R = predicted(y_rev)
        regions = {"main": R & M_s, "aux": ~R & M_s}
        regions |= {"delta": R & ~M_s, "gamma": ~R & ~M_s}
        P = {f"P_{n}": masked_average_pool(F_s, m) for n, m in regions.items()}
        P |= {"P_pre": P_pre, "P_psd": P_psd}
        means = {name: prototypes.mean(axis=1) for name, prototypes in P.items()}
        each = {"y_pre_each": y_pre, "y_rev": y_rev}
        return {"y_pre": y_pre.mean(axis=1), **each, **means}

    def _activate_support(self, F_s, M_s, *, train):
        """Returns a gate [b, k, c] from what the mask holds, and the support by it."""
        masked = F_s * M_s[..., None].astype(F_s.dtype)
        hidden = nn.relu(self.gate1(masked.mean(axis=(2, 3))))
        gate = self.gate_dropped(self.gate2(hidden), deterministic=not train)
        gate = nn.sigmoid(gate)
        return gate, F_s * gate[:, :, None, None]

    def _prior(self, shallow, M_s, deep):
        """Returns PFENet's prior mask [b, h, w] from features of the last stage."""
        foreground = shallow * M_s[..., None].astype(shallow.dtype)
        if self.is_mutable_collection(BATCH_STATISTICS):
            # Upstream's pass of the whole support: unused, but seen by batch norm.
            each_support(self._deep, shallow)
        support = each_support(self._deep, foreground)
        return jax.lax.stop_gradient(prior_mask(support, M_s, deep))


def resolve_behaviour(choice: str, shots: int) -> Behaviour:
    """Returns the behaviour for so many supports: upstream's code takes one."""
    as_released = choice == "released" or (choice == "auto" and shots == 1)
    return "released" if as_released else "fixed"


MAPS = ("delta", "gamma", "main", "pre", "aux")
"""The prototypes whose cosine maps the decoder is given."""


def _concatenate(arrays):
    return jnp.concatenate([x if x.ndim == 4 else x[..., None] for x in arrays], -1)

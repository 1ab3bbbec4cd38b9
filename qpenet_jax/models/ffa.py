"""FFA: Feature Filtering and Activation, the decoder (paper III.E, eqs 12-16).

Eqs 13 and 14 are in `qpenet.py`, where every decoder's view of the foreground is made.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float

from qpenet_jax.core.types import Array
from qpenet_jax.models import ops
from qpenet_jax.models.layers import (
    ConvReLU,
    Head,
    MergePrototype,
    Residual,
    linear,
)


class FFA(nn.Module):
    """Filters the background out of the query, activates the foreground, decodes."""

    make_head: Callable[..., Head]
    make_cross: Callable[..., "CrossAttention"]
    residual: bool
    auxiliary_head: bool

    @nn.compact
    def __call__(
        self,
        F_q: Float[Array, "b h w c"],
        F_s: Float[Array, "b k y x c"],
        M_s: Bool[Array, "b k y x"],
        P_bg: Float[Array, "b c"],
        P_fg: Float[Array, "b p"],
        maps: Float[Array, "b h w m"],
        *,
        train: bool,
    ) -> dict[str, Array]:
        """Returns the logits `y_final` (and `y_aux`) [b, h, w, 2].

        In the paper `P_fg` is P_pre and `maps` are A_main and A_aux. The residual
        blocks and the auxiliary head (`y_aux`) are the released system's.
        """
        c = F_q.shape[-1]
        refine = Residual if self.residual else lambda name: lambda x: x
        out = {}

        F_dot = MergePrototype(c, name="filter")(F_q, P_bg)  # eq 12
        activated = jnp.concatenate([F_dot, maps], axis=-1)
        x = MergePrototype(c, name="activate")(activated, P_fg)  # eq 15
        x = refine(name="activate_residual")(x)
        if self.auxiliary_head:
            out["y_aux"] = self.make_head(name="auxiliary_head")(x, train=train)

        for layer in ("cross1", "cross2"):  # eq 16
            x = self.make_cross(name=layer)(x, F_s, M_s, train=train)
        x = ConvReLU(c, name="reduce")(x)
        x = refine(name="reduce_residual")(x)
        return {**out, "y_final": self.make_head(name="head")(x, train=train)}


class CrossAttention(nn.Module):
    """Cross of eq 16: query positions attend to the supports' foreground positions.

    Multi-head attention and a feed-forward network, each with dropout, residual and
    LayerNorm after it; no biases and no position code, as in the released system.
    """

    heads: int
    ffn_features: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        F_s: Float[Array, "b k y x c"],
        M_s: Bool[Array, "b k y x"],
        *,
        train: bool,
    ) -> Float[Array, "b h w c"]:
        """Returns the refined query features; keys of all K supports stand together.

        A support set without foreground on the grid falls back to all its positions.
        """
        b, h, w, c = x.shape
        queries, keys = x.reshape(b, h * w, c), F_s.reshape(b, -1, c)
        mask = M_s.reshape(b, -1)
        mask = mask | ~mask.any(axis=1, keepdims=True)

        def heads(t, name):
            return linear(c, name)(t).reshape(b, -1, self.heads, c // self.heads)

        def add_and_norm(t, update, name):
            update = nn.Dropout(self.dropout)(update, deterministic=not train)
            return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name=name)(t + update)

        q, k, v = heads(queries, "query"), heads(keys, "key"), heads(keys, "value")
        attended = ops.attention(q, k, v, mask).reshape(b, h * w, c)
        x = add_and_norm(queries, linear(c, "out")(attended), "norm1")
        hidden = nn.relu(linear(self.ffn_features, "ffn1")(x))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        x = add_and_norm(x, linear(c, "ffn2")(hidden), "norm2")
        return x.reshape(b, h, w, c)


LAYER_NORM_EPSILON = 1e-5
"""PyTorch's default, ten times Flax's: weights of either are to mean the same."""

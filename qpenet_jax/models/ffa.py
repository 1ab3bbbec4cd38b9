"""FFA: Feature Filtering and Activation, the decoder (paper III.E, eqs 12-16)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qpenet_jax.models import ops
from qpenet_jax.models.layers import (
    Conv1x1,
    Head,
    MergePrototype,
    Residual,
    kernel_init,
)
from qpenet_jax.models.prototypes import activation_map


class FFA(nn.Module):
    """Filter the background out of the query, activate the foreground, decode."""

    head_dropout: float = 0.1
    attention_dropout: float = 0.1
    heads: int = 8
    ffn_features: int = 768
    residual: bool = True
    auxiliary_head: bool = True

    @nn.compact
    def __call__(
        self,
        F_q: Float[Array, "b h w c"],
        F_s: Float[Array, "b k h w c"],
        M_s: Bool[Array, "b k h w"],
        prototypes: dict[str, Float[Array, "b c"]],
        *,
        train: bool,
    ) -> dict[str, Array]:
        """Return `y_final` [b, h, w, 2], `A_main`, `A_aux` [b, h, w] (and `y_aux`).

        `prototypes` holds P_bg, P_pre, P_main and P_aux. The residual blocks and the
        auxiliary head (`y_aux`) are the released system's, not the paper's.
        """
        c = F_q.shape[-1]
        refine = Residual if self.residual else lambda name: lambda x: x
        out = {}

        F_dot = MergePrototype(c, name="filter")(F_q, prototypes["P_bg"])  # eq 12
        out["A_main"] = activation_map(F_q, prototypes["P_main"])  # eq 13
        out["A_aux"] = activation_map(F_q, prototypes["P_aux"])  # eq 14
        maps = jnp.stack([out["A_main"], out["A_aux"]], axis=-1)
        activated = jnp.concatenate([F_dot, maps], axis=-1)
        x = MergePrototype(c, name="activate")(activated, prototypes["P_pre"])  # eq 15
        x = refine(name="activate_residual")(x)
        if self.auxiliary_head:
            head = Head(self.head_dropout, name="auxiliary_head")
            out["y_aux"] = head(x, train=train)

        for layer in ("cross1", "cross2"):  # eq 16
            cross = CrossAttention(
                self.heads, self.ffn_features, self.attention_dropout, name=layer
            )
            x = cross(x, F_s, M_s, train=train)
        x = Conv1x1(c, name="reduce")(x)
        x = refine(name="reduce_residual")(x)
        head = Head(self.head_dropout, name="head")
        return {**out, "y_final": head(x, train=train)}


class CrossAttention(nn.Module):
    """Cross of eq 16: query positions attend to the supports' foreground positions.

    Multi-head attention and a feed-forward network, each with dropout, residual and
    LayerNorm after it; no biases and no position code, as in the released system.
    """

    heads: int = 8
    ffn_features: int = 768
    dropout: float = 0.1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        F_s: Float[Array, "b k h w c"],
        M_s: Bool[Array, "b k h w"],
        *,
        train: bool,
    ) -> Float[Array, "b h w c"]:
        """Return the refined query features; keys of all K supports stand together.

        A support set without foreground on the grid falls back to all its positions.
        """
        b, h, w, c = x.shape
        queries, keys = x.reshape(b, h * w, c), F_s.reshape(b, -1, c)
        mask = M_s.reshape(b, -1)
        mask = mask | ~mask.any(axis=1, keepdims=True)

        def linear(features, name):
            return nn.Dense(
                features, use_bias=False, kernel_init=kernel_init, name=name
            )

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

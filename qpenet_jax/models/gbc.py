"""GBC: Global Background Cleansing (paper III.D, eqs 9-11)."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from qpenet_jax.models.layers import Convs, bias_init, kernel_init
from qpenet_jax.models.prototypes import predicted


class GBC(nn.Module):
    """Cleanse the learned global background prototype for one query.

    Without `cleanse`, P_bg is P_global itself (rows of Table III without BGPE).
    P_global starts from N(0, init_scale^2); at 0 it starts from zeros.
    """

    make_convs: Callable[..., Convs]
    gate_dropout: float
    cleanse: bool
    init_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        F_q: Float[Array, "b h w c"],
        F_s: Float[Array, "b k h w c"],
        *,
        train: bool,
    ) -> dict[str, Array]:
        """Return `P_bg` [b, c] and the background logits `y_bg_q` [b, h, w, 2].

        Class 1 means background. In training also `y_bg_s` [b, k, h, w, 2], which only
        teaches the prototype (eq 9).
        """
        b, k, *_, c = F_s.shape
        # One vector for all images: what the backgrounds of the training set share.
        start = nn.initializers.normal(self.init_scale)
        P_global = self.param("P_global", start, (c,))
        P_bg = jnp.tile(P_global, (b, 1))
        convs = self.make_convs(name="convs")

        out = {}
        y_bg_q = convs(F_q, P_bg, train=train)  # eq 10
        if train:
            folded = F_s.reshape(b * k, *F_s.shape[2:])
            y_bg_s = convs(folded, jnp.tile(P_global, (b * k, 1)), train=train)  # eq 9
            out["y_bg_s"] = y_bg_s.reshape(b, k, *y_bg_s.shape[1:])

        if self.cleanse:
            background = predicted(y_bg_q)[..., None]
            pooled = jnp.mean(F_q * background, axis=(1, 2))
            P_bg = P_global * self._cleaner(pooled, train=train)  # eq 11
        return {"y_bg_q": y_bg_q, "P_bg": P_bg, **out}

    def _cleaner(self, pooled, *, train):
        """Return FC(FC(.)) of eq 11 as a gate in 0..1, as a cleaner only takes away."""

        def fc(name):
            c = pooled.shape[-1]
            return nn.Dense(
                c, kernel_init=kernel_init, bias_init=bias_init(c), name=name
            )

        gate = fc("fc2")(nn.relu(fc("fc1")(pooled)))
        gate = nn.Dropout(self.gate_dropout)(gate, deterministic=not train)
        return nn.sigmoid(gate)

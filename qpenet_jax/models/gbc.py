"""GBC: Global Background Cleansing (paper III.D, eqs 9-11)."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from qpenet_jax.core.types import Array
from qpenet_jax.models.layers import Convs, bias_init, each_support, kernel_init
from qpenet_jax.models.prototypes import predicted


class LearnedBackground(nn.Module):
    """The global background prototype, which learns by segmenting all images.

    P_global starts from N(0, init_scale^2); at 0 it starts from zeros.
    """

    channels: int
    make_convs: Callable[..., Convs]
    init_scale: float

    def setup(self):
        """Makes P_global and the layers that segment by it."""
        # One vector for all images: what the backgrounds of the training set share.
        start = nn.initializers.normal(self.init_scale)
        self.P_global = self.param("P_global", start, (self.channels,))
        self.convs = self.make_convs()

    def segment(
        self, features: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w 2"]:
        """Returns the logits of eqs 9 and 10 by P_global; class 1 is background."""
        shape = (features.shape[0], self.channels)
        return self.convs(features, jnp.broadcast_to(self.P_global, shape), train=train)

    def supports(
        self, F_s: Float[Array, "b k h w c"], *, train: bool
    ) -> Float[Array, "b k h w 2"]:
        """Returns the supports' background logits, which only teach P_global (eq 9)."""
        return each_support(functools.partial(self.segment, train=train), F_s)


class GBC(LearnedBackground):
    """Cleanses the learned global background prototype for one query.

    Without `cleanse`, P_bg is P_global itself (rows of Table III without BGPE).
    """

    gate_dropout: float
    cleanse: bool

    def setup(self):
        """Makes P_global and the layers."""
        super().setup()
        if self.cleanse:
            c = self.channels
            dense = functools.partial(
                nn.Dense, c, kernel_init=kernel_init, bias_init=bias_init(c)
            )
            self.fc1, self.fc2 = dense(), dense()
            # Named as Flax would: dropout's draws depend on it.
            self.gate_dropped = nn.Dropout(self.gate_dropout, name="Dropout_0")

    def __call__(
        self, F_q: Float[Array, "b h w c"], *, train: bool
    ) -> dict[str, Array]:
        """Returns `P_bg` [b, c] and the query's background logits `y_bg_q`."""
        y_bg_q = self.segment(F_q, train=train)  # eq 10
        if not self.cleanse:
            P_bg = jnp.tile(self.P_global, (F_q.shape[0], 1))
            return {"y_bg_q": y_bg_q, "P_bg": P_bg}
        background = predicted(y_bg_q)[..., None].astype(F_q.dtype)
        pooled = jnp.mean(F_q * background, axis=(1, 2))
        # FC(FC(.)) of eq 11 as a gate in 0..1: a cleaner only takes away.
        gate = self.fc2(nn.relu(self.fc1(pooled)))
        gate = nn.sigmoid(self.gate_dropped(gate, deterministic=not train))
        return {"y_bg_q": y_bg_q, "P_bg": self.P_global[None] * gate}

"""The released background branch: a convolution that is mixed for every query."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpenet_jax.core.types import Array
from qpenet_jax.models.gbc import LearnedBackground
from qpenet_jax.models.prototypes import predicted

KERNELS = 4

TEMPERATURE = 34
"""Temperature of the softmax over the kernels; upstream never lowers it, as planned."""


class Background(LearnedBackground):
    """Segments the background by the learned prototype and adapts that to the query."""

    def setup(self):
        """Makes P_global and the layers."""
        super().setup()
        c = self.channels
        by_outputs = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        # Upstream's hidden layer has a quarter of the channels and one more.
        self.fc1 = nn.Dense(c // 4 + 1, use_bias=False, kernel_init=by_outputs)
        self.fc2 = nn.Dense(KERNELS, kernel_init=by_outputs)
        bound = (6 / (9 * c)) ** 0.5
        uniform = nn.initializers.uniform(2 * bound)

        def centred(key, shape):
            return uniform(key, shape) - bound

        self.kernels = self.param("kernels", centred, (KERNELS, 3, 3, c, c))

    def __call__(
        self, F_q: Float[Array, "b h w c"], *, train: bool
    ) -> dict[str, Array]:
        """Returns `P_bg` [b, h, w, c], `y_bg_q` [b, h, w, 2], the mix `pi` [b, 4]."""
        y_bg_q = self.segment(F_q, train=train)
        background = predicted(y_bg_q)[..., None].astype(F_q.dtype)
        pooled = jnp.mean(F_q * background, axis=(1, 2))
        pi = nn.softmax(self.fc2(nn.relu(self.fc1(pooled))) / TEMPERATURE)
        # The prototype is the same at every cell, so that the 3x3 convolution is a sum
        # of nine vectors, without those whose neighbour lies outside the grid.
        taps = jnp.einsum("ruvio,i->ruvo", self.kernels, self.P_global)
        taps = jnp.einsum("br,ruvo->buvo", pi, taps)
        rows, columns = (_has_neighbour(n) for n in F_q.shape[1:3])
        rows, columns = rows.astype(taps.dtype), columns.astype(taps.dtype)
        P_bg = jnp.einsum("iu,jv,buvo->bijo", rows, columns, taps)
        return {"y_bg_q": y_bg_q, "P_bg": P_bg, "pi": pi}


def _has_neighbour(cells: int) -> np.ndarray:
    """Returns `[cells, 3]`: 1 where the neighbour before, itself or after exists."""
    neighbour = np.arange(cells)[:, None] + np.array([-1, 0, 1])
    return ((neighbour >= 0) & (neighbour < cells)).astype(np.float32)

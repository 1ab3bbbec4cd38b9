"""The convolutions that backbones are made of, with bias.

Batch norm in eval mode is a fixed scale and shift per channel. `convert.py` folds it
into the convolution before it, so every layer here is a plain convolution with bias.
"""

import flax.linen as nn
import jax
from jaxtyping import Float

from qpenet_jax.core.types import Array
from qpenet_jax.models import ops


class Conv(nn.Module):
    """A k x k convolution with bias, padded symmetrically: stride 1 keeps the size."""

    features: int
    size: int = 1
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Convolve `x`; the output side is ceil(side / stride)."""
        window = () if self.size == 1 else (self.size, self.size)
        shape = (*window, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return self._convolve(x, kernel) + bias.reshape(1, 1, 1, -1)

    def _convolve(self, x, kernel):
        if self.size == 1:
            return ops.conv1x1(x[:, :: self.stride, :: self.stride], kernel)
        if self.size == 3 and self.stride == 1:
            return ops.conv3x3(x, kernel, dilation=self.dilation)
        pad = self.size // 2 * self.dilation
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=ops.NHWC,
        )


class DepthwiseConv(nn.Module):
    """A k x k convolution of every channel on its own, with bias."""

    size: int
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Convolve `x`; the output side is ceil(side / stride)."""
        channels = x.shape[-1]
        shape = (self.size, self.size, channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = ops.depthwise_conv(x, kernel, stride=self.stride, dilation=self.dilation)
        return x + bias.reshape(1, 1, 1, -1)

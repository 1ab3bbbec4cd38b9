"""The convolutions that backbones are made of, with bias.

Batch norm in eval mode is a fixed scale and shift per channel, which `torch_layout.py`
folds into the convolution before it: every layer here is a plain one with bias.
Only where batch norm drifts (`training/drift.py`) it comes out again.
"""

import flax.linen as nn
import jax
from jaxtyping import Float

from qpenet_jax.backbones.batch_norm import Norm, Statistics, normalise_by_batch
from qpenet_jax.core.types import BATCH_STATISTICS, Array
from qpenet_jax.models import ops
from qpenet_jax.models.layers import parameter, traced_once

kernel_init = traced_once(nn.initializers.lecun_normal())


class Conv(nn.Module):
    """A k x k convolution with bias, padded symmetrically: stride 1 keeps the size."""

    features: int
    size: int = 1
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Convolves `x`; the output side is ceil(side / stride)."""
        window = () if self.size == 1 else (self.size, self.size)
        shape = (*window, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", kernel_init, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        y = self._convolve(x, kernel)
        if self.is_mutable_collection(BATCH_STATISTICS) and not self.is_initializing():
            return self._normalise(y)
        return y + bias.reshape(1, 1, 1, -1)

    def _normalise(self, y):
        """Normalises by the batch, and move the statistics."""

        def read(collection, kind):
            return kind(*(self.get_variable(collection, f) for f in kind._fields))

        before = read(BATCH_STATISTICS, Statistics)
        y, after = normalise_by_batch(y, read("params", Norm), before)
        for field, value in after._asdict().items():
            self.put_variable(BATCH_STATISTICS, field, value)
        return y

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
        """Convolves `x`; the output side is ceil(side / stride)."""
        channels = x.shape[-1]
        shape = (self.size, self.size, channels)
        kernel = parameter(self, "kernel", kernel_init, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,))
        x = ops.depthwise_conv(x, kernel, stride=self.stride, dilation=self.dilation)
        return x + bias.reshape(1, 1, 1, -1)

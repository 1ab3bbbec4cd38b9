"""EfficientNet-Lite0 up to block 14, dilated to stride 8."""

import flax.linen as nn
import jax
from jaxtyping import Float

from qpenet_jax.backbones.convolutions import Conv
from qpenet_jax.core.types import Array


class MBConv(nn.Module):
    """Inverted residual block (Sandler et al., CVPR 2018) with ReLU6, as in "Lite"."""

    expansion: int
    size: int
    features: int
    stride: int
    dilation: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Returns `[b, ceil(h / stride), ceil(w / stride), features]`."""
        channels = self.expansion * x.shape[-1]
        y = x
        if self.expansion > 1:
            y = jax.nn.relu6(Conv(channels, name="expand")(y))
        window = self.size, self.stride, self.dilation
        depthwise = Conv(channels, *window, depthwise=True, name="depthwise")
        y = Conv(self.features, name="project")(jax.nn.relu6(depthwise(y)))
        return x + y if x.shape == y.shape else y


# Expansion, kernel size, channels, number of blocks, stride of the first block. The
# original has one more block (15) and a head, of which nothing is needed.
LITE0_STAGES = (
    (1, 3, 16, 1, 1),  # block 0
    (6, 3, 24, 2, 2),  # 1, 2
    (6, 5, 40, 2, 2),  # 3, 4
    (6, 3, 80, 3, 2),  # 5 to 7
    (6, 5, 112, 3, 1),  # 8 to 10
    (6, 5, 192, 4, 2),  # 11 to 14
)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le, ICML 2019, "Lite" edition) up to block 14.

    Strides beyond `output_stride` (8, 16 or 32) become dilation of the layers after
    them. The convolution which loses its stride keeps the dilation it had: every kernel
    then reads the same neighbours as when it was trained, and the features at stride 8
    hold those at stride 32 as every fourth row and column (sides 32n + 1).
    """

    output_stride: int = 8

    @nn.compact
    def __call__(
        self, images: Float[Array, "b height width 3"]
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """Returns block4 (40 channels), block10 (112) and block14 (192)."""
        x = jax.nn.relu6(Conv(32, 3, stride=2, name="stem")(images))
        blocks, reached, dilation = [], 2, 1
        for expansion, size, features, count, first_stride in LITE0_STAGES:
            for stride in (first_stride,) + (1,) * (count - 1):
                taken = stride if reached * stride <= self.output_stride else 1
                name = f"block{len(blocks)}"
                x = MBConv(expansion, size, features, taken, dilation, name=name)(x)
                reached, dilation = reached * taken, dilation * stride // taken
                blocks.append(x)
        return {f"block{i}": blocks[i] for i in (4, 10, 14)}

"""ResNet-50 and 101, dilated to stride 8: up to layer3, and layer4 on its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from qpenet_jax.backbones.convolutions import Conv
from qpenet_jax.core.types import Array


class Bottleneck(nn.Module):
    """Residual 1x1 - 3x3 - 1x1 block with the stride on its 3x3 (torchvision's)."""

    width: int
    stride: int
    dilation: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Returns `[b, ceil(h / stride), ceil(w / stride), 4 * width]`."""
        width, stride = self.width, self.stride
        y = nn.relu(Conv(width, name="conv1")(x))
        y = nn.relu(Conv(width, 3, stride, self.dilation, name="conv2")(y))
        y = Conv(4 * width, name="conv3")(y)
        if x.shape != y.shape:
            x = Conv(4 * width, stride=stride, name="downsample")(x)
        return nn.relu(x + y)


RESNET_LAYERS = ((64, 1, 1), (128, 2, 1), (256, 1, 2))  # width, stride, dilation


class ResNet(nn.Module):
    """ResNet (He et al., CVPR 2016) up to layer3, dilated to stride 8.

    `blocks` counts the bottlenecks of layer1..layer3: (3, 4, 6) is ResNet-50 and
    (3, 4, 23) ResNet-101. `deep_stem` swaps torchvision's 7x7 convolution for the three
    3x3 ones of PSPNet. Every 3x3 of layer3 has dilation 2, its first one too, as in
    PSPNet and the few-shot codes built on it. QPENet does not use layer4 (`Layer4`).
    """

    blocks: tuple[int, int, int] = (3, 4, 6)
    deep_stem: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b height width 3"]
    ) -> dict[str, Float[Array, "b h w _"]]:
        """Returns layer2 (512 channels) and layer3 (1024) of normalised images."""
        deep = ((64, 3, 2), (64, 3, 1), (128, 3, 1))
        x = images
        for i, layer in enumerate(deep if self.deep_stem else ((64, 7, 2),), start=1):
            x = nn.relu(Conv(*layer, name=f"conv{i}")(x))
        x = _max_pool(x)
        stages = {}
        for i, (width, stride, dilation) in enumerate(RESNET_LAYERS, start=1):
            for j in range(self.blocks[i - 1]):
                step = stride if j == 0 else 1
                x = Bottleneck(width, step, dilation, name=f"layer{i}_{j}")(x)
            stages[f"layer{i}"] = x
        return {name: stages[name] for name in ("layer2", "layer3")}


class Layer4(nn.Module):
    """The last stage, at stride 8 with dilation 4; frozen as all of the backbone.

    Apart from the others: prior masks send the supports' foreground alone through it.
    """

    blocks: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 1024"]) -> Float[Array, "b h w 2048"]:
        """Returns layer4 of layer3's output."""
        for j in range(self.blocks):
            x = Bottleneck(512, 1, 4, name=f"layer4_{j}")(x)
        return x


def _max_pool(x):
    """Takes 3x3 maxima at stride 2; the border counts as minus infinity.

    Rows, then columns, as maxima of three slices: on a CPU a third of the time of XLA's
    window, and run times of ONNX know no windows over channels that come last.
    """
    return _maxima(_maxima(x, axis=1), axis=2)


def _maxima(x, axis):
    last = (x.shape[axis] - 1) // 2 * 2
    border = [(int(i == axis),) * 2 for i in range(x.ndim)]
    x = jnp.pad(x, border, constant_values=-jnp.inf)
    first, middle, third = (
        jax.lax.slice_in_dim(x, start, start + last + 1, 2, axis) for start in range(3)
    )
    return jnp.maximum(jnp.maximum(first, middle), third)

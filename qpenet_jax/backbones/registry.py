"""Frozen image backbones: normalised image -> stage features on a stride-8 grid.

Batch norm in eval mode is a fixed scale and shift per channel. `weights.py` folds it
into the convolution before it, so every layer here is a plain convolution with bias.
For an image of side 8n + 1, cell (i, j) of every feature is centred on pixel (8i, 8j).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.models import ops
from qpenet_jax.models.ops.devices import on_each_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


class Bottleneck(nn.Module):
    """Residual 1x1 - 3x3 - 1x1 block with the stride on its 3x3 (torchvision's)."""

    width: int
    stride: int
    dilation: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Return `[b, ceil(h / stride), ceil(w / stride), 4 * width]`."""
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
    PSPNet and the few-shot codes built on it. QPENet does not use layer4.
    """

    blocks: tuple[int, int, int] = (3, 4, 6)
    deep_stem: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b height width 3"]
    ) -> dict[str, Float[Array, "b h w _"]]:
        """Return layer2 (512 channels) and layer3 (1024) of normalised images."""
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


def _max_pool(x):
    """Take 3x3 maxima at stride 2; the border counts as minus infinity."""
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, border)


class MBConv(nn.Module):
    """Inverted residual block (Sandler et al., CVPR 2018) with ReLU6, as in "Lite"."""

    expansion: int
    size: int
    features: int
    stride: int
    dilation: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Return `[b, ceil(h / stride), ceil(w / stride), features]`."""
        channels = x.shape[-1]
        y = x
        if self.expansion > 1:
            y = jax.nn.relu6(Conv(self.expansion * channels, name="expand")(y))
        depthwise = DepthwiseConv(
            self.size, self.stride, self.dilation, name="depthwise"
        )
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
        """Return block4 (40 channels), block10 (112) and block14 (192)."""
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


class Backbone(NamedTuple):
    """A network, the stages whose concatenation is QPENet's input, their channels.

    `mean` and `std` are the normalisation that its weights were trained with.
    """

    module: nn.Module
    stages: tuple[str, ...]
    channels: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(
        self, weights: PyTree, images: UInt8[Array, "b height width 3"]
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """Return the stages of RGB images 0..255."""
        x = normalize(images, self.mean, self.std)
        stages: Any = self.module.apply({"params": weights}, x)
        return stages


_RESNET_STAGES = ("layer3", "layer2")
# Stride 8 and all three blocks serve best here: training-free cosine segmentation of
# dog, horse and person (VOC subset, 321 pixels, 120 episodes) gives 47.5 mIoU with
# them, 47.2 with blocks 10 and 14, 42.6 with block 14 alone; 46.8 at stride 16.
_LITE0_STAGES = ("block4", "block10", "block14")
# Its weights come from TensorFlow, which maps pixels to (x - 127) / 128. With
# ImageNet's mean and deviation the same measurement (at 257 pixels) loses 3.3 points.
_LITE0_MEAN = (127 / 255, 127 / 255, 127 / 255)
_LITE0_STD = (128 / 255, 128 / 255, 128 / 255)

BACKBONES = {
    "resnet50": Backbone(ResNet((3, 4, 6)), _RESNET_STAGES, 1536),
    "resnet101": Backbone(ResNet((3, 4, 23)), _RESNET_STAGES, 1536),
    "resnet50_deepstem": Backbone(ResNet((3, 4, 6), True), _RESNET_STAGES, 1536),
    "resnet101_deepstem": Backbone(ResNet((3, 4, 23), True), _RESNET_STAGES, 1536),
    "efficientnet_lite0": Backbone(
        EfficientNetLite0(), _LITE0_STAGES, 344, _LITE0_MEAN, _LITE0_STD
    ),
}


def backbone(name: str) -> Backbone:
    """Return the backbone called `name`; another name raises InputError."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone '{name}': choose {', '.join(BACKBONES)}")
    return BACKBONES[name]


def choose_stages(net: Backbone, stages: tuple[str, ...]) -> Backbone:
    """Return a backbone of which only some stages are taken, in the given order.

    Raises:
        InputError: it has no such stage.
    """
    for name in stages:
        if name not in net.stages:
            raise InputError(f"stage {name!r}: choose among {', '.join(net.stages)}")
    image = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    made: Any = jax.eval_shape(net.module.init_with_output, jax.random.key(0), image)
    channels = sum(made[0][name].shape[-1] for name in stages)
    return net._replace(stages=stages, channels=channels)


def normalize(
    images: UInt8[Array, "*b h w 3"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Array, "*b h w 3"]:
    """Map RGB 0..255 to 0..1, then to mean 0 and deviation 1 a channel."""
    shape = (1,) * (images.ndim - 1) + (3,)
    centre, scale = (jnp.array(v).reshape(shape) for v in (mean, std))
    return (images.astype(jnp.float32) / 255 - centre) / scale


def features(
    network: str | Backbone, weights: PyTree, images: UInt8[Array, "b height width 3"]
) -> Float[Array, "b h w c"]:
    """Return the concatenated stages of RGB images; no gradient passes.

    `weights` are the parameters of the module (`weights.load_weights`, or the "params"
    of its `init`); h = ceil(height / 8), w = ceil(width / 8).
    """
    net = backbone(network) if isinstance(network, str) else network

    def together(weights, images):
        stages = net(weights, images)
        return jnp.concatenate([stages[name] for name in net.stages], axis=-1)

    def our_part(weights, images):
        # Caches hold what one image needs; eight of 473 pixels take 182 MiB, not 844.
        return jax.lax.map(lambda image: together(weights, image[None])[0], images)

    def one_by_one(weights, images):
        return on_each_device(our_part, images, shared=weights)

    if images.shape[0] == 1:
        maps = together(weights, images)
    else:
        maps = jax.lax.platform_dependent(
            weights, images, cpu=one_by_one, default=together
        )
    return jax.lax.stop_gradient(maps)

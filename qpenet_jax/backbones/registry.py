"""Frozen image backbones: normalised image -> stage features on a stride-8 grid.

For an image of side 8n + 1, cell (i, j) of every feature is centred on pixel (8i, 8j).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree, UInt8

from qpenet_jax.backbones.efficientnet import EfficientNetLite0
from qpenet_jax.backbones.resnet import Layer4, ResNet
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.types import Array
from qpenet_jax.models.ops.devices import by_platform, on_each_device, only_defaults

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(NamedTuple):
    """A network, the stages whose concatenation is QPENet's input, their channels.

    `mean` and `std` are the normalisation that its weights were trained with. `deep` is
    the stage after those, for networks that make a prior mask of it (`DEEP`).
    """

    module: nn.Module
    stages: tuple[str, ...]
    channels: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    deep: nn.Module | None = None

    # Training, evaluation and baselines of a process share one trace an image size.
    @functools.partial(jax.jit, static_argnums=0)
    def __call__(
        self, weights: PyTree, images: UInt8[Array, "b height width 3"]
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """Returns the stages of RGB images 0..255."""
        pixels = normalize(images, self.mean, self.std)
        stages: Any = self.module.apply({"params": weights}, pixels)
        return stages


DEEP = "layer4"
"""The name under which the weights hold those of the deep stage, if it is loaded."""

# Stride 8 and all three blocks serve best here: training-free cosine segmentation of
# dog, horse and person (VOC subset, 321 pixels, 120 episodes) gives 47.5 mIoU with
# them, 47.2 with blocks 10 and 14, 42.6 with block 14 alone; 46.8 at stride 16.
_LITE0_STAGES = ("block4", "block10", "block14")
# Its weights come from TensorFlow, which maps pixels to (x - 127) / 128. With
# ImageNet's mean and deviation the same measurement (at 257 pixels) loses 3.3 points.
_LITE0_MEAN = (127 / 255, 127 / 255, 127 / 255)
_LITE0_STD = (128 / 255, 128 / 255, 128 / 255)


def _resnet(blocks: tuple[int, int, int], deep_stem: bool = False) -> Backbone:
    stages = ("layer3", "layer2")
    return Backbone(ResNet(blocks, deep_stem), stages, 1536, deep=Layer4())


BACKBONES: dict[str, Backbone] = {
    "resnet50": _resnet((3, 4, 6)),
    "resnet101": _resnet((3, 4, 23)),
    "resnet50_deepstem": _resnet((3, 4, 6), deep_stem=True),
    "resnet101_deepstem": _resnet((3, 4, 23), deep_stem=True),
    "efficientnet_lite0": Backbone(
        EfficientNetLite0(), _LITE0_STAGES, 344, _LITE0_MEAN, _LITE0_STD
    ),
}
"""By name; a row of your own can be added from outside: docs/examples/add_backbone.py.
"""


def backbone(name: str) -> Backbone:
    """Returns the backbone called `name`; another name raises InputError."""
    check_choice("unknown backbone ", name, BACKBONES)
    return BACKBONES[name]


def choose_stages(net: Backbone, stages: tuple[str, ...]) -> Backbone:
    """Returns a backbone of which only some stages are taken, in the given order.

    Raises:
        InputError: it has no such stage.
    """
    for name in stages:
        if name not in net.stages:
            raise InputError(f"stage {name!r}: choose among {', '.join(net.stages)}")
    made, _ = _shapes(net)
    channels = sum(made[name].shape[-1] for name in stages)
    return net._replace(stages=stages, channels=channels)


def weight_shapes(net: Backbone, *, deep: bool) -> dict[str, PyTree]:
    """Returns the shapes of a backbone's weights; with `deep` also its deep stage's.

    Nothing is computed.
    """
    stages, params = _shapes(net)
    if not deep or net.deep is None:
        return params
    last = stages[net.stages[0]]
    with only_defaults(True):
        made = jax.eval_shape(net.deep.init, jax.random.key(0), last)
    return params | {DEEP: made["params"]}


@functools.cache
def _shapes(net: Backbone) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """Returns the shapes of the stages of a small image, and of the weights."""
    image = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    # The shapes are those of all platforms, and a third of the time is saved.
    with only_defaults(True):
        made: Any = jax.eval_shape(
            net.module.init_with_output, jax.random.key(0), image
        )
    return made[0], dict(made[1]["params"])


def deep_part(weights: PyTree[Array]) -> dict[str, PyTree[Array]]:
    """Returns the weights of the deep stage under its name, or nothing."""
    return {name: weights[name] for name in (DEEP,) if name in weights}


def with_deep(params: PyTree[Array], weights: PyTree[Array]) -> dict[str, Any]:
    """Returns a network's variables, in which its deep stage is the backbone's."""
    return {"params": {**params, **deep_part(weights)}}


def normalize(
    images: UInt8[Array, "*b h w 3"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Array, "*b h w 3"]:
    """Maps RGB 0..255 to 0..1, then to mean 0 and deviation 1 a channel."""
    shape = (1,) * (images.ndim - 1) + (3,)
    centre, scale = (jnp.array(v).reshape(shape) for v in (mean, std))
    return (images.astype(jnp.float32) / 255 - centre) / scale


def features(
    network: str | Backbone, weights: PyTree, images: UInt8[Array, "b height width 3"]
) -> Float[Array, "b h w c"]:
    """Returns the concatenated stages of RGB images; no gradient passes.

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
        return on_each_device(our_part, images, shared=(weights,))

    if images.shape[0] == 1:
        maps = together(weights, images)
    else:
        maps = by_platform(weights, images, cpu=one_by_one, default=together)
    return jax.lax.stop_gradient(maps)

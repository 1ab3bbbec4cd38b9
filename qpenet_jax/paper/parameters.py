"""How many parameters QPENet and its variants have."""

import jax
import jax.numpy as jnp

from qpenet_jax.core import markdown
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.variants import VARIANTS

RESNET50_CHANNELS = 1536
"""Of layer2 and layer3 together, which QPENet is given."""

RESNET50_TO_LAYER3 = 8_543_296
"""Its parameters, two a channel of batch norm as PyTorch counts (frozen)."""

RESNET50_LAYER4 = 14_964_736
"""What layer4 would add; the released system loads it, nothing here needs it."""


def parameter_count(model: QPENet, channels: int) -> int:
    """Returns the number of trainable parameters over features of `channels` channels.

    Only shapes are computed, no arrays.
    """
    support = jax.ShapeDtypeStruct((1, 1, 3, 3, channels), jnp.float32)
    query = jax.ShapeDtypeStruct((1, 3, 3, channels), jnp.float32)
    masks = jax.ShapeDtypeStruct((1, 1, 17, 17), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), support, masks, query)
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def parameter_table() -> str:
    """Returns a Markdown table of all variants over ResNet-50: trainable, and in all.

    It can be compared with the paper's 32.7 M without and 34.6 M with prototype
    evolution (IV.D); the paper does not say how it counts.
    """
    header = (
        "variant",
        "trainable",
        "with ResNet-50 to layer3",
        "with its layer4 too",
    )
    return markdown.table(header, map(_row, VARIANTS), numbers=True)


def _row(variant: str) -> list[str]:
    fields, _, network = VARIANTS[variant]
    model = network(**fields)
    trainable = parameter_count(model, RESNET50_CHANNELS)
    to_layer3 = trainable + RESNET50_TO_LAYER3
    to_layer4 = to_layer3 + RESNET50_LAYER4
    millions = (f"{count / 1e6:.2f} M" for count in (to_layer3, to_layer4))
    return [variant, f"{trainable:,}", *millions]

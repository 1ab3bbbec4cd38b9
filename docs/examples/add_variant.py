"""Variants of the network: rows of a table, by fields or by code of your own.

It is a config file as well: python train.py --config docs/examples/add_variant.py
"""

from qpenet_jax.config import default_config
from qpenet_jax.models.qpenet import ROLES, QPENet
from qpenet_jax.models.variants import VARIANTS, Variant


class Centred(QPENet):
    """QPENet on features from which each image's mean is taken away."""

    def encode(self, features, roles=ROLES, *, train=False):
        """Returns what QPENet does, of centred features [n, h, w, f]."""
        centred = features - features.mean((1, 2), keepdims=True)
        return super().encode(centred, roles, train=train)


VARIANTS["centred"] = Variant({}, "Features without their mean.", Centred)
VARIANTS["main_prior"] = Variant({"prototypes": ("main",), "prior": True}, "Fields.")


def get_config():
    """Returns the default config with a new row."""
    config = default_config()
    config.variant = "centred"
    return config

"""A backbone of your own: a row of a table, and a file of weights.

It is a config file as well: python train.py --config docs/examples/add_backbone.py
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from qpenet_jax.backbones.convert import save_weights
from qpenet_jax.backbones.registry import BACKBONES, Backbone
from qpenet_jax.config import default_config

WEIGHTS = Path("patches.safetensors")


class Patches(nn.Module):
    """Features of stride 8; cell (i, j) is centred on pixel (8 i, 8 j)."""

    @nn.compact
    def __call__(self, images):
        """Returns the stages of normalised images [b, 8 n + 1, 8 m + 1, 3]."""
        return {"patches": nn.relu(nn.Conv(32, (9, 9), strides=8, padding=4)(images))}


BACKBONES["patches"] = Backbone(Patches(), stages=("patches",), channels=32)


def write_weights(path=WEIGHTS):
    """Writes random weights; yours come from where the network was trained."""
    made = Patches().init(jax.random.key(0), jnp.zeros((1, 17, 17, 3)))
    save_weights(path, "patches", made["params"], source=Path(__file__))


def get_config():
    """Returns the default config with the new backbone."""
    config = default_config()
    config.backbone.name, config.backbone.weights = "patches", str(WEIGHTS)
    return config

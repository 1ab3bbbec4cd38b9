"""The real config, shrunk, over a backbone of one convolution.

For tests of the loop, of commands, folders and processes, to which it doesn't matter
what the features are. It is a config file, so processes can be given it as well.
"""

import os
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from qpenet_jax.backbones.convert import save_weights
from qpenet_jax.backbones.registry import BACKBONES, Backbone
from qpenet_jax.config import default_config

WEIGHTS = Path(tempfile.gettempdir()) / "qpenet_jax_tests_tiny.safetensors"


class OneConvolution(nn.Module):
    """Features of stride 8; cell (i, j) is centred on pixel (8 i, 8 j)."""

    @nn.compact
    def __call__(self, images):
        return {"only": nn.relu(nn.Conv(8, (9, 9), strides=8, padding=4)(images))}


BACKBONES["tiny"] = Backbone(OneConvolution(), stages=("only",), channels=8)


def write_weights(path):
    """Write random weights, the same in every process."""
    made = OneConvolution().init(jax.random.key(0), jnp.zeros((1, 17, 17, 3)))
    save_weights(path, "tiny", made["params"], source=Path(__file__))


def get_config():
    """Four steps of the quick start at 65 pixels."""
    if not WEIGHTS.exists():  # several processes may find that at once
        made = WEIGHTS.with_name(f"{os.getpid()}_{WEIGHTS.name}")
        write_weights(made)
        made.replace(WEIGHTS)
    config = default_config()
    config.backbone.name, config.backbone.weights = "tiny", str(WEIGHTS)
    config.dataset.kind, config.dataset.name = "shapes", "Shapes"
    config.dataset.side = config.side = 65
    config.dataset.train_images, config.dataset.val_images = 60, 40
    config.dataset.min_pixels, config.dataset.on_few = 64, "drop"
    config.model.channels = 8
    config.optimizer.name = "adamw"
    config.optimizer.lr, config.optimizer.lr_factor = 5e-4, 1.0
    config.batch_size, config.steps, config.workers = 2, 4, 0
    config.log_every = config.save_every = 1
    config.select_on = "last"
    config.eval.protocol = "default"
    config.eval.every, config.eval.episodes, config.eval.base_episodes = 4, 6, 8
    config.eval.references = True
    return config

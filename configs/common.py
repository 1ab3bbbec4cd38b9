"""The defaults of every config file in this folder, which change a few lines each.

All fields, their values and whose they are: `qpenet_jax/config.py`.
"""

from qpenet_jax.config import default_config as get_config
from qpenet_jax.recipes import for_coco, for_released

__all__ = ["for_coco", "for_released", "get_config"]

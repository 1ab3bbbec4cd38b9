"""QPENet, few-shot segmentation in JAX: `load(RUN)(query, supports, masks) -> mask`."""

from qpenet_jax.backbones.convert import load_backbone
from qpenet_jax.core.errors import InputError
from qpenet_jax.segmenter import Segmenter, load

__version__ = "0.1.0"
__all__ = ["InputError", "Segmenter", "load", "load_backbone"]

"""QPENet, few-shot segmentation in JAX: `load(RUN)(query, supports, masks) -> mask`."""

from qpenet_jax.errors import InputError
from qpenet_jax.segmenter import Segmenter, load
from qpenet_jax.weights import load_backbone

__version__ = "0.1.0"
__all__ = ["InputError", "Segmenter", "load", "load_backbone"]

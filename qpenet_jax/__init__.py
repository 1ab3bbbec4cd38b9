"""QPENet, few-shot segmentation in JAX: `load(RUN)(query, supports, masks) -> mask`."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpenet_jax.backbones.convert import load_backbone
    from qpenet_jax.core.errors import InputError
    from qpenet_jax.segmenter import Segmenter, load

    __version__: str

__all__ = ["InputError", "Segmenter", "__version__", "load", "load_backbone"]

# JAX takes seconds to import: a name's module is imported when the name is first used.
_MODULES = {
    "InputError": "qpenet_jax.core.errors",
    "Segmenter": "qpenet_jax.segmenter",
    "load": "qpenet_jax.segmenter",
    "load_backbone": "qpenet_jax.backbones.convert",
}


def __getattr__(name: str) -> Any:
    """Imports a public name (PEP 562); the version is that of the installed package."""
    if name == "__version__":
        return importlib.metadata.version("qpenet-jax")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Returns the public names, imported or not."""
    return sorted({*globals(), *__all__})

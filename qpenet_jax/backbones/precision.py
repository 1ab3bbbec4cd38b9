"""The dtype in which networks compute; their parameters stay float32."""

import contextlib
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from qpenet_jax.backbones.registry import Backbone
from qpenet_jax.models.ops.devices import from_ampere_on

AUTO = "auto"
"""TF32 where the device has it, as PyTorch's convolutions; else float32."""

DTYPES = ("float32", "tf32", "bfloat16")
"""float32; on NVIDIA's GPUs from Ampere on, float32 whose products round their factors
to 11 bits, as is JAX's default there; and bfloat16 throughout."""


@dataclasses.dataclass(frozen=True)
class InDtype:
    """A Flax module that computes in one of DTYPES, whatever its parameters are in.

    In bfloat16 it returns `returned`; the default is for what a loss is made of.
    """

    module: nn.Module
    dtype: str
    returned: Any = jnp.float32

    @property
    def sees_padding(self) -> bool:
        """Whether the network is given which pixels are padding."""
        return getattr(self.module, "sees_padding", False)

    def apply(self, variables: PyTree, *inputs: Any, **options: Any) -> Any:
        """Returns the result of the module's apply."""
        if self.dtype != "bfloat16":
            with products(self.dtype):
                return self.module.apply(variables, *inputs, **options)
        variables, inputs = cast((variables, inputs), jnp.bfloat16)
        found = self.module.apply(variables, *inputs, **options)
        return cast(found, self.returned)


def in_dtype(model: nn.Module, net: Backbone, dtype: str) -> tuple[Any, Any]:
    """Returns a network and its backbone as they compute in `dtype`, AUTO or of DTYPES.

    Features pass from the backbone to the network in it; the network returns float32.
    """
    return InDtype(model, resolve_dtype(dtype)), backbone_in_dtype(net, dtype)


def backbone_in_dtype(net: Backbone, dtype: str) -> Backbone:
    """Returns a backbone that computes and returns its features in `dtype`."""
    module: Any = InDtype(net.module, resolve_dtype(dtype), returned=jnp.bfloat16)
    return net._replace(module=module)


def resolve_dtype(dtype: str) -> str:
    """Returns `dtype`, or for AUTO the one of DTYPES that suits this device."""
    if dtype != AUTO:
        return dtype
    return "tf32" if from_ampere_on() else "float32"


def products(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Sets the precision of float32 products on a GPU; on a CPU it changes nothing."""
    if jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    name = "tensorfloat32" if dtype == "tf32" else "float32"
    return jax.default_matmul_precision(name)


def cast(tree: PyTree, dtype: Any) -> Any:
    """Returns a tree whose floating-point leaves have another dtype."""

    def leaf(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)

"""The convolution blocks that the paper's equations share."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jaxtyping import Float

from qpenet_jax.core.types import Array
from qpenet_jax.models import ops


def traced_once(init: Callable[..., Array]) -> Callable[..., Array]:
    """Returns an initialiser that JAX traces once a shape.

    Flax's own layers trace theirs whenever a network is applied; see `parameter`.
    """
    return jax.jit(init, static_argnums=(1, 2))


def parameter(
    module: nn.Module, name: str, init: Callable[..., Array], shape: tuple[int, ...]
) -> Array:
    """Returns a parameter of a module, or makes it: `module.param` in less time.

    Flax traces the initialiser whenever a network is applied, to compare shapes, which
    is a quarter of the time that tracing a backbone takes.

    Raises:
        ScopeParamShapeError: it has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    if value.shape != shape:
        path = "/".join(module.path)
        raise ScopeParamShapeError(name, path, value.shape, shape)
    return value


# PyTorch's default for convolutions and linear layers, U(+-1 / sqrt(fan_in)): the
# released system trains from it, and He's larger weights can collapse y_pre and y_rev.
kernel_init = traced_once(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))


@functools.cache
def bias_init(fan_in: int) -> Callable[..., Array]:
    """Returns PyTorch's initialiser of biases, U(+-1 / sqrt(fan_in))."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

    return traced_once(init)


def each_support(f: Callable[..., Any], *inputs: Any) -> Any:
    """Returns `f` of the supports [b, k, ...] of all episodes, as one batch of b k.

    The arrays that it returns are [b, k, ...] again; None among the inputs stays None.
    """
    b, k = inputs[0].shape[:2]
    folded = jax.tree.map(lambda x: x.reshape(b * k, *x.shape[2:]), inputs)
    return jax.tree.map(lambda x: x.reshape(b, k, *x.shape[1:]), f(*folded))


def linear(features: int, name: str) -> nn.Dense:
    """Returns a linear layer without bias, as the transformers of all networks have."""
    return nn.Dense(features, use_bias=False, kernel_init=kernel_init, name=name)


class ConvReLU(nn.Module):
    """1x1 or 3x3 convolution without bias, then ReLU."""

    features: int
    size: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Returns ReLU(conv(x))."""
        window = () if self.size == 1 else (self.size, self.size)
        shape = (*window, x.shape[-1], self.features)
        convolve = ops.conv1x1 if self.size == 1 else ops.conv3x3
        return nn.relu(convolve(x, parameter(self, "kernel", kernel_init, shape)))


class Residual(nn.Module):
    """Two 3x3 convolutions with ReLU, added to the input."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x + conv(conv(x))."""
        channels = x.shape[-1]
        hidden = ConvReLU(channels, 3, name="conv1")(x)
        return x + ConvReLU(channels, 3, name="conv2")(hidden)


class Head(nn.Module):
    """3x3 convolution, ReLU, channel dropout, 1x1 convolution to 2 logits."""

    dropout: float = 0.1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w 2"]:
        """Returns the logits; class 1 is what the head looks for."""
        channels = x.shape[-1]
        x = ConvReLU(channels, 3, name="conv")(x)
        x = channel_dropout(self.dropout)(x, deterministic=not train)
        return nn.Dense(
            2,
            kernel_init=kernel_init,
            bias_init=bias_init(channels),
            name="classifier",
        )(x)


class Convs(nn.Module):
    """`Convs(Concat(F, BC(P)))` of eqs 2, 4, 9 and 10: segment F by a prototype.

    The paper leaves the layers open. As in the released system: 1x1 convolution, ReLU,
    channel dropout 0.5, a residual block of two 3x3 convolutions, then the head.
    """

    REACH: ClassVar[int] = 3
    """Cells that a logit sees beside its own: one a 3x3 convolution."""

    channel_dropout: float = 0.5
    head_dropout: float = 0.1

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "b h w c"],
        prototype: Float[Array, "b c"],
        *,
        train: bool,
    ) -> Float[Array, "b h w 2"]:
        """Returns the logits; class 1 is "belongs to the prototype"."""
        merged = MergePrototype(features.shape[-1], name="merge")(features, prototype)
        x = channel_dropout(self.channel_dropout)(merged, deterministic=not train)
        x = Residual(name="residual")(x)
        return Head(self.head_dropout, name="head")(x, train=train)


class MergePrototype(nn.Module):
    """1x1 convolution and ReLU over Concat(F, BC(P)).

    The broadcast half of the product is the same for all positions, so it is computed
    once for the prototype and added: equal to the concatenation and half its cost.
    """

    features: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "b h w c"], prototype: Float[Array, "b p"]
    ) -> Float[Array, "b h w d"]:
        """Returns ReLU(conv(concat)); kernel rows: features first, prototype second."""
        c = features.shape[-1]
        rows = c + prototype.shape[-1]
        kernel = parameter(self, "kernel", kernel_init, (rows, self.features))
        constant = (prototype @ kernel[c:])[:, None, None]
        return nn.relu(ops.conv1x1(features, kernel[:c]) + constant)


def channel_dropout(rate: float, name: str | None = None) -> nn.Dropout:
    """Drops whole channels of `[b, h, w, c]` features, per image."""
    return nn.Dropout(rate, broadcast_dims=(1, 2), name=name)


RMS_EPSILON = 1e-12
"""Added to the mean square, so that features of 0 stay 0 with finite gradients."""


def unit_rms(features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Divides the features of each image by their root mean square.

    Backbones differ in the scale of their features, and so would the speed at which
    layers without batch norm learn from them. Cosines don't change.
    """
    power = jnp.mean(jnp.square(features), axis=(1, 2, 3), keepdims=True)
    return features * jax.lax.rsqrt(power + RMS_EPSILON)

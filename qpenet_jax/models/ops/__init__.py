"""The few primitives whose numerics or speed need care.

Each has one meaning everywhere. Where XLA's CPU backend runs its own operation slowly,
`by_platform` takes an equal one for the CPU, and the model files never see which path
runs. GPU and TPU take XLA's operations, and attention in blocks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from qpenet_jax.core.types import Array
from qpenet_jax.models.ops import winograd
from qpenet_jax.models.ops.blocked_attention import attend_in_blocks, true_keys_first
from qpenet_jax.models.ops.devices import (
    by_platform,
    from_ampere_on,
    on_each_device,
    only_defaults,
    rows_at_once,
)


def conv1x1(
    x: Float[Array, "*b c"], kernel: Float[Array, "c o"]
) -> Float[Array, "*b o"]:
    """Convolves with a 1x1 kernel, written as the matrix product that it is."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c o"], dilation: int = 1
) -> Float[Array, "b h w o"]:
    """Convolves with a 3x3 kernel at stride 1, padded to keep the size."""
    default = functools.partial(convolve, dilation=dilation)
    if math.prod(x.shape[:3]) < WINOGRAD_FROM_CELLS or x.shape[3] < 64:
        return default(x, kernel)
    fast = functools.partial(winograd.conv3x3, dilation=dilation)
    return by_platform(x, kernel, cpu=fast, default=default)


# In fewer cells of all images together the transforms cost what they save.
WINOGRAD_FROM_CELLS = 400


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k g o"],
    *,
    stride: int = 1,
    dilation: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Convolves groups of g channels by XLA's own operation, padded symmetrically."""
    pad = kernel.shape[0] // 2 * dilation
    return jax.lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel),
        (stride, stride),
        [(pad, pad)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c"],
    *,
    stride: int = 1,
    dilation: int = 1,
) -> Float[Array, "b h2 w2 c"]:
    """Convolves every channel with its own k x k kernel, padded symmetrically.

    On a CPU it is a sum of k * k shifted products: XLA's CPU backend runs grouped
    convolutions more than ten times slower than this.
    """
    shifted = functools.partial(_depthwise_shifted, stride=stride, dilation=dilation)
    grouped = functools.partial(convolve, stride=stride, dilation=dilation)
    return by_platform(
        x,
        kernel,
        cpu=shifted,
        default=lambda x, kernel: grouped(x, kernel[:, :, None]),
    )


def _depthwise_shifted(x, kernel, *, stride, dilation):
    k = kernel.shape[0]
    b, h, w, c = x.shape
    pad = k // 2 * dilation
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    kernel = kernel[None]

    # By lax, as JAX takes long to trace so many slices that are written as indices.
    def product(u, v):
        top, left = u * dilation, v * dilation
        start, end = (0, top, left, 0), (b, top + h, left + w, c)
        shifted = jax.lax.slice(x, start, end, (1, stride, stride, 1))
        return shifted * jax.lax.slice(kernel, (0, u, v, 0), (1, u + 1, v + 1, c))

    products = [product(u, v) for u in range(k) for v in range(k)]
    return functools.reduce(jnp.add, products)


def interpolation_matrix(source: int, target: int) -> np.ndarray:
    """Returns the `[target, source]` matrix of linear align_corners interpolation.

    The first and last samples of both grids coincide. `jax.image.resize` uses
    half-pixel centres instead, which is another map.
    """
    position = np.arange(target) * ((source - 1) / max(target - 1, 1))
    weights = 1 - np.abs(position[:, None] - np.arange(source))
    return np.maximum(weights, 0).astype(np.float32)


def resize_align_corners(
    x: Float[Array, "b h w c"], size: tuple[int, int]
) -> Float[Array, "b h2 w2 c"]:
    """Resizes bilinearly with align_corners, as two small matrix products.

    It computes at full precision: TF32 would round pixels that are only copied.
    """
    if not x.size:  # no maps; ONNX Runtime fails on products of nothing
        return jnp.zeros((x.shape[0], *size, x.shape[3]), x.dtype)
    return along_sides(interpolation_matrix, x, size)


def along_sides(
    matrix: Callable[[int, int], np.ndarray],
    x: Float[Array, "b h w c"],
    size: tuple[int, int],
) -> Float[Array, "b h2 w2 c"]:
    """Multiplies both sides by `matrix(source size, target size)`, without TF32."""
    rows, cols = (matrix(n, m) for n, m in zip(x.shape[1:3], size, strict=True))
    along_rows = jnp.einsum("yh,bhwc->bywc", rows, x, precision="highest")
    return jnp.einsum("xw,bywc->byxc", cols, along_rows, precision="highest")


def attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    mask: Bool[Array, "b k"],
) -> Float[Array, "b q n d"]:
    """Attends with n heads to the keys where `mask` is true (at least one a row).

    The scores are scaled by 1 / sqrt(d); the softmax is in float32.
    """
    in_blocks = functools.partial(on_each_device, attend_in_blocks)
    inputs = query, key, value, mask
    return by_platform(*inputs, cpu=in_blocks, default=library_attention)


def library_attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    mask: Bool[Array, "b k"],
) -> Float[Array, "b q n d"]:
    """Attends as `attention` does, by what JAX has for it on a GPU or TPU."""
    written_out = only_defaults.value
    attend: Any = _written_out if written_out else jax.nn.dot_product_attention
    if query.dtype == jnp.bfloat16 and from_ampere_on():
        # Where the true keys end is all that cuDNN needs to know; a mask it would want
        # for every pair of query and key.
        key, value, count = true_keys_first(key, value, mask)
        count = count.astype(jnp.int32)
        return attend(
            query, key, value, key_value_seq_lengths=count, implementation="cudnn"
        )
    return _in_query_blocks(
        lambda rows: attend(rows, key, value, mask=mask[:, None, None]),
        query,
        scores=query.shape[0] * query.shape[2] * key.shape[1],
    )


def _written_out(query, key, value, mask):
    """Attends as `jax.nn.dot_product_attention` does.

    jax2onnx 0.17 writes that as a softmax over all keys, then without those that the
    mask leaves out: where these are far larger, nothing is left of the others.
    """
    scores = jnp.einsum("bqnd,bknd->bnqk", query / math.sqrt(query.shape[-1]), key)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min / 2))
    return jnp.einsum("bnqk,bknd->bqnd", weights, value)


def _in_query_blocks(attend, query, scores):
    """Attends with as many queries at once as fit; each has so many `scores`.

    Queries are independent, so the result is that of all queries at once. The scores of
    a block are computed again for its gradient.
    """
    b, count, *head = query.shape
    rows = rows_at_once(count, scores)
    if rows == count:
        return attend(query)
    query = jnp.pad(query, ((0, 0), (0, -count % rows), (0, 0), (0, 0)))
    blocks = query.reshape(b, -1, rows, *head).swapaxes(0, 1)
    again = jax.checkpoint(attend, prevent_cse=False)  # nothing leaves a loop's round
    found = jax.lax.map(again, blocks).swapaxes(0, 1)
    return found.reshape(b, -1, *head)[:, :count]

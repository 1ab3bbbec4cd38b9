"""The few primitives whose numerics or speed need care.

Each has one meaning everywhere; where XLA's CPU backend runs the plain formulation
slowly, `jax.lax.platform_dependent` picks an equal one for the CPU and the model files
never see which path runs. GPU and TPU take the plain XLA ops.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

NHWC = ("NHWC", "HWIO", "NHWC")


def conv1x1(
    x: Float[Array, "*b c"], kernel: Float[Array, "c o"]
) -> Float[Array, "*b o"]:
    """Convolve with a 1x1 kernel, written as the matrix product that it is."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c o"], dilation: int = 1
) -> Float[Array, "b h w o"]:
    """Convolve with a 3x3 kernel at stride 1, padded to keep the size."""
    plain = functools.partial(_conv3x3_plain, dilation=dilation)
    if x.shape[1] * x.shape[2] < WINOGRAD_FROM_CELLS or x.shape[3] < 64:
        return plain(x, kernel)
    fast = functools.partial(_conv3x3_winograd, dilation=dilation)
    return jax.lax.platform_dependent(x, kernel, cpu=fast, default=plain)


# Below about 30 x 30 cells the transforms cost what they save, and a train step of
# transformed convolutions compiles four times longer (29 s against 7 s).
WINOGRAD_FROM_CELLS = 900


def _conv3x3_plain(x, kernel, dilation):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        [(dilation, dilation)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=NHWC,
    )


def _conv3x3_winograd(x, kernel, dilation):
    """Convolve in float32: sums of 36 products would lose bfloat16's few bits."""
    f32 = x.astype(jnp.float32), kernel.astype(jnp.float32)
    y = _winograd(*f32) if dilation == 1 else _winograd_dilated(*f32, dilation)
    return y.astype(x.dtype)


def _winograd_matrices(points):
    """Return (A^T, G, B^T) of Winograd's F(4x4, 3x3) for five points and infinity.

    Winograd's minimal filtering (Lavin and Gray, CVPR 2016) computes a 4x4 patch of
    output with 36 products a channel pair instead of 144: Y = A^T [(G g) * (B^T d)]
    on both axes, by Toom-Cook interpolation at the points.
    """
    a = np.asarray(points)
    output, filters, inputs = np.zeros((4, 6)), np.zeros((6, 3)), np.zeros((6, 6))
    for j in range(5):
        others = np.delete(a, j)
        output[:, j] = a[j] ** np.arange(4)
        filters[j] = a[j] ** np.arange(3) / np.prod(a[j] - others)
        inputs[j, :5] = np.polynomial.polynomial.polyfromroots(others)
    output[3, 5] = filters[5, 2] = 1
    inputs[5] = np.polynomial.polynomial.polyfromroots(a)
    return output, filters, inputs


# The usual points 0, +-1, +-2 lose four times more accuracy than these, which are as
# exact in binary: 2.7e-6 of the largest output in float32 for 256 channels.
_AT, _G, _BT = _winograd_matrices((0, 5 / 8, -5 / 8, 3 / 2, -3 / 2))
_GG = np.kron(_G, _G).astype(np.float32)  # [36, 9]: both axes of a filter at once


@jax.custom_vjp
def _winograd(x, kernel):
    return _winograd_output(_products(_winograd_input(x), _filters(kernel)), x.shape)


def _winograd_fwd(x, kernel):
    return _winograd(x, kernel), (x, kernel)


def _winograd_bwd(residuals, dy):
    x, kernel = residuals
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = _winograd(dy, flipped)
    tiles = zip(_winograd_input(x), _winograd_output_transposed(dy), strict=True)
    d_filters = jnp.stack([v.T @ m for v, m in tiles])
    d_kernel = jnp.einsum("ft,fco->tco", _GG, d_filters).reshape(kernel.shape)
    return dx, d_kernel


_winograd.defvjp(_winograd_fwd, _winograd_bwd)


def _winograd_dilated(x, kernel, dilation):
    """Convolve each phase of the grid (every `dilation`-th row, column) on its own."""
    b, h, w, c = x.shape
    d = dilation
    x = jnp.pad(x, ((0, 0), (0, -h % d), (0, -w % d), (0, 0)))
    rows, cols = x.shape[1] // d, x.shape[2] // d
    x = x.reshape(b, rows, d, cols, d, c).transpose(2, 4, 0, 1, 3, 5)
    y = _winograd(x.reshape(-1, rows, cols, c), kernel)
    y = y.reshape(d, d, b, rows, cols, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(b, rows * d, cols * d, -1)[:, :h, :w]


def _filters(kernel):
    c, o = kernel.shape[2:]
    return (_GG @ kernel.reshape(9, c * o)).reshape(36, c, o)


def _products(inputs, filters):
    return [v @ filters[k] for k, v in enumerate(inputs)]


def _winograd_input(x):
    """Return the 36 transformed 6x6 tiles, each `[b * tiles, c]`."""
    h, w, c = x.shape[1:]
    th, tw = -(-h // 4), -(-w // 4)
    x = jnp.pad(x, ((0, 0), (1, 4 * th + 1 - h), (1, 4 * tw + 1 - w), (0, 0)))
    rows = _combine(_BT, [x[:, u : u + 4 * th - 3 : 4] for u in range(6)])
    tiles = []
    for row in rows:
        columns = [row[:, :, v : v + 4 * tw - 3 : 4] for v in range(6)]
        tiles += [t.reshape(-1, c) for t in _combine(_BT, columns)]
    return tiles


def _winograd_output(products, shape):
    b, h, w, _ = shape
    th, tw = -(-h // 4), -(-w // 4)
    products = [p.reshape(b, th, tw, -1) for p in products]
    rows = [_combine(_AT, products[6 * u : 6 * u + 6]) for u in range(6)]
    columns = [_combine(_AT, [row[v] for row in rows]) for v in range(4)]
    # columns[v][u]: output pixel (u, v) of every tile
    y = jnp.stack([jnp.stack(c, axis=2) for c in columns], axis=4)
    return y.reshape(b, 4 * th, 4 * tw, -1)[:, :h, :w]


def _winograd_output_transposed(dy):
    """Return the 36 cotangents of the tile products, each `[b * tiles, o]`."""
    h, w, o = dy.shape[1:]
    th, tw = -(-h // 4), -(-w // 4)
    dy = jnp.pad(dy, ((0, 0), (0, 4 * th - h), (0, 4 * tw - w), (0, 0)))
    rows = _combine(_AT.T, [dy[:, u::4] for u in range(4)])
    tiles = []
    for row in rows:
        columns = [row[:, :, v::4] for v in range(4)]
        tiles += [t.reshape(-1, o) for t in _combine(_AT.T, columns)]
    return tiles


def _combine(matrix, terms):
    """Return `matrix @ terms` for a constant matrix, without its zeros."""

    def combination(row):
        chosen = [float(m) * t for m, t in zip(row, terms, strict=True) if m != 0]
        return functools.reduce(jnp.add, chosen)

    return [combination(row) for row in matrix]


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c"],
    *,
    stride: int = 1,
    dilation: int = 1,
) -> Float[Array, "b h2 w2 c"]:
    """Convolve every channel with its own k x k kernel, padded symmetrically.

    A sum of k * k shifted products: XLA's CPU backend runs grouped convolutions more
    than ten times slower than this.
    """
    shifted = functools.partial(_depthwise_shifted, stride=stride, dilation=dilation)
    plain = functools.partial(_depthwise_plain, stride=stride, dilation=dilation)
    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=plain)


def _depthwise_shifted(x, kernel, *, stride, dilation):
    k = kernel.shape[0]
    h, w = x.shape[1:3]
    pad = k // 2 * dilation
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def product(u, v):
        top, left = u * dilation, v * dilation
        return x[:, top : top + h : stride, left : left + w : stride] * kernel[u, v]

    products = [product(u, v) for u in range(k) for v in range(k)]
    return functools.reduce(jnp.add, products)


def _depthwise_plain(x, kernel, *, stride, dilation):
    pad = kernel.shape[0] // 2 * dilation
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        [(pad, pad)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=NHWC,
        feature_group_count=x.shape[-1],
    )


def interpolation_matrix(source: int, target: int) -> np.ndarray:
    """Return the `[target, source]` matrix of linear align_corners interpolation.

    The first and last samples of both grids coincide. `jax.image.resize` uses
    half-pixel centres instead, which is another map.
    """
    position = np.arange(target) * ((source - 1) / max(target - 1, 1))
    weights = 1 - np.abs(position[:, None] - np.arange(source))
    return np.maximum(weights, 0).astype(np.float32)


def resize_align_corners(
    x: Float[Array, "b h w c"], size: tuple[int, int]
) -> Float[Array, "b h2 w2 c"]:
    """Resize bilinearly with align_corners, as two small matrix products.

    At full precision: TF32 would round the pixels that interpolation only copies.
    """
    rows = interpolation_matrix(x.shape[1], size[0])
    cols = interpolation_matrix(x.shape[2], size[1])
    along_rows = jnp.einsum("yh,bhwc->bywc", rows, x, precision="highest")
    return jnp.einsum("xw,bywc->byxc", cols, along_rows, precision="highest")


def attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    mask: Bool[Array, "b k"],
) -> Float[Array, "b q n d"]:
    """Attend with n heads to the keys where `mask` is true (at least one a row).

    Scores scaled by 1 / sqrt(d), softmax in float32.
    """
    return jax.lax.platform_dependent(
        query, key, value, mask, cpu=_attention_gathered, default=_attention_plain
    )


def _attention_plain(query, key, value, mask):
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])


def _attention_gathered(query, key, value, mask):
    """Attend to the true keys only, one head at a time.

    The true keys are moved to the front and the rest is cut off at the smallest of
    three static budgets that drops none of them, so the result is exact. At 473 pixels
    all heads' scores at once would be 3600 x 3600 x 8 floats an image.
    """
    total = mask.shape[1]
    budgets = [-(-total // 4), -(-total // 2), total]
    order = jnp.argsort(~mask, axis=1, stable=True)

    def attend(budget, query, key, value, mask):
        take = functools.partial(jnp.take_along_axis, axis=1)
        front = order[:, :budget]
        key, value = (take(t, front[:, :, None, None]) for t in (key, value))
        return _attention_by_head(query, key, value, take(mask, front))

    most = mask.sum(axis=1).max()
    smallest = sum(most > budget for budget in budgets[:-1])
    branches = [functools.partial(attend, budget) for budget in budgets]
    return jax.lax.switch(smallest, branches, query, key, value, mask)


def _attention_by_head(query, key, value, mask):
    bias = jnp.where(mask, 0.0, -1e9)[:, None, :]

    @jax.checkpoint  # scores are made again for the gradient, not kept
    def one_head(qkv):
        q, k, v = qkv
        scores = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]) + bias)
        return jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v)

    heads = tuple(jnp.moveaxis(t, 2, 0) for t in (query, key, value))
    return jnp.moveaxis(jax.lax.map(one_head, heads), 0, 2)

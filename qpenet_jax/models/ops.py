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


# Below about 30 x 30 cells the transforms cost what they save.
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
    """Return (A, G, B) of Winograd's F(4x4, 3x3) for five points and infinity.

    Winograd's minimal filtering (Lavin and Gray, CVPR 2016) computes a 4x4 patch of
    output with 36 products a channel pair instead of 144: Y = A [(G g) * (B d)], by
    Toom-Cook interpolation at the points. g, d and Y are the filter, the 6x6 patch of
    input and the patch of output as vectors; both axes are transformed at once.
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
    return (np.kron(m, m).astype(np.float32) for m in (output, filters, inputs))


# The usual points 0, +-1, +-2 lose four times more accuracy than these, which are as
# exact in binary: 2.7e-6 of the largest output in float32 for 256 channels.
_A, _G, _B = _winograd_matrices((0, 5 / 8, -5 / 8, 3 / 2, -3 / 2))


@jax.custom_vjp
def _winograd(x, kernel):
    b, h, w, _ = x.shape
    th, tw, o = -(-h // 4), -(-w // 4), kernel.shape[3]
    products = _batched(_winograd_input(x), _winograd_filters(kernel), 2, 1)
    y = (_A @ products.reshape(36, -1)).reshape(4, 4, b, th, tw, o)
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(b, 4 * th, 4 * tw, o)
    return y[:, :h, :w]


def _winograd_fwd(x, kernel):
    return _winograd(x, kernel), (x, kernel)


def _winograd_bwd(residuals, dy):
    x, kernel = residuals
    dx = _winograd(dy, kernel[::-1, ::-1].swapaxes(2, 3))
    d_filters = _batched(_winograd_input(x), _winograd_output_transposed(dy), 1, 1)
    return dx, (_G.T @ d_filters.reshape(36, -1)).reshape(kernel.shape)


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


def _winograd_filters(kernel):
    """Return the transformed filters `[36, c, o]`."""
    return (_G @ kernel.reshape(9, -1)).reshape(36, *kernel.shape[2:])


def _winograd_input(x):
    """Return the transformed 6x6 tiles `[36, b * tiles, c]`."""
    h, w, c = x.shape[1:]
    th, tw = -(-h // 4), -(-w // 4)
    x = jnp.pad(x, ((0, 0), (1, 4 * th + 1 - h), (1, 4 * tw + 1 - w), (0, 0)))
    rows = jnp.stack([x[:, u : u + 4 * th - 3 : 4] for u in range(6)])
    columns = [rows[:, :, :, v : v + 4 * tw - 3 : 4] for v in range(6)]
    return (_B @ jnp.stack(columns, axis=1).reshape(36, -1)).reshape(36, -1, c)


def _winograd_output_transposed(dy):
    """Return the cotangents of the tiles' products `[36, b * tiles, o]`."""
    b, h, w, o = dy.shape
    th, tw = -(-h // 4), -(-w // 4)
    dy = jnp.pad(dy, ((0, 0), (0, 4 * th - h), (0, 4 * tw - w), (0, 0)))
    dy = dy.reshape(b, th, 4, tw, 4, o).transpose(2, 4, 0, 1, 3, 5)
    return (_A.T @ dy.reshape(16, -1)).reshape(36, -1, o)


def _batched(a, b, axis_a, axis_b):
    """Return the products of all `a[i]` and `b[i]` over these axes."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0,), (0,))))


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
        query, key, value, mask, cpu=_attention_blocked, default=_attention_plain
    )


def _attention_plain(query, key, value, mask):
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])


KEY_BLOCK = 450
"""Keys whose scores are held at once: 450 of 3600 queries' are 6 MiB, cache's size."""


def _attention_blocked(query, key, value, mask):
    """Attend to the true keys only, in float32.

    They are moved to the front, and those of one image and head are looked at block by
    block, as many as hold true ones: exact, at the cost of the true keys.
    """
    b, _, heads, d = query.shape
    order = jnp.argsort(~mask, axis=1, stable=True)
    block = min(KEY_BLOCK, mask.shape[1])
    padding = ((0, 0), (0, -mask.shape[1] % block), (0, 0), (0, 0))

    def front(t):
        return jnp.pad(jnp.take_along_axis(t, order[..., None, None], axis=1), padding)

    def by_head(t):
        return t.astype(jnp.float32).swapaxes(1, 2).reshape(b * heads, -1, d)

    inputs = query / math.sqrt(d), front(key), front(value)
    count = jnp.repeat(mask.sum(axis=1), heads)
    out = _attend(block, *map(by_head, inputs), count)
    return out.reshape(b, heads, -1, d).swapaxes(1, 2).astype(query.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block, query, key, value, count):
    """Attend with `[n, q, d]` queries to the first `count[n]` of the `[n, k, d]` keys.

    Softmax is gathered up over the blocks and its scores are made again for the
    gradient, as in FlashAttention (Dao et al., NeurIPS 2022).
    """
    return _attend_fwd(block, query, key, value, count)[0]


def _attend_fwd(block, query, key, value, count):
    def one_head(inputs):
        q, k, v, count = inputs

        def step(i, carry):
            total, largest, weight = carry
            scores = _scores(block, i, q, k, count)
            new = jnp.maximum(largest, scores.max(axis=1))
            exp, shrink = jnp.exp(scores - new[:, None]), jnp.exp(largest - new)
            total = total * shrink[:, None] + exp @ _block(block, i, v)
            return total, new, weight * shrink + exp.sum(axis=1)

        zeros = jnp.zeros_like(q[:, 0])
        start = jnp.zeros_like(q), zeros + MASKED, zeros
        blocks = -(-count // block)
        total, largest, weight = jax.lax.fori_loop(0, blocks, step, start)
        return total / weight[:, None], largest + jnp.log(weight)

    inputs = query, key, value, count
    out, log_weight = jax.lax.map(one_head, inputs)
    return out, (*inputs, out, log_weight)


def _attend_bwd(block, residuals, d_out):
    def one_head(inputs):
        q, k, v, count, out, log_weight, d_out = inputs
        mean = (out * d_out).sum(axis=1)

        def step(i, gradients):
            dq, dk, dv = gradients
            exp = jnp.exp(_scores(block, i, q, k, count) - log_weight[:, None])
            d_scores = exp * (d_out @ _block(block, i, v).T - mean[:, None])
            dq = dq + d_scores @ _block(block, i, k)
            put = jax.lax.dynamic_update_slice_in_dim
            dk = put(dk, d_scores.T @ q, i * block, axis=0)
            return dq, dk, put(dv, exp.T @ d_out, i * block, axis=0)

        start = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
        return jax.lax.fori_loop(0, -(-count // block), step, start)

    return *jax.lax.map(one_head, (*residuals, d_out)), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _scores(block, i, query, key, count):
    beyond = i * block + jnp.arange(block) >= count
    return query @ _block(block, i, key).T + jnp.where(beyond, MASKED, 0.0)


def _block(block, i, rows):
    return jax.lax.dynamic_slice_in_dim(rows, i * block, block)


MASKED = -1e9
"""Score of a position that takes no part."""

"""3x3 convolutions by Winograd's minimal filtering, for XLA's CPU backend.

F(4x4, 3x3) of Lavin and Gray (CVPR 2016) computes a 4x4 patch of output with 36
products a channel pair instead of 144: Y = A [(G g) * (B d)], where g, d and Y are the
filter, the 6x6 patch of input and the patch of output as vectors. All three transforms
are written as the matrix products that they are, over all patches and channels at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpenet_jax.core.types import Array


def conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c o"], dilation: int = 1
) -> Float[Array, "b h w o"]:
    """Convolves at stride 1, padded to keep the size, in float32 whatever the inputs.

    Sums of 36 products would lose the few bits of bfloat16. At 256 channels the largest
    error is 3.6e-6 of the largest output, 4.7e-6 of the largest gradient of x and
    2.1e-6 of the kernel's, against float64; of plain convolutions 0.6, 0.7 and 3.2e-6.
    """
    f32 = x.astype(jnp.float32), kernel.astype(jnp.float32)
    y = _conv3x3(*f32) if dilation == 1 else _conv3x3_dilated(*f32, dilation)
    return y.astype(x.dtype)


def _matrices(points):
    """Returns A, G and B for five points of Toom-Cook interpolation and infinity."""
    a = np.asarray(points)
    output, filters, inputs = np.zeros((4, 6)), np.zeros((6, 3)), np.zeros((6, 6))
    for j in range(5):
        others = np.delete(a, j)
        output[:, j] = a[j] ** np.arange(4)
        filters[j] = a[j] ** np.arange(3) / np.prod(a[j] - others)
        inputs[j, :5] = np.polynomial.polynomial.polyfromroots(others)
    output[3, 5] = filters[5, 2] = 1
    inputs[5] = np.polynomial.polynomial.polyfromroots(a)
    # These are for one axis; their Kronecker products are for both.
    return [np.kron(m, m).astype(np.float32) for m in (output, filters, inputs)]


# The usual points 0, +-1, +-2 lose four times more accuracy than these, which are as
# exact in binary.
_A, _G, _B = _matrices((0, 5 / 8, -5 / 8, 3 / 2, -3 / 2))


@jax.custom_vjp
def _conv3x3(x, kernel):
    b, h, w, _ = x.shape
    th, tw, o = -(-h // 4), -(-w // 4), kernel.shape[3]
    filters = (_G @ kernel.reshape(9, -1)).reshape(36, *kernel.shape[2:])
    products = _batched(_input_tiles(x), filters, 2, 1)
    y = (_A @ products.reshape(36, -1)).reshape(4, 4, b, th, tw, o)
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(b, 4 * th, 4 * tw, o)
    return y[:, :h, :w]


def _conv3x3_fwd(x, kernel):
    return _conv3x3(x, kernel), (x, kernel)


def _conv3x3_bwd(residuals, dy):
    x, kernel = residuals
    dx = _conv3x3(dy, kernel[::-1, ::-1].swapaxes(2, 3))
    tiles = _input_tiles(_after(dy, x))
    d_filters = _batched(tiles, _output_transposed(dy), 1, 1)
    return dx, (_G.T @ d_filters.reshape(36, -1)).reshape(kernel.shape)


_conv3x3.defvjp(_conv3x3_fwd, _conv3x3_bwd)


def _conv3x3_dilated(x, kernel, dilation):
    """Convolves each phase of the grid (every `dilation`-th row, column) on its own."""
    b, h, w, c = x.shape
    d = dilation
    x = jnp.pad(x, ((0, 0), (0, -h % d), (0, -w % d), (0, 0)))
    rows, cols = x.shape[1] // d, x.shape[2] // d
    x = x.reshape(b, rows, d, cols, d, c).transpose(2, 4, 0, 1, 3, 5)
    y = _conv3x3(x.reshape(-1, rows, cols, c), kernel)
    y = y.reshape(d, d, b, rows, cols, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(b, rows * d, cols * d, -1)[:, :h, :w]


def _input_tiles(x):
    """Returns the transformed 6x6 tiles `[36, b * tiles, c]`."""
    h, w, c = x.shape[1:]
    th, tw = -(-h // 4), -(-w // 4)
    x = jnp.pad(x, ((0, 0), (1, 4 * th + 1 - h), (1, 4 * tw + 1 - w), (0, 0)))
    tiles = _overlapping(_overlapping(x, 1, 0), 3, 1)
    return (_B @ tiles.reshape(36, -1)).reshape(36, -1, c)


def _overlapping(x, axis, new_axis):
    """Cuts an axis into pieces of 6, one every 4; `new_axis` counts within a piece."""
    last = x.shape[axis] - 6
    pieces = [jax.lax.slice_in_dim(x, u, last + u + 1, 4, axis) for u in range(6)]
    return jnp.stack(pieces, new_axis)


def _output_transposed(dy):
    """Returns the cotangents of the tiles' products `[36, b * tiles, o]`."""
    b, h, w, o = dy.shape
    th, tw = -(-h // 4), -(-w // 4)
    dy = jnp.pad(dy, ((0, 0), (0, 4 * th - h), (0, 4 * tw - w), (0, 0)))
    dy = dy.reshape(b, th, 4, tw, 4, o).transpose(2, 4, 0, 1, 3, 5)
    return (_A.T @ dy.reshape(16, -1)).reshape(36, -1, o)


def _batched(a, b, axis_a, axis_b):
    """Returns the products of all `a[i]` and `b[i]` over these axes."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0,), (0,))))


def _after(gradient, x):
    """Returns x in a form that makes XLA believe that it depends on the gradient.

    Then XLA doesn't compute the backward pass's results of x long before they are
    needed; its CPU backend ignores `optimization_barrier` for this.
    """
    return jnp.where(jnp.isnan(gradient.ravel()[0]), jnp.nan, x)

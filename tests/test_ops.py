"""The fast CPU formulations against XLA's plain ones, and resizing against hand values.

Values and gradients, at sizes where the fast paths have remainders to pad.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpenet_jax.models import ops
from qpenet_jax.models.ops import blocked_attention as attention
from qpenet_jax.models.ops import devices, winograd


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def value_and_gradients(function, cotangent, *args):
    """Return the output of `function` and its pull-back of `cotangent`."""

    @jax.jit
    def run(cotangent, *args):
        output, pull_back = jax.vjp(function, *args)
        return output, *pull_back(cotangent)

    return run(cotangent, *args)


def assert_equal(results, references, tolerance=1e-5):
    """Compare in units of each reference's largest entry."""
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        error = np.abs(np.asarray(result) - np.asarray(reference)).max()
        assert error <= tolerance * np.abs(np.asarray(reference)).max()


def plain(x, kernel, *, stride=1, dilation=1):
    """XLA's own convolution, spelled out here once more as the reference."""
    pad = dilation * (kernel.shape[0] // 2)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


@pytest.mark.parametrize(
    ("function", "size", "dilation"),
    [
        (ops.conv3x3, (31, 30), 1),
        (winograd.conv3x3, (11, 7), 2),
        (winograd.conv3x3, (10, 5), 4),
    ],
)
def test_winograd_equals_convolution(function, size, dilation):
    """Dilation 1 through the room's function, on a grid that takes the fast path."""
    x, kernel = normal(2, *size, 64), normal(3, 3, 64, 8, seed=1)
    cotangent = normal(2, *size, 8, seed=2)
    fast, slow = (
        value_and_gradients(
            functools.partial(f, dilation=dilation), cotangent, x, kernel
        )
        for f in (function, plain)
    )
    assert_equal(fast, slow)


@pytest.mark.parametrize("dilation", [1, 2])
def test_conv3x3_in_bfloat16(dilation):
    """As exact as its inputs and output, and both branches have one type."""
    x, kernel = normal(1, 30, 31, 64), normal(3, 3, 64, 8, seed=1)
    cotangent = normal(1, 30, 31, 8, seed=2)
    half = [a.astype(jnp.bfloat16) for a in (cotangent, x, kernel)]
    fast = functools.partial(ops.conv3x3, dilation=dilation)
    results = value_and_gradients(fast, *half)
    assert {r.dtype for r in results} == {jnp.dtype(jnp.bfloat16)}
    exact = value_and_gradients(
        functools.partial(plain, dilation=dilation),
        *(a.astype(jnp.float32) for a in half),
    )
    assert_equal([r.astype(jnp.float32) for r in results], exact, tolerance=2**-8)


@pytest.mark.parametrize(
    ("images", "side", "channels", "transformed"),
    [
        *[(1, 19, 64, False), (1, 20, 64, True), (4, 9, 64, False), (4, 10, 64, True)],
        (1, 40, 3, False),
    ],
)
def test_conv3x3_is_transformed_from_400_cells_on(images, side, channels, transformed):
    """On a CPU; few channels are not."""
    x = jnp.zeros((images, side, side, channels))
    kernel = jnp.zeros((3, 3, channels, 2))
    traced = str(jax.make_jaxpr(ops.conv3x3)(x, kernel))
    assert ("platform_index" in traced) == transformed
    assert traced.count("conv_general_dilated[") == 1


@pytest.mark.parametrize(
    ("size", "stride", "dilation", "height", "width"),
    [(3, 2, 1, 9, 8), (5, 1, 2, 9, 7), (3, 1, 4, 7, 10)],
)
def test_depthwise_equals_grouped_convolution(size, stride, dilation, height, width):
    x, kernel = normal(2, height, width, 6), normal(size, size, 6, seed=1)
    options = {"stride": stride, "dilation": dilation}
    cotangent = normal(2, -(-height // stride), -(-width // stride), 6, seed=2)
    assert_equal(
        value_and_gradients(
            functools.partial(ops.depthwise_conv, **options), cotangent, x, kernel
        ),
        value_and_gradients(
            lambda x, kernel: plain(x, kernel[:, :, None], **options),
            cotangent,
            x,
            kernel,
        ),
    )


def test_resize_keeps_samples_and_is_linear_between():
    x = normal(2, 7, 6, 3)
    np.testing.assert_array_equal(ops.resize_align_corners(x, (7, 6)), x)
    mask = (normal(1, 473, 473, 1) > 0.3).astype(np.float32)
    small = ops.resize_align_corners(mask, (60, 60))
    np.testing.assert_allclose(small, mask[:, ::8, ::8], atol=1e-5)
    x = normal(1, 60, 60, 1)
    large = np.asarray(ops.resize_align_corners(x, (473, 473)))
    np.testing.assert_allclose(large[:, ::8, ::8], x, atol=1e-4)
    middle = (x[:, :-1, :-1] + x[:, 1:, :-1] + x[:, :-1, 1:] + x[:, 1:, 1:]) / 4
    np.testing.assert_allclose(large[:, 4::8, 4::8], middle, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "target"), [(60, 473), (473, 60), (1, 4), (5, 1), (5, 2), (33, 500)]
)
def test_interpolation_weights(source, target):
    matrix = ops.interpolation_matrix(source, target)
    assert matrix.shape == (target, source)
    assert (matrix >= 0).all()
    assert (np.count_nonzero(matrix > 1e-6, axis=1) <= 2).all()
    if target <= source or source == 1:
        position = np.linspace(0, source - 1, target) if target > 1 else [0]
    else:
        position = np.arange(target) * (source - 1) / (target - 1)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(matrix @ np.arange(source), position, atol=1e-3)


KEYS = 12
MASKS = {
    "one key": [1] + [0] * 11,
    "a quarter, at the end": [0] * 9 + [1] * 3,
    "four scattered": [0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1],
    "half": [0, 1] * 6,
    "seven": [1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1],
    "all": [1] * 12,
}


def with_gradients(attend):
    def run(query, key, value, mask, cotangent):
        partial = functools.partial(attend, mask=mask)
        output, pull_back = jax.vjp(partial, query, key, value)
        return output, *pull_back(cotangent)

    return run


def drawn(mask):
    """Query, key, value, mask and cotangent of two images and two heads."""
    query, key, value, cotangent = (
        normal(2, n, 2, 4, seed=i) for i, n in enumerate((5, KEYS, KEYS, 5))
    )
    return query, key, value, np.array(mask, bool), cotangent


@pytest.fixture(scope="module", params=[3, 5, 450])
def attentions(request):
    """The public attention and the library's, each with its pull-back.

    12 keys are four blocks, or three with a remainder, or one.
    """

    def library(query, key, value, mask):
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None, None, :]
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KEY_BLOCK", request.param)
        yield jax.jit(with_gradients(ops.attention)), jax.jit(with_gradients(library))


@pytest.mark.standard_promotion
def test_attention_of_bfloat16_is_as_exact_as_its_inputs(attentions):
    """Scores and softmax are in float32, whose result is rounded once."""

    def cast(arrays, dtype):
        return [a if a.dtype == bool else a.astype(dtype) for a in arrays]

    half = cast(drawn([MASKS["seven"]] * 2), jnp.bfloat16)
    results = attentions[0](*half)
    assert {r.dtype for r in results} == {jnp.dtype(jnp.bfloat16)}
    exact = attentions[1](*cast(half, jnp.float32))
    assert_equal([r.astype(jnp.float32) for r in results], exact, tolerance=2**-8)


@pytest.mark.parametrize("name", MASKS)
def test_attention_at_every_number_of_true_keys(attentions, name):
    mine, library = attentions
    one = [0] * 7 + [1] + [0] * 4  # the second row's count differs from the first's
    args = drawn([MASKS[name], one])
    # One row has a single key: its query and key gradients are 0 up to rounding.
    for result, reference in zip(mine(*args), library(*args), strict=True):
        np.testing.assert_allclose(result, reference, atol=3e-6)


@pytest.mark.parametrize(("rows", "at_once"), [(2, 2 * 2 * 2 * KEYS), (1, 1)])
def test_attention_off_the_cpu_is_the_same_in_blocks(rows, at_once, monkeypatch):
    """Five queries in blocks of `rows`, with a remainder; the plain one at once."""

    attend = with_gradients(ops.library_attention)
    args = drawn([MASKS["seven"], MASKS["one key"]])

    def loops():
        return str(jax.make_jaxpr(lambda *args: attend(*args))(*args)).count("scan[")

    at_once_all = attend(*args)
    assert loops() == 0
    monkeypatch.setattr(devices, "AT_ONCE", at_once)
    assert devices.rows_at_once(5, 2 * 2 * KEYS) == rows
    assert loops() == 2, "one there, one back"
    for result, reference in zip(attend(*args), at_once_all, strict=True):
        np.testing.assert_allclose(result, reference, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "row_size", "rows"),
    [(3600, 1, 3600), (3600, 4 * 8 * 3600, 515), (8, 3600 * 3000, 4), (5, 2**27, 1)],
)
def test_rounds_are_even_and_as_large_as_may_be(count, row_size, rows):
    """The last but one: 6 rows would fit, and leave 2 for another round."""
    assert devices.rows_at_once(count, row_size) == rows


def test_attention_to_one_key_returns_its_value_and_masked_keys_get_nothing(attentions):
    query, key, value, mask, cotangent = drawn(np.arange(KEYS)[None] == [[4], [4]])
    output, _, _, d_value = attentions[0](query, key, value, mask, cotangent)
    np.testing.assert_allclose(output, np.repeat(value[:, 4:5], 5, axis=1), rtol=1e-6)
    np.testing.assert_allclose(d_value[:, 4], cotangent.sum(axis=1), rtol=1e-5)
    assert not np.delete(np.asarray(d_value), 4, axis=1).any()


@pytest.mark.parametrize("at_once", [1, 3, 4, 8])
def test_rows_at_once_are_the_same_rows(at_once):
    x = normal(8, 5)
    with devices.only_defaults(True):
        found = devices.row_by_row(
            lambda row: row @ row * row, x, at_once=at_once, cpu=lambda row: 0 * row
        )
    np.testing.assert_allclose(found, (x * x).sum(1, keepdims=True) * x, rtol=1e-5)

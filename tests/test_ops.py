"""The fast CPU formulations against XLA's plain ones, and resizing against hand values.

Values and gradients, at sizes where the fast paths have remainders to pad.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import normal, resize

from qpenet_jax.models import ops
from qpenet_jax.models.ops import blocked_attention as attention
from qpenet_jax.models.ops import devices, winograd


def with_gradients(function):
    """Return `function` with its pull-back of a cotangent, the first argument."""

    def run(cotangent, *args, **options):
        output, pull_back = jax.vjp(functools.partial(function, **options), *args)
        return output, *pull_back(cotangent)

    return run


def value_and_gradients(function, *args):
    return jax.jit(with_gradients(function))(*args)


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


def grouped(x, kernel, **options):
    return plain(x, kernel[:, :, None], **options)


@pytest.mark.parametrize(
    ("function", "reference", "image", "kernel", "options"),
    [
        (ops.conv3x3, plain, (31, 30, 64), (3, 3, 64, 8), {}),
        (winograd.conv3x3, plain, (11, 7, 64), (3, 3, 64, 8), {"dilation": 2}),
        (winograd.conv3x3, plain, (10, 5, 64), (3, 3, 64, 8), {"dilation": 4}),
        (ops.depthwise_conv, grouped, (9, 8, 6), (3, 3, 6), {"stride": 2}),
        (ops.depthwise_conv, grouped, (9, 7, 6), (5, 5, 6), {"dilation": 2}),
        (ops.depthwise_conv, grouped, (7, 10, 6), (3, 3, 6), {"dilation": 4}),
    ],
)
def test_convolutions_are_xlas(function, reference, image, kernel, options):
    """Dilation 1 through the room's function, on a grid that takes the fast path."""
    x, kernel = normal(2, *image), normal(*kernel, seed=1)
    fast, slow = (functools.partial(f, **options) for f in (function, reference))
    cotangent = normal(*jax.eval_shape(slow, x, kernel).shape, seed=2)
    assert_equal(
        value_and_gradients(fast, cotangent, x, kernel),
        value_and_gradients(slow, cotangent, x, kernel),
    )


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
    ("source", "target"),
    [(7, 7), (60, 473), (473, 60), (1, 4), (5, 1), (5, 2), (33, 500)],
)
def test_resize_is_linear_between_aligned_corners(source, target):
    """More columns than rows of a side: that fixes every weight of its matrix."""
    x = normal(2, source, source, 3)
    found = ops.resize_align_corners(x, (target, target))
    bound = 0 if source == target else 1e-6
    np.testing.assert_allclose(found, resize(x, (target, target)), rtol=0, atol=bound)


KEYS = 12
MASKS = {
    "one key": [1] + [0] * 11,
    "a quarter, at the end": [0] * 9 + [1] * 3,
    "four scattered": [0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1],
    "half": [0, 1] * 6,
    "seven": [1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1],
    "all": [1] * 12,
}


def drawn(dtype=jnp.float32):
    """Cotangent, query, key and value of two images and two heads."""
    shapes = [(2, n, 2, 4) for n in (5, 5, KEYS, KEYS)]
    return [jnp.asarray(normal(*s, seed=i), dtype) for i, s in enumerate(shapes)]


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
    half, mask = drawn(jnp.bfloat16), np.array([MASKS["seven"]] * 2, bool)
    results = attentions[0](*half, mask=mask)
    assert {r.dtype for r in results} == {jnp.dtype(jnp.bfloat16)}
    exact = attentions[1](*(a.astype(jnp.float32) for a in half), mask=mask)
    assert_equal([r.astype(jnp.float32) for r in results], exact, tolerance=2**-8)


@pytest.mark.parametrize("name", MASKS)
def test_attention_at_every_number_of_true_keys(attentions, name):
    one = [0] * 7 + [1] + [0] * 4  # the second row's count differs from the first's
    mask = np.array([MASKS[name], one], bool)
    cotangent, *_, value = args = drawn()
    results, references = (attend(*args, mask=mask) for attend in attentions)
    # One row has a single key: its query and key gradients are 0 up to rounding.
    for result, reference in zip(results, references, strict=True):
        np.testing.assert_allclose(result, reference, atol=3e-6)
    output, _, _, d_value = map(np.asarray, results)
    assert not d_value[~mask].any(), "masked keys get nothing"
    np.testing.assert_allclose(output[1], np.repeat(value[1, 7:8], 5, 0), rtol=1e-6)
    np.testing.assert_allclose(d_value[1, 7], cotangent[1].sum(0), rtol=1e-5)


@pytest.mark.parametrize(("rows", "at_once"), [(2, 2 * 2 * 2 * KEYS), (1, 1)])
def test_attention_off_the_cpu_is_the_same_in_blocks(rows, at_once, monkeypatch):
    """Five queries in blocks of `rows`, with a remainder; the plain one at once."""
    mask = np.array([MASKS["seven"], MASKS["one key"]], bool)
    attend = functools.partial(with_gradients(ops.library_attention), mask=mask)
    args = drawn()

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


@pytest.mark.parametrize("at_once", [1, 3, 4, 8])
def test_rows_at_once_are_the_same_rows(at_once):
    x = normal(8, 5)
    with devices.only_defaults(True):
        found = devices.row_by_row(
            lambda row: row @ row * row, x, at_once=at_once, cpu=lambda row: 0 * row
        )
    np.testing.assert_allclose(found, (x * x).sum(1, keepdims=True) * x, rtol=1e-5)

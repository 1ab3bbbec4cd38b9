"""Prototypes, activation maps and grid masks against numpy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import normal

from qpenet_jax.evaluation.training_free import nearest_prototype
from qpenet_jax.models.prototypes import (
    activation_map,
    foreground_on_grid,
    masked_average_pool,
    predicted,
)


def test_an_empty_region_passes_no_gradient():
    """The cosine to the zero prototype is steep (1e8), the empty mask stops it."""

    def loss(features, mask):
        return activation_map(features, masked_average_pool(features, mask)).sum()

    gradient = jax.grad(loss)(normal(1, 2, 3, 4), np.zeros((1, 2, 3), bool))
    np.testing.assert_array_equal(gradient, 0)


def test_predicted_is_the_argmax_without_gradient():
    logits = normal(2, 3, 4, 2)
    logits[0, 0, 0] = 0.5  # a tie is class 0
    np.testing.assert_array_equal(predicted(logits), logits.argmax(-1) == 1)

    def soft(x):
        return (predicted(x).astype(x.dtype) * jnp.square(x).sum(-1)).sum()

    # All that arrives comes through the other factor.
    expected = 2 * logits * (logits.argmax(-1) == 1)[..., None]
    np.testing.assert_allclose(jax.grad(soft)(logits), expected, rtol=1e-6)


@pytest.mark.parametrize("sides", [(17, 17), (473, 473), (17, 33)])
def test_grid_cells_take_the_pixel_they_are_centred_on(sides):
    """Ignored pixels are background."""
    mask = np.random.default_rng(0).choice([0, 1, 255], (2, *sides)).astype(np.uint8)
    result = foreground_on_grid(mask, tuple((side - 1) // 8 + 1 for side in sides))
    assert result.dtype == bool
    np.testing.assert_array_equal(result, mask[:, ::8, ::8] == 1)


@pytest.mark.parametrize(("height", "width"), [(16, 17), (17, 18), (473, 472), (18, 9)])
def test_sides_that_do_not_fit_are_refused(height, width):
    grid = tuple(max(-(-side // 8), 3) for side in (height, width))
    with pytest.raises(ValueError, match=f"{height} x {width} do not fit"):
        foreground_on_grid(np.zeros((height, width), np.int32), grid)


def test_nearest_prototype_against_numpy():
    support, query = normal(1, 2, 3, 3, 5), normal(1, 3, 3, 5, seed=1)
    masks = np.random.default_rng(2).choice([0, 1, 255], (1, 2, 17, 17))
    masks[:, :, 0, 0], masks[:, :, 16, 16] = 0, 1
    logits, out = nearest_prototype(support, masks.astype(np.uint8), query)

    grid = masks[0, :, ::8, ::8]
    for label in (0, 1):
        means = [support[0, k][grid[k] == label].mean(axis=0) for k in range(2)]
        prototype = np.mean(means, axis=0)
        cosine = query[0] @ prototype
        cosine /= np.linalg.norm(query[0], axis=-1) * np.linalg.norm(prototype)
        np.testing.assert_allclose(out["cosines"][0, :, :, label], cosine, atol=1e-3)
        np.testing.assert_allclose(logits[0, ::8, ::8, label], cosine, atol=1e-3)
    assert logits.shape == (1, 17, 17, 2)

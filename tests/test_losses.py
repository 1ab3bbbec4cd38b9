"""Losses against NumPy: two-channel log-softmax on logits resized by np.interp."""

import jax
import numpy as np
import pytest
from equations import resize

from qpenet_jax.models.losses import (
    LossWeights,
    background_mining,
    cross_entropy,
    resized_margin,
    total_loss,
)

GRID, SIDES = 3, (17, 17)


def log_softmax(logits):
    large = resize(logits.astype(np.float64), SIDES)
    shifted = large - large.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference_ce(logits, mask):
    target = (mask == 1).astype(int)[..., None]
    losses = -np.take_along_axis(log_softmax(logits), target, axis=-1)[..., 0]
    return losses[mask != 255].mean()


def reference_bm(logits, mask):
    """Per image, foreground away from class 1, half of all valid towards it."""
    values = []
    log_p = log_softmax(logits).reshape(-1, *SIDES, 2)
    for image_log_p, image_mask in zip(log_p, mask.reshape(-1, *SIDES), strict=True):
        foreground = -image_log_p[..., 0][image_mask == 1]
        background = -image_log_p[..., 1][image_mask != 255]
        first = foreground.mean() if foreground.size else 0
        second = background.mean() if background.size else 0
        values.append(first + 0.5 * second)
    return np.mean(values)


def draw(*leading, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*leading, GRID, GRID, 2)) * scale
    mask = rng.choice([0, 1, 255], (*leading, *SIDES), p=[0.5, 0.3, 0.2])
    return logits.astype(np.float32), mask.astype(np.int32)


@pytest.mark.parametrize("leading", [(2,), (2, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_both_losses_are_numpys(leading, seed):
    logits, mask = draw(*leading, seed=seed)
    # Few pixels of one image count: images weigh by their pixels in cross entropy, and
    # alike in mining.
    mask.reshape(-1, *SIDES)[0, 1:] = 255
    large = resize(logits, SIDES).astype(np.float32)
    margin = large[..., 1] - large[..., 0]
    np.testing.assert_allclose(resized_margin(logits, SIDES), margin, atol=1e-5)
    ce = cross_entropy(logits, mask)
    np.testing.assert_allclose(ce, reference_ce(logits, mask), rtol=1e-5)
    bm = background_mining(logits, mask)
    np.testing.assert_allclose(bm, reference_bm(logits, mask), rtol=1e-5)
    # Logits of image size aren't resized.
    np.testing.assert_allclose(cross_entropy(large, mask), ce, rtol=1e-5)


@pytest.mark.parametrize("loss", [cross_entropy, background_mining])
def test_no_valid_pixel_gives_zero_and_confident_logits_finite_gradients(loss):
    logits, mask = draw(2)
    value, gradient = jax.value_and_grad(loss)(logits, np.full_like(mask, 255))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    logits, mask = draw(2, scale=1e4)
    value, gradient = jax.value_and_grad(loss)(logits, mask)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def predictions():
    """`out` of a network with all terms but FEM's, both masks, and each term."""
    pre, query_mask = draw(2)
    rev, support_masks = draw(2, 3, seed=4)
    out = {"y_pre": pre, "y_rev": rev}
    for seed, name in enumerate(("final", "bg_q", "aux"), start=1):
        out[f"y_{name}"] = draw(2, seed=seed)[0]
    out["y_bg_s"] = draw(2, 3, seed=5)[0]
    terms = {}
    for name, logits in out.items():
        mask = query_mask if logits.ndim == 4 else support_masks
        reference = reference_bm if "bg" in name else reference_ce
        terms[f"loss{name[1:]}"] = reference(logits, mask)
    return out, query_mask, support_masks, terms


WEIGHTS = {
    "default": (LossWeights(), {"aux": 0.6}),
    "all": (
        LossWeights(alpha=2, beta=3, pre=5, rev=7, final=11, aux=13),
        {"pre": 10, "rev": 14, "final": 22, "aux": 26, "bg_s": 3, "bg_q": 3},
    ),
}


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_total_is_the_weighted_sum_of_the_named_terms(weights, auxiliary):
    out, query_mask, support_masks, expected = predictions()
    if not auxiliary:
        del out["y_aux"], expected["loss_aux"]
    given, factors = WEIGHTS[weights]
    loss, terms = total_loss(out, query_mask, support_masks, given)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    total = sum(
        factors.get(n.removeprefix("loss_"), 1) * t for n, t in expected.items()
    )
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_variants_have_fewer_terms_and_inner_ones_count_as_their_mean():
    out, query_mask, support_masks, expected = predictions()
    final, coarse = out["y_final"], out["y_aux"]
    out = {name: out[name] for name in ("y_final", "y_bg_s", "y_bg_q")}
    out["y_inner"] = (final[:, ::2, ::2], coarse, coarse[:, :1, :1])
    # A grid of one cell says the same of every pixel.
    everywhere = np.broadcast_to(coarse[:, :1, :1], coarse.shape)
    parts = [reference_ce(x, query_mask) for x in (*out["y_inner"][:2], everywhere)]
    expected["loss_inner"] = np.mean(parts)
    loss, terms = total_loss(out, query_mask, support_masks, LossWeights(inner=3))
    assert terms.keys() == {f"loss_{n}" for n in ("final", "inner", "bg_s", "bg_q")}
    for name, value in terms.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
    total = sum(expected[name] for name in terms) + 2 * expected["loss_inner"]
    np.testing.assert_allclose(loss, total, rtol=1e-5)

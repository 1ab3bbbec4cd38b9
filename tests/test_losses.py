"""Losses against numpy: two-channel log-softmax on logits resized by np.interp."""

import jax
import numpy as np
import pytest

from qpenet_jax.models.losses import (
    LossWeights,
    background_mining,
    cross_entropy,
    resized_margin,
    total_loss,
)

GRID, SIDE = 3, 17


def resize(x, size):
    """Resize `[..., h, w, c]` linearly with the corners aligned, axis by axis."""
    for axis in (-3, -2):
        source = np.linspace(0, size - 1, x.shape[axis])
        x = np.apply_along_axis(
            lambda v, source=source: np.interp(np.arange(size), source, v), axis, x
        )
    return x


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference_ce(logits, mask):
    log_p = log_softmax(resize(logits.astype(np.float64), mask.shape[-1]))
    target = (mask == 1).astype(int)[..., None]
    losses = -np.take_along_axis(log_p, target, axis=-1)[..., 0]
    return losses[mask != 255].mean()


def reference_bm(logits, mask):
    """design: per image, foreground away from class 1, half of all valid towards it."""
    log_p = log_softmax(resize(logits.astype(np.float64), mask.shape[-1]))
    log_p, mask = (
        log_p.reshape(-1, *log_p.shape[-3:]),
        mask.reshape(-1, *mask.shape[-2:]),
    )
    values = []
    for image_log_p, image_mask in zip(log_p, mask, strict=True):
        foreground = -image_log_p[..., 0][image_mask == 1]
        background = -image_log_p[..., 1][image_mask != 255]
        first = foreground.mean() if foreground.size else 0
        second = background.mean() if background.size else 0
        values.append(first + 0.5 * second)
    return np.mean(values)


def draw(*leading, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*leading, GRID, GRID, 2)) * scale
    mask = rng.choice([0, 1, 255], (*leading, SIDE, SIDE), p=[0.5, 0.3, 0.2])
    return logits.astype(np.float32), mask.astype(np.int32)


def test_margin_is_the_difference_of_the_resized_logits():
    logits, _ = draw(2, 3)
    large = resize(logits, SIDE)
    result = resized_margin(logits, (SIDE, SIDE))
    np.testing.assert_allclose(result, large[..., 1] - large[..., 0], atol=1e-5)


@pytest.mark.parametrize("leading", [(2,), (2, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_both_losses_are_numpys(leading, seed):
    logits, mask = draw(*leading, seed=seed)
    ce = cross_entropy(logits, mask)
    np.testing.assert_allclose(ce, reference_ce(logits, mask), rtol=1e-5)
    bm = background_mining(logits, mask)
    np.testing.assert_allclose(bm, reference_bm(logits, mask), rtol=1e-5)
    whole = resize(logits, SIDE).astype(np.float32)  # of image size: not resized
    np.testing.assert_allclose(cross_entropy(whole, mask), ce, rtol=1e-5)


def test_by_hand():
    """Uniform logits 0 and log 3: probabilities 1/4 and 3/4 everywhere."""
    logits = np.broadcast_to([0, np.log(3)], (1, GRID, GRID, 2)).astype(np.float32)
    mask = np.zeros((1, SIDE, SIDE), np.int32)
    np.testing.assert_allclose(cross_entropy(logits, mask), np.log(4), rtol=1e-5)
    np.testing.assert_allclose(
        cross_entropy(logits, mask + 1), -np.log(0.75), rtol=1e-5
    )
    np.testing.assert_allclose(
        background_mining(logits, mask + 1),
        np.log(4) - 0.5 * np.log(0.75),
        rtol=1e-5,
    )


def test_ignored_pixels_change_nothing():
    logits, mask = draw(1)
    mask[:, :, 9:] = 255
    far = logits.copy()
    far[:, :, 2] += 5 * np.array([1, -1])  # moves columns 9.. only
    for loss in (cross_entropy, background_mining):
        np.testing.assert_allclose(loss(logits, mask), loss(far, mask), rtol=1e-6)


def test_images_weigh_by_their_pixels_in_ce_and_equally_in_mining():
    logits, mask = draw(2)
    mask[1] = 255
    mask[1, 0, :2] = 0, 1
    one, two = (reference_bm(logits[i : i + 1], mask[i : i + 1]) for i in (0, 1))
    np.testing.assert_allclose(
        background_mining(logits, mask), (one + two) / 2, rtol=1e-5
    )
    alone = reference_ce(logits[:1], mask[:1])
    np.testing.assert_allclose(cross_entropy(logits, mask), alone, rtol=0.03)


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


def test_total_is_the_weighted_sum_of_the_named_terms():
    query_logits, query_mask = draw(2)
    final, _ = draw(2, seed=1)
    bg_q, _ = draw(2, seed=2)
    aux, _ = draw(2, seed=3)
    rev, support_masks = draw(2, 3, seed=4)
    bg_s, _ = draw(2, 3, seed=5)
    out = {"y_pre": query_logits, "y_rev": rev, "y_bg_s": bg_s, "y_bg_q": bg_q}
    out["y_final"] = final
    expected = {
        "loss_pre": reference_ce(query_logits, query_mask),
        "loss_rev": reference_ce(rev, support_masks),
        "loss_final": reference_ce(final, query_mask),
        "loss_bg_s": reference_bm(bg_s, support_masks),
        "loss_bg_q": reference_bm(bg_q, query_mask),
    }
    loss, terms = total_loss(out, query_mask, support_masks)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-5)

    out["y_aux"] = aux
    weights = LossWeights(alpha=2, beta=3, pre=5, rev=7, final=11, aux=13)
    loss, terms = total_loss(out, query_mask, support_masks, weights)
    e = expected | {"loss_aux": reference_ce(aux, query_mask)}
    foreground = 5 * e["loss_pre"] + 7 * e["loss_rev"] + 11 * e["loss_final"]
    foreground += 13 * e["loss_aux"]
    background = e["loss_bg_s"] + e["loss_bg_q"]
    np.testing.assert_allclose(loss, 2 * foreground + 3 * background, rtol=1e-5)
    np.testing.assert_allclose(terms["loss_aux"], e["loss_aux"], rtol=1e-5)

    default, _ = total_loss(out, query_mask, support_masks)
    plain = sum(expected.values()) + 0.6 * e["loss_aux"]
    np.testing.assert_allclose(default, plain, rtol=1e-5)


def test_variants_have_fewer_terms_and_inner_ones_count_as_their_mean():
    final, query_mask = draw(2)
    coarse, _ = draw(2, seed=1)
    bg_q, _ = draw(2, seed=2)
    bg_s, support_masks = draw(2, 3, seed=3)
    inner = (final[:, ::2, ::2], coarse, coarse[:, :1, :1])
    out = {"y_final": final, "y_inner": inner, "y_bg_s": bg_s, "y_bg_q": bg_q}
    # A grid of one cell says the same of every pixel.
    everywhere = np.broadcast_to(coarse[:, :1, :1], coarse.shape)
    parts = [reference_ce(x, query_mask) for x in (inner[0], coarse, everywhere)]
    expected = {
        "loss_final": reference_ce(final, query_mask),
        "loss_inner": np.mean(parts),
        "loss_bg_s": reference_bm(bg_s, support_masks),
        "loss_bg_q": reference_bm(bg_q, query_mask),
    }
    loss, terms = total_loss(out, query_mask, support_masks, LossWeights(inner=3))
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    total = sum(expected.values()) + 2 * expected["loss_inner"]
    np.testing.assert_allclose(loss, total, rtol=1e-5)

"""The released network: by hand, and at its edges.

`python tests/test_released.py` writes tests/goldens/released.npz anew. Do so only after
a change that is meant to change it, and with tests/test_released_oracle.py green.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpenet_jax.benchmark.jax_side import NO_DROPOUT
from qpenet_jax.models.losses import LossWeights
from qpenet_jax.models.released.network import ReleasedQPENet, resolve_behaviour
from qpenet_jax.models.released.released_loss import background_mining, released_loss
from qpenet_jax.models.released.sampling import sample
from qpenet_jax.models.released.tokens import (
    Draws,
    choose,
    draw,
    flags_on_grid,
    largest_budget,
    never_one_sided,
)
from qpenet_jax.models.released.transformer import POINTS, drop
from qpenet_jax.recipes import RECIPES

WEIGHTS = LossWeights(
    **{k[5:]: v for k, v in RECIPES["released"].items() if k.startswith("loss.")}
)


# --- Tokens -------------------------------------------------------------------------


def identity(budget, n):
    order = jnp.arange(n, dtype=jnp.float32)[None]
    return Draws(jnp.array(budget), order, order)


def cells(foreground, total=3600):
    return (jnp.arange(total) < foreground)[None]


def test_the_released_flags_are_read_at_the_wrong_place():
    # Foreground lies in the middle of the grid: rows of the lists point elsewhere.
    foreground = jnp.zeros(3600, bool).at[1500:2154].set(True)[None]
    padded = jnp.zeros((1, 3600), bool)
    for behaviour, flagged in (("released", 0), ("fixed", 300)):
        tokens = choose(foreground, padded, identity(300, 3600), 600, behaviour)
        assert int(tokens.foreground.sum()) == flagged
        kinds = foreground[0][tokens.index[0]]
        assert kinds[:300].all()
        assert not kinds[300:].any()


@pytest.mark.parametrize("behaviour", ["released", "fixed"])
@pytest.mark.parametrize(
    ("foreground", "cells_in_all", "expected"),
    [
        (654, 3600, (300, 300)),
        (110, 3600, (110, 490)),
        (3500, 3600, (500, 100)),
        (300, 3600, (300, 300)),
        (3300, 3600, (300, 300)),
        (30, 169, (30, 139)),  # a small grid gives every cell
    ],
)
def test_where_one_kind_is_short_the_other_fills_up(
    foreground, cells_in_all, expected, behaviour
):
    inside, slots = cells(foreground, cells_in_all), sum(expected)
    for draws in (identity(300, cells_in_all), Draws(jnp.array(300))):
        tokens = choose(inside, ~inside, draws, slots, behaviour)
        kinds = np.asarray(inside[0][tokens.index[0]])
        assert (kinds.sum(), (~kinds).sum()) == expected
        assert len(set(tokens.index[0].tolist())) == slots
        assert tokens.used.all()
        if behaviour == "fixed":
            np.testing.assert_array_equal(tokens.foreground[0], kinds)
            np.testing.assert_array_equal(tokens.padded[0], ~kinds)


def test_nothing_is_random_in_fixed_inference():
    inside = cells(654)
    tokens = choose(inside, ~inside, Draws(jnp.array(300)), 600, "fixed")
    # The cell of rank r in a set of n stays iff floor((r+1) m / n) > floor(r m / n).
    kept = [r for r in range(654) if (r + 1) * 300 // 654 > r * 300 // 654]
    assert tokens.index[0, :300].tolist() == kept


def test_training_leaves_slots_empty_that_the_budget_does_not_fill():
    assert largest_budget(1, train=True) == 1200
    inside = cells(1600)
    tokens = choose(inside, ~inside, identity(200, 3600), 2400, "fixed")
    assert tokens.used[0].tolist() == [True] * 400 + [False] * 2000


@pytest.mark.parametrize(("shots", "low", "high"), [(1, 180, 1200), (5, 900, 2100)])
def test_budgets_in_training(shots, low, high):
    keys = jax.random.split(jax.random.key(0), 300)
    budgets = jax.vmap(lambda k: draw(k, (1, 4), shots, "fixed").budget)(keys)
    least, most = int(budgets.min()), int(budgets.max())
    assert low <= least < low * 1.1
    assert high * 0.95 < most <= high


def test_the_nearest_grid_of_the_release_and_ours():
    mask = jnp.zeros((473, 473), bool).at[465, 457].set(True)
    released, fixed = (flags_on_grid(mask, (60, 60), b) for b in ("released", "fixed"))
    assert np.argwhere(released).tolist() == [[59, 58]]  # floor(473 i / 60): 457, 465
    assert fixed.sum() == 0  # 8 i: 456, 464, 472


def test_a_support_has_both_kinds():
    empty, full = never_one_sided(
        jnp.stack([jnp.zeros((60, 60), bool), jnp.ones((60, 60), bool)])
    )
    assert empty.sum() == 4
    assert empty[29:31, 29:31].all()
    corners = [[0, 0], [0, 59], [59, 0], [59, 59]]
    assert np.argwhere(~full).tolist() == corners


# --- Parts by hand ------------------------------------------------------------------


@pytest.mark.parity
def test_sampling_and_its_gradients_against_grid_sample():
    import torch

    rng = np.random.default_rng(1)
    b, h, w, n, p, d = 1, 7, 9, 2, POINTS, 4
    value, offsets, weights = (
        rng.normal(size=(b, h, w, n, *shape)).astype(np.float32)
        for shape in ((d,), (p, 2), (p,))
    )
    tensors = [torch.tensor(t, requires_grad=True) for t in (value, offsets, weights)]
    v, o, a = tensors
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([x, y], dim=-1)[None, :, :, None, None] + o
    grid = (2 * place + 1) / torch.tensor([w, h]) - 1
    found = torch.nn.functional.grid_sample(
        v.permute(0, 3, 4, 1, 2).reshape(b * n, d, h, w),
        grid.permute(0, 3, 1, 2, 4, 5).reshape(b * n, h * w, p, 2),
        align_corners=False,
    )
    share = a.permute(0, 3, 1, 2, 4).reshape(b * n, 1, h * w, p)
    theirs = (found * share).sum(-1).reshape(b, n, d, h, w).permute(0, 3, 4, 1, 2)
    (theirs**2).sum().backward()

    def loss(*inputs):
        return (sample(*inputs) ** 2).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2))(value, offsets, weights)
    ours = sample(value, offsets, weights)
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, atol=2e-4)


def test_attention_drops_the_given_share():
    weights = jnp.ones((3600, 600))
    dropped = np.asarray(drop(jax.random.key(0), weights, 0.1))
    kept = dropped > 0
    np.testing.assert_allclose(dropped[kept], 1 / 0.9, rtol=1e-6)
    assert abs(kept.mean() - 0.9) < 0.001
    # Rows and columns spread as independent draws do: standard deviation 0.3 / n^0.5.
    for axis, n in ((0, 3600), (1, 600)):
        spread = kept.mean(axis=axis).std() / (0.3 / n**0.5)
        assert 0.85 < spread < 1.15
    again, other = (drop(jax.random.key(n), weights, 0.1) for n in (0, 1))
    assert (np.asarray(again) == dropped).all()
    agreement = ((np.asarray(other) > 0) == kept).mean()
    assert abs(agreement - 0.82) < 0.002  # 0.9^2 + 0.1^2


def test_background_mining_pulls_at_every_pixel():
    logits = jnp.zeros((1, 2, 2, 2))
    for mask, expected in (
        (np.full((1, 9, 9), 255, np.int32), 0.5 * math.log(2)),
        (np.ones((1, 9, 9), np.int32), 1.5 * math.log(2)),
    ):
        np.testing.assert_allclose(background_mining(logits, mask), expected, rtol=1e-5)


# --- The whole network at its edges -------------------------------------------------

SMALL = ReleasedQPENet(channels=32, ffn_features=48, **NO_DROPOUT)


GOLDENS = Path(__file__).parent / "goldens" / "released.npz"


@functools.cache
def small():
    """Parameters of a narrow network over 12 channels, without layer4."""
    shapes = jax.eval_shape(SMALL.init, jax.random.key(3), *episode())
    draw = jax.jit(jax.random.normal, static_argnums=1)
    return jax.tree.map(lambda p: draw(jax.random.key(p.size), p.shape) * 0.2, shapes)


def episode(k=1, b=1, seed=0, side=33):
    rng = np.random.default_rng(seed)
    grid = side // 8 + 1
    support = np.abs(rng.normal(size=(b, k, grid, grid, 12))).astype(np.float32)
    query = np.abs(rng.normal(size=(b, grid, grid, 12))).astype(np.float32)
    masks = (rng.random((b, k, side, side)) < 0.4).astype(np.int32)
    return support, masks, query


@functools.partial(jax.jit, static_argnums=0)
def predict(model, variables, *inputs):
    return model.apply(variables, *inputs)


def for_goldens(behaviour):
    """Logits and T of an episode with padding, by their names in the file."""
    model = SMALL.clone(behaviour=behaviour)
    padding = np.zeros((1, 1, 33, 33), bool)
    padding[..., 20:] = True
    inputs = *episode(), padding, padding[:, 0]
    logits, out = predict(model, small(), *inputs)
    return {f"{behaviour}/logits": logits, f"{behaviour}/T": out["T"]}


@pytest.mark.parametrize("behaviour", ["released", "fixed"])
def test_goldens(behaviour):
    """Ours, after the network agreed with the released model's numbers."""
    golden = np.load(GOLDENS)
    for name, found in for_goldens(behaviour).items():
        np.testing.assert_allclose(found, golden[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shots", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_copies_of_one_support_change_nothing_when_fixed(shots):
    support, masks, query = episode()
    one, _ = predict(SMALL, small(), support, masks, query)
    copies = [np.repeat(x, shots, axis=1) for x in (support, masks)]
    several, _ = predict(SMALL, small(), *copies, query)
    np.testing.assert_allclose(several, one, atol=2e-5)


@pytest.mark.parametrize("behaviour", ["released", "fixed"])
def test_a_mask_of_one_value_gives_finite_gradients(behaviour):
    support, masks, query = episode(k=2)
    model = SMALL.clone(behaviour=behaviour)

    @jax.jit
    @jax.value_and_grad
    def loss(variables, masks):
        key = jax.random.key(0)
        _, out = model.apply(
            variables, support, masks, query, train=True, rngs={"dropout": key}
        )
        return released_loss(out, masks[:, 0], masks, WEIGHTS)[0]

    for value in (0, 1, 255):
        total, gradient = loss(small(), np.full_like(masks, value))
        assert jnp.isfinite(total)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_auto_is_fixed_with_several_supports_only():
    for shots, behaviour in ((1, "released"), (2, "fixed")):
        assert resolve_behaviour("auto", shots) == behaviour
        inputs = episode(k=shots)
        auto, named = (
            predict(SMALL.clone(behaviour=b), small(), *inputs)[0]
            for b in ("auto", behaviour)
        )
        np.testing.assert_array_equal(auto, named)


def test_padding_matters_and_a_batch_does_not():
    support, masks, query = episode(b=2)
    padding = np.zeros(masks.shape, bool)
    whole, _ = predict(SMALL, small(), support, masks, query)
    unsaid, _ = predict(SMALL, small(), support, masks, query, padding, padding[:, 0])
    np.testing.assert_array_equal(whole, unsaid)
    padding[:, :, 16:] = True
    padded, _ = predict(SMALL, small(), support, masks, query, padding, padding[:, 0])
    assert np.abs(padded - whole).max() > 1e-3
    alone, _ = predict(SMALL, small(), support[1:], masks[1:], query[1:])
    np.testing.assert_allclose(alone, whole[1:], atol=1e-5)


def test_training_draws_from_the_key_alone():
    model = ReleasedQPENet(channels=32, ffn_features=48)
    inputs = episode()

    @jax.jit
    def train(key):
        return model.apply(small(), *inputs, train=True, rngs={"dropout": key})[0]

    first, again, other = (train(jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


@pytest.mark.parametrize("behaviour", ["released", "fixed"])
def test_inference_is_deterministic(behaviour):
    """On 676 cells, of which 600 are attended to."""
    model, inputs = SMALL.clone(behaviour=behaviour), episode(side=201)
    first, again = (predict(model, small(), *inputs)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


if __name__ == "__main__":
    made = [for_goldens(behaviour) for behaviour in ("released", "fixed")]
    np.savez_compressed(GOLDENS, **made[0], **made[1])

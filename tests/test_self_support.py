"""Prototypes that the query mixes its own into, against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from qpenet_jax.evaluation.training_free import FEWEST, self_supported

GRID, SIDE, CHANNELS = 9, 65, 6


def by_hand(supports, masks, query, photo):
    """Return the cosines [h, w, 2] of one episode."""

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    on_grid = masks[:, ::8, ::8]
    pairs = [*zip(supports, on_grid, strict=True)]
    of = [np.mean([x[mask == v].mean(0) for x, mask in pairs], 0) for v in (0, 1)]
    background, foreground = (unit(query) @ unit(p) for p in of)
    likely = 1 / (1 + np.exp(-10 * (foreground - background)))
    cosines = []
    for prototype, p, least in ((of[0], 1 - likely, 0.6), (of[1], likely, 0.7)):
        sure = photo & (p > least)
        if sure.sum() < 12:
            order = np.argsort(-np.where(photo, p, -1), axis=None, kind="stable")[:12]
            sure = np.zeros(photo.size, bool)
            sure[order] = True
            sure = sure.reshape(photo.shape)
        mixed = unit(prototype) / 2 + unit(query[sure].mean(0)) / 2
        cosines.append(unit(query) @ unit(mixed))
    return np.stack(cosines, -1)


def drawn(shots, seed=0, likeness=1.0):
    """Maps of two textures, and masks of the second with pixels to be ignored."""
    rng = np.random.default_rng(seed)
    textures = rng.normal(size=(2, CHANNELS)) * [[1.0], [likeness]] + 0.3
    inside = np.zeros((shots + 1, GRID, GRID), int)
    for one in inside:
        top, left = rng.integers(0, 5, 2)
        one[top : top + 4, left : left + 4] = 1
    maps = (textures[inside] + rng.normal(size=(*inside.shape, CHANNELS))).astype("f4")
    masks = np.kron(inside[:-1], np.ones((1, 8, 8)))[:, :SIDE, :SIDE].astype(np.uint8)
    masks[..., -1] = 255
    return maps[:-1], masks, maps[-1]


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("likeness", [1.0, 0.1])  # 0.1: few pixels are sure
@pytest.mark.parametrize("rows", [9, 4, 1])  # of the photo; below is padding
def test_it_is_what_numpy_computes(shots, likeness, rows):
    """Two episodes of a batch, neither of which sees the other."""
    episodes = [drawn(shots, seed, likeness) for seed in (3, 4)]
    supports, masks, query = (np.stack(x) for x in zip(*episodes, strict=True))
    photo = np.zeros((GRID, GRID), bool)
    photo[:rows] = True
    logits, out = self_supported(supports, masks, query, jnp.stack([photo, photo]))
    assert logits.shape == (2, SIDE, SIDE, 2)
    np.testing.assert_allclose(logits[:, ::8, ::8], out["cosines"], atol=1e-5)
    for i, episode in enumerate(episodes):
        if photo.sum() >= FEWEST:
            expected = by_hand(*episode, photo)
            np.testing.assert_allclose(out["cosines"][i], expected, atol=2e-5)
        for ground in ("background", "foreground"):
            sure = np.asarray(out[f"sure_{ground}"][i])
            assert min(FEWEST, photo.sum()) <= sure.sum()
            assert not (sure & ~photo).any()


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_support_without_object_or_background_gives_finite_logits(value):
    supports, masks, query = drawn(1)
    photo = np.ones((1, GRID, GRID), bool)
    masks = np.full_like(masks, value)
    logits, _ = self_supported(supports[None], masks[None], query[None], photo)
    assert np.isfinite(logits).all()

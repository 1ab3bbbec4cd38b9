"""Supports cut around their foreground give the masks that whole ones do."""

import jax
import numpy as np
import pytest
from equations import normal
from predictors import picture

from qpenet_jax import load
from qpenet_jax.backbones.registry import backbone
from qpenet_jax.data.transforms import unpad
from qpenet_jax.evaluation.predictor import around_foreground, qpenet_predictor
from qpenet_jax.models.layers import Convs
from qpenet_jax.models.qpenet import QPENet

SIDE = 241
BOXES = {  # in cells of the grid of 31: a corner, an edge, the middle, another corner
    "corner": (0, 4, 0, 6),
    "edge": (10, 17, 29, 31),
    "middle": (12, 14, 9, 17),
    "last": (25, 31, 28, 31),
}


def mask_of(*boxes):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for top, bottom, left, right in boxes:
        mask[8 * top : 8 * bottom, 8 * left : 8 * right] = 1
    return mask


def sizes(supports):
    return {x.shape[1:3] for x in jax.tree.leaves(supports)}


@pytest.mark.parametrize("fields", [{}, {"decoder": "fem", "prior": True}])
def test_the_margin_is_that_of_whole_supports(fields):
    """Of DPE, FFA and the prior mask; FEM sees prototypes alone."""
    masks = np.stack([mask_of(box) for box in BOXES.values()])[None]
    features, query = normal(1, 4, 31, 31, 8), normal(1, 31, 31, 8, seed=1)
    model = QPENet(channels=16, **fields)
    params = model.init(jax.random.key(0), features, masks, query)

    def encode(x, role):
        return model.apply(params, x, (role,), method="encode")

    supports = [encode(features[:, k], "support") for k in range(4)]
    cropped = around_foreground(supports, masks)
    assert sizes(supports) == {(31, 31)}
    assert sizes(cropped) == {(16, 16)}
    whole, part = (
        model.apply(params, stacked, masks, encode(query, "query"), method="decode")[0]
        for stacked in (
            jax.tree.map(lambda *x: np.stack(x, axis=1), *some)
            for some in (supports, cropped)
        )
    )
    np.testing.assert_allclose(part, whole, atol=1e-5, rtol=1e-5)


def test_a_logit_sees_so_many_cells_and_no_more():
    convs = Convs()
    features, prototype = np.ones((1, 15, 15, 4), np.float32), np.ones((1, 4), "f4")
    params = convs.init(jax.random.key(0), features, prototype, train=False)

    def middle(features):
        return convs.apply(params, features, prototype, train=False)[0, 7, 7].sum()

    seen = np.abs(jax.grad(middle)(features)[0]).sum(axis=2) > 0
    reached = np.zeros((15, 15), bool)
    reached[7 - Convs.REACH :, 7 - Convs.REACH :][:7, :7] = True
    np.testing.assert_array_equal(seen, reached)


def test_the_starter_crops_its_networks_part_alone():
    images, masks = zip(*(picture(64, n) for n in (40, 80)), strict=True)
    corner = [mask * (np.indices(mask.shape) < 20).all(axis=0) for mask in masks]
    task = load(overrides=["--config.side=161"]).learn(images, corner)
    network, free = zip(*task.cropped_supports, strict=True)
    assert sizes(network) == {(16, 16)}
    assert sizes(free) == {(21, 21)}
    query, _ = picture(64, 64)
    view = task.view(query)
    whole = np.asarray(task.predict.decode(task.supports, task.masks, view.encoded))
    whole = unpad(whole[0], *query.shape[:2])
    np.testing.assert_allclose(task.margin(view), whole, atol=1e-4)


def test_supports_that_stay_whole():
    """One alone, for which every photo would be compiled; one without foreground."""
    features = {"F_s": np.ones((1, 31, 31, 4), np.float32)}
    masks = np.stack([mask_of(BOXES["edge"]), mask_of(), mask_of(BOXES["edge"])])[None]
    for part in (slice(0, 1), slice(0, 2)):
        supports = [features] * len(masks[0, part])
        assert around_foreground(supports, masks[:, part]) is supports
    # A window reaches from one object to another.
    far = np.stack([mask_of(BOXES["corner"], BOXES["last"])] * 2)[None]
    assert sizes(around_foreground([features] * 2, far)) == {(31, 31)}

    class Other(QPENet):
        """A network of others may depend on all of a support."""

    network = qpenet_predictor(Other(), backbone("resnet50"), {}, {})
    supports = [features] * 2
    assert network.crop_supports(supports, masks[:, ::2]) is supports

"""Every row of Tables III to V against NumPy, and what each row must not depend on."""

import functools

import jax
import numpy as np
import pytest
from commands import tiny_config
from equations import (
    FEM_ROWS,
    GRID,
    adaptive_pool,
    build,
    check,
    draw_episodes,
    draw_params,
    normal,
    shapes,
)
from untrained import traced_step

from qpenet_jax.benchmark.jax_side import NO_DROPOUT
from qpenet_jax.core.errors import InputError
from qpenet_jax.models.fem import pooling_matrix, prior_mask
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.ops import along_sides
from qpenet_jax.models.ops.devices import only_defaults
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.variants import VARIANTS
from qpenet_jax.paper.plan import VARIANT_RESULTS

KINDS = ("baseline", "fgpe_bgpe", "fgpe_ffa", "main", "without_maps", "sgm")
"""Every kind of row; the others differ in numbers of channels alone."""

rows = pytest.mark.parametrize(
    "name",
    [
        name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
    ],
)


@functools.cache
def random_params(name):
    return draw_params(build(name))


@functools.cache
def trained(name):
    """Return (loss, terms, logits, out, its gradients, gradients of loss_final).

    Five shots in training mode, with every dropout rate 0.
    """
    model = build(name, **NO_DROPOUT)
    support, masks, query = draw_episodes(5)

    def loss(params, weights):
        rngs = {"dropout": jax.random.key(0)}
        logits, out = model.apply(
            {"params": params}, support, masks, query, train=True, rngs=rngs
        )
        value, terms = total_loss(out, masks[:, 0], masks, LossWeights(**weights))
        return value, (terms, logits, out)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    every = dict.fromkeys(("pre", "rev", "final", "aux", "inner", "beta"), 1.0)
    only_final = dict.fromkeys(every, 0.0) | {"final": 1.0}
    params = random_params(name)
    (value, (terms, logits, out)), gradients = run(params, every)
    return value, terms, logits, out, gradients, run(params, only_final)[1]


@rows
def test_every_intermediate_is_numpys_and_every_prediction_has_a_loss(name):
    """With five shots."""
    value, terms, logits, out, *_ = trained(name)
    expected = {"final", "bg_s", "bg_q"}
    expected |= {"inner"} if name in FEM_ROWS else {"aux"}
    expected |= set() if name == "baseline" else {"pre", "rev"}
    assert terms.keys() == {f"loss_{term}" for term in expected}
    np.testing.assert_allclose(value, sum(terms.values()), rtol=1e-5)
    assert ("y_inner" in out) == (name in FEM_ROWS)
    assert out["y_bg_s"].shape == (3, 5, *GRID, 2)
    out = {key: value for key, value in out.items() if key != "y_bg_s"}
    check(name, random_params(name), draw_episodes(5), logits, out)


@pytest.mark.parametrize("name", ["sgm", "baseline_prior", "full_prior"])
def test_one_shot_evaluation_is_numpys(name):
    episodes, params = draw_episodes(1), random_params(name)
    run = jax.jit(lambda params, *given: build(name).apply({"params": params}, *given))
    check(name, params, episodes, *run(params, *episodes))


@rows
def test_gradients_reach_what_they_should_and_nothing_else(name):
    """An episode without foreground is among them.

    The masks between the segmentations are hard, so the final prediction teaches
    neither the `Convs` that make them nor the heads that only have a loss.
    """
    value, *_, every, of_final = trained(name)
    assert np.isfinite(value)
    untaught = []
    for (path, leaf), final in zip(
        jax.tree_util.tree_leaves_with_path(every),
        jax.tree.leaves(of_final),
        strict=True,
    ):
        path = "/".join(key.key for key in path)
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
        if not np.any(final):
            untaught.append("/".join(path.split("/")[:2]))
    expected = {"gbc/convs"}
    if name != "baseline":
        expected |= {f"convs/{layer}" for layer in ("merge", "residual", "head")}
    if name in FEM_ROWS:
        expected |= {f"fem/inner_head{i}" for i in range(4)}
    else:
        expected |= {"ffa/auxiliary_head"}
    assert set(untaught) == expected


@rows
@pytest.mark.standard_promotion
def test_a_train_step_reports_what_the_variant_has(name):
    metrics = traced_step(tiny_config(variant=name))
    watched = {name for name in metrics if name.startswith("empty_")}
    evolved = set() if name == "baseline" else {"empty_pre", "empty_rev"}
    decoded = {"empty_final"} if name in FEM_ROWS else {"empty_final", "empty_aux"}
    assert watched == {"empty_bg"} | evolved | decoded


def test_dropout_reaches_every_head_of_fem():
    model = build("baseline", **NO_DROPOUT | {"head_dropout": 0.5})
    params, episodes = random_params("baseline"), draw_episodes(1)

    @jax.jit
    def run(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, *episodes, train=True, rngs=rngs)[1]

    outs = (run(jax.random.key(n)) for n in (0, 1))
    for one, two in zip(*([x["y_final"], *x["y_inner"]] for x in outs), strict=True):
        assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize(
    "grids",
    [((60, 60), (8, 8)), ((60, 60), (15, 30)), ((5, 9), (3, 2)), ((7, 7), (7, 7))],
)
def test_adaptive_pooling_is_the_mean_of_every_window(grids):
    source, target = grids
    x = normal(2, *source, 3)
    pooled = along_sides(pooling_matrix, x, target)
    for b in range(2):
        np.testing.assert_allclose(pooled[b], adaptive_pool(x[b], target), atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_prior_is_the_same_off_the_cpu(share):
    """What a CPU computes from the foreground's cells, others do from all at once."""
    support, query = normal(1, 1, 40, 25, 16), normal(1, 7, 10, 16, seed=1)
    mask = np.random.default_rng(2).random((1, 1, 40, 25)) < share
    in_blocks = prior_mask(support, mask, query)
    with only_defaults(True):
        np.testing.assert_allclose(
            prior_mask(support, mask, query), in_blocks, atol=1e-6
        )


# Trainable parameters over ResNet's 1536 features at 256 channels. That each is used
# as in the equations is compared at 8 channels, above.
COUNTS = {
    "baseline": 13_241_612,
    "fgpe": 15_144_718,
    "fgpe_bgpe": 15_276_302,
    "fgpe_ffa": 9_769_736,
    "full": 9_901_320,
    "pre": 9_900_808,
    "main": 9_835_528,
    "aux": 9_835_528,
    "main_aux": 9_835_784,
    "without_maps": 10_031_880,
    "sgm": 9_901_320,
}


def count(model, features=1536):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, features)))


def test_every_variant_has_an_exact_parameter_count():
    assert COUNTS.keys() == VARIANTS.keys() == set().union(*VARIANT_RESULTS.values())
    for name, expected in COUNTS.items():
        assert count(QPENet(**VARIANTS[name].fields)) == expected, name
    # Without two residual blocks, one head, one 1x1 convolution of the features; and
    # over 344 features, of EfficientNet-Lite0.
    assert count(QPENet(residual=False)) == COUNTS["full"] - 4 * 9 * 256**2
    assert count(QPENet(auxiliary_head=False)) == COUNTS["full"] - 9 * 256**2 - 514
    assert count(QPENet(shared_reducer=True)) == COUNTS["full"] - 1536 * 256
    assert count(QPENet(), features=344) == 9_291_016


def test_rows_are_the_papers():
    """Class mIoU from top to bottom, as printed."""
    printed = {
        3: [62.4, 64.1, 64.5, 64.8, 65.2],
        4: [63.3, 61.8, 58.1, 64.1, 65.2],
        5: [61.6, 63.5, 65.2],
    }
    for table, values in printed.items():
        rows = VARIANT_RESULTS[f"table{table}"].values()
        assert [miou for miou, *_ in rows] == values


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder": "FEM"}, "decoder 'FEM': choose ffa, fem"),
        ({"prototypes": ("psd",)}, "fgpe=True, prototype 'psd': choose pre, main"),
        ({"fgpe": False}, "with fgpe=False, prototype 'main': choose pre"),
    ],
)
def test_fields_that_name_no_network_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        QPENet(**fields)

"""What predictions, losses and gradients of QPENet don't depend on, or have to."""

import jax
import numpy as np
import pytest
from equations import build, check, draw_episodes, draw_params

from qpenet_jax.models.losses import total_loss

# Bits are compared.
pytestmark = pytest.mark.usefixtures("optimised_code")

MODEL = build()


@pytest.fixture(scope="module")
def params():
    return draw_params(MODEL)


@pytest.fixture(scope="module")
def evaluate():
    """Jitted `(params, support, masks, query) -> logits, out`, dropout off."""
    return jax.jit(lambda params, *episode: MODEL.apply({"params": params}, *episode))


@pytest.fixture(scope="module")
def train():
    """Jitted `(params, episode, query mask, dropout key) -> loss, out, gradients`."""

    def loss(params, episode, query_mask, key):
        rngs = {"dropout": key}
        _, out = MODEL.apply({"params": params}, *episode, train=True, rngs=rngs)
        return total_loss(out, query_mask, episode[1])[0], out

    grad = jax.value_and_grad(loss, has_aux=True)

    def run(params, episode, query_mask, key):
        (value, out), gradients = grad(params, episode, query_mask, key)
        return value, out, gradients

    # Unoptimised code: here compiling takes a hundred times longer than running.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("shots", [1, 3])
def test_every_intermediate_is_the_papers(evaluate, params, shots):
    episodes = draw_episodes(shots)
    check("full", params, episodes, *evaluate(params, *episodes))


def test_batch_neighbours_are_irrelevant_and_evaluation_is_bit_identical(
    evaluate, params
):
    episodes, others = draw_episodes(1), draw_episodes(1, seed=2)
    mixed = [np.stack([x[1], y[0]]) for x, y in zip(episodes, others, strict=True)]
    logits, _ = evaluate(params, *episodes)
    again, _ = evaluate(params, *episodes)
    np.testing.assert_array_equal(again, logits)
    np.testing.assert_allclose(evaluate(params, *mixed)[0][0], logits[1], atol=1e-5)


@pytest.mark.parametrize("label", [0, 1, 255])
def test_uniform_masks_give_finite_values_and_gradients(train, params, label):
    support, masks, query = draw_episodes(2)
    masks = np.full_like(masks, label)
    value, out, gradients = train(
        params, (support, masks, query), masks[:, 0], jax.random.key(0)
    )
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path((out, gradients)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def test_training_reaches_every_parameter_through_dropout(train, params):
    support, masks, query = draw_episodes(2)
    args = params, (support, masks, query), masks[:, 0]
    value, out, gradients = train(*args, jax.random.key(1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)

    again, _, same = train(*args, jax.random.key(1))
    assert value == again
    jax.tree.map(np.testing.assert_array_equal, gradients, same)
    other, other_out, _ = train(*args, jax.random.key(2))
    assert other != value
    # Whole channels drop out, so about half of a prototype's entries are 0.
    assert (np.asarray(out["P_pre"]) == 0).any()
    assert np.abs(out["P_pre"] - other_out["P_pre"]).max() > 1e-2

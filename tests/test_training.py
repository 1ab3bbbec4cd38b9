"""The optimiser against PyTorch's rule by hand, and the train step on toy episodes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import tiny_config

from qpenet_jax.core.types import Episode
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.runs.build import build_backbone, build_weights, initial_params
from qpenet_jax.training.batches import global_batch, shardings
from qpenet_jax.training.health import HEADS
from qpenet_jax.training.step import episode_features, mean_of_parts
from qpenet_jax.training.train import build_state, build_train_step

SIDE = 33

FIELDS = {"shots": 2, "side": SIDE, "optimizer__lr": 0.003, "model__channels": 16}
FIELDS |= {"model__heads": 2, "model__ffn_features": 24, "model__channel_dropout": 0.1}


@pytest.mark.parametrize("steps", [9, 41, 98])
def test_the_last_rate_is_a_number_however_xla_divides(steps):
    rate = jax.jit(Optimizer(first=1).schedule(steps))
    assert 0 <= float(rate(jnp.int32(steps - 1))) < 1e-7


def test_schedule_values():
    schedule = Optimizer().schedule(100)
    for t, expected in ((0, 0.025), (50, 0.025 * 0.5**0.9), (100, 0)):
        np.testing.assert_allclose(schedule(t), expected, rtol=1e-6)
    linear = Optimizer(lr=0.1, lr_factor=1, power=1)
    found = [linear.schedule(4)(t) for t in range(4)]
    np.testing.assert_allclose(found, [0.1, 0.075, 0.05, 0.025])
    # Warming up, the rate rises to the schedule.
    assert linear.warm_up == 0
    plain, warm = (
        dataclasses.replace(linear, warm_up=steps).schedule(8) for steps in (0, 4)
    )
    expected = [plain(t) * min((t + 1) / 4, 1) for t in range(8)]
    np.testing.assert_allclose([warm(t) for t in range(8)], expected, rtol=1e-6)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_clipping_bounds_the_norm_of_the_whole_gradient(name):
    """A gradient of norm 50 counts as one of norm 5; a smaller one as it is."""
    settings = {"name": name, "lr": 0.1, "lr_factor": 1.0, "weight_decay": 0.0}
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}

    def update(gradient, **more):
        optimizer = Optimizer(**settings, **more).build(10)
        gradients = {"a": jnp.array(gradient[:2]), "b": jnp.array(gradient[2])}
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    def assert_equal(found, expected):
        for key in params:
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-5)

    large, small = np.array([30.0, 0.0, 40.0]), np.array([0.3, 0.0, 0.4])
    assert_equal(update(large, clip=5.0), update(large / 10))
    assert_equal(update(small, clip=5.0), update(small))


def test_sgd_is_pytorchs_rule():
    """Decay joins the gradient, the buffer sums, the rate multiplies last."""
    settings = Optimizer(lr=0.1, lr_factor=2.0, momentum=0.8, weight_decay=0.01)
    optimizer = settings.build(steps=5)
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    state = optimizer.init(params)
    p, momentum = np.array([1.0, -2.0, 0.5]), np.zeros(3)
    for t in range(3):
        g = np.array([0.3, -0.1, 1.0]) * (t + 1)
        gradients = {"w": jnp.asarray(g[:2]), "b": jnp.asarray(g[2])}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)

        momentum = 0.8 * momentum + g + 0.01 * p
        p = p - 0.2 * (1 - t / 5) ** 0.9 * momentum
        np.testing.assert_allclose(params["w"], p[:2], rtol=1e-6)
        np.testing.assert_allclose(params["b"], p[2], rtol=1e-6)


@pytest.mark.parity
def test_sgd_is_pytorchs():
    import torch

    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    theirs = torch.optim.SGD([weight], lr=0.025, momentum=0.9, weight_decay=1e-4)
    optimizer = Optimizer(power=0.0).build(steps=5)  # a constant rate
    params = jnp.array([1.0, -2.0])
    state = optimizer.init(params)
    for t in range(4):
        gradient = np.array([0.5, 3.0], np.float32) * t
        weight.grad = torch.tensor(gradient)
        theirs.step()
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-6)


@pytest.mark.standard_promotion
def test_adamw_decays_apart_from_the_gradient():
    """The first step is lr * sign(gradient) whatever its size, plus lr * decay * w."""
    optimizer = Optimizer("adamw", lr=0.01, lr_factor=1, weight_decay=0.1).build(10)
    params = jnp.array([1.0, -2.0])
    updates, _ = optimizer.update(
        jnp.array([5.0, -1e-3]), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates, [-0.01 - 0.001, 0.01 + 0.002], rtol=1e-4)


@pytest.fixture(scope="module")
def batch():
    """Two 2-shot episodes: the object is a bright rectangle."""
    rng = np.random.default_rng(0)
    masks = np.zeros((2, 3, SIDE, SIDE), np.uint8)
    for mask in masks.reshape(-1, SIDE, SIDE):
        top, left = rng.integers(0, 17, 2)
        mask[top : top + 17, left : left + 17] = 1
    images = rng.integers(0, 80, (*masks.shape, 3), np.uint8) + 150 * masks[..., None]
    masks[:, :, -2:] = 255
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:])


@pytest.fixture(scope="module")
def weights():
    return build_weights(tiny_config())


@pytest.fixture(scope="module")
def train(weights, batch):
    """Return a function that trains for some steps.

    It returns the last state, the losses, and the metrics of the last step.
    """

    def run(steps, key=0, weights=weights, **fields):
        config = tiny_config(**FIELDS | fields)
        step = build_train_step(config, 100, images=60)
        state = build_state(config, weights, 100)
        losses, metrics = [], {}
        for _ in range(steps):
            old = state
            state, metrics = step(state, weights, batch, jax.random.key(key))
            losses.append(float(metrics["loss"]))
            assert jax.tree.leaves(old.params)[0].is_deleted(), "donated"
        return state, losses, metrics

    return run


@pytest.mark.standard_promotion
def test_training_lowers_the_loss_and_measures_its_health(train, weights):
    before = jax.tree.map(np.array, weights)
    state, losses, metrics = train(40)
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    assert int(state.step) == 40
    jax.tree.map(np.testing.assert_array_equal, weights, before)

    parts = ("pre", "rev", "final", "bg_s", "bg_q")
    total = sum(float(metrics[f"loss_{part}"]) for part in parts)
    total += 0.6 * float(metrics["loss_aux"])
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    assert metrics["grad_norm"] > 0
    for name in ("iou", *(f"empty_{head}" for head in HEADS)):
        assert 0 <= metrics[name] <= 1
    prototype = state.params["gbc"]["P_global"]
    assert metrics["norm_P_global"] == pytest.approx(np.linalg.norm(prototype), rel=0.1)
    for name in ("rms_F_q", "rms_F_s"):
        assert 0 < metrics[name] < 10


@pytest.mark.standard_promotion
def test_the_same_key_trains_to_the_same_bits(train):
    one, losses, _ = train(4)
    two, again, _ = train(4)
    assert losses == again
    jax.tree.map(np.testing.assert_array_equal, one, two)
    other, _, _ = train(4, key=1)
    differs = jax.tree.map(lambda a, b: bool((a != b).any()), one.params, other.params)
    assert all(jax.tree.leaves(differs)), "dropout of another key"


@pytest.mark.standard_promotion
def test_accumulated_gradients_are_those_of_the_whole_batch(train):
    """Where equally many pixels of all images count, as here, and without dropout."""
    rates = ("channel", "head", "gate", "attention")
    fields = {f"model__{name}_dropout": 0.0 for name in rates}
    # Plain gradient descent: its step shows the gradient.
    fields |= {"optimizer__name": "sgd", "optimizer__lr": 0.1}
    fields |= {"optimizer__momentum": 0.0, "optimizer__power": 0.0}
    state, _, metrics = train(1, accumulate=2, **fields)
    whole, _, expected = train(1, **fields)
    assert int(state.step) == 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        state.params,
        whole.params,
    )
    assert metrics.keys() == expected.keys()
    for name in ("loss", "loss_bg_q", "grad_norm", "norm_P_global"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)


def test_parts_of_a_batch_are_numbered_and_hold_each_row_once():
    batch = {"rows": jnp.arange(6.0), "pixels": jnp.arange(12.0).reshape(6, 2)}
    found = mean_of_parts(
        lambda part, i: {
            "rows": jax.nn.one_hot(part["rows"].astype(int), 6).sum(0),
            "pixels": part["pixels"].sum(),
            "by number": jnp.float32(i) * part["rows"].min(),
        },
        batch,
        3,
    )
    np.testing.assert_allclose(3 * found["rows"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["pixels"], np.arange(12).sum() / 3, rtol=1e-6)
    np.testing.assert_allclose(3 * found["by number"], 0 * 0 + 1 * 1 + 2 * 2, rtol=1e-6)


def test_features_of_supports_and_query_keep_their_places(weights, batch):
    backbone = build_backbone(tiny_config())
    support, query = episode_features(backbone, weights, batch)
    assert support.shape == (2, 2, 5, 5, 8)

    def expected(image):
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        pixels = jnp.float32((image / 255 - mean) / std)
        return backbone.module.apply({"params": weights}, pixels[None])["only"][0]

    for b in range(2):
        np.testing.assert_allclose(query[b], expected(batch.query_image[b]), atol=1e-4)
        for k in range(2):
            reference = expected(batch.support_images[b, k])
            np.testing.assert_allclose(support[b, k], reference, atol=1e-4)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("normalize", [True, False])
def test_normalized_training_does_not_see_the_scale_of_the_features(
    train, weights, normalize
):
    fields = {"optimizer__name": "sgd", "optimizer__lr": 0.025}
    scaled = jax.tree.map(lambda x: 0.04 * x, weights)
    losses = [
        np.array(train(3, weights=given, model__normalize=normalize, **fields)[1])
        for given in (scaled, weights)
    ]
    assert (np.abs(losses[0] / losses[1] - 1) < 1e-4).all() == normalize


def test_where_training_starts():
    """PyTorch's U(+-1 / sqrt(fan_in)), and a random background prototype."""

    def params(scale):
        return initial_params(tiny_config(**FIELDS, model__background_scale=scale))

    for path, leaf in jax.tree_util.tree_leaves_with_path(params(1.0)):
        if leaf.ndim > 1:
            bound = 1 / np.sqrt(np.prod(leaf.shape[:-1]))
            assert 0.7 * bound < np.abs(leaf).max() <= bound, path
    none, half, whole = (params(x)["gbc"]["P_global"] for x in (0.0, 0.5, 1.0))
    assert not none.any()
    assert np.std(whole) > 0.3
    np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-6)


def test_batches_are_placed_whole(batch):
    replicated, split = shardings(len(batch.query_image))
    placed = global_batch(batch, split)
    leaves = (jax.tree.leaves(tree) for tree in (placed, batch))
    for mine, original in zip(*leaves, strict=True):
        np.testing.assert_array_equal(mine, original)
        assert mine.sharding == split
    assert replicated.is_fully_replicated

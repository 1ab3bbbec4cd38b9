"""What config.dtype changes, and what stays float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import quickstart
from qpenet_jax.backbones import precision
from qpenet_jax.backbones.precision import InDtype, resolve_dtype
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.loader import load_episode
from qpenet_jax.runs.build import (
    build_backbone,
    build_cosine_predictor,
    build_model,
    build_predictor,
    build_weights,
    complete,
)
from qpenet_jax.runs.datasets import build_dataset, build_train_sampler
from qpenet_jax.training.train import build_state, build_train_step

pytestmark = pytest.mark.standard_promotion


def test_bfloat16_computes_in_bfloat16():
    dense = nn.Dense(4)
    x = jnp.ones((2, 3))
    variables = dense.init(jax.random.key(0), x)
    found = InDtype(dense, "bfloat16", jnp.bfloat16).apply(variables, x)
    assert found.dtype == jnp.bfloat16
    returned = InDtype(dense, "bfloat16").apply(variables, x)
    assert returned.dtype == jnp.float32
    np.testing.assert_array_equal(found.astype(jnp.float32), returned)
    np.testing.assert_allclose(found, dense.apply(variables, x), atol=0.03)


@pytest.mark.parametrize(
    ("dtype", "named"),
    [("float32", jax.lax.Precision.HIGHEST), ("tf32", jax.lax.Precision.HIGH)],
)
def test_products_on_a_gpu_are_what_the_dtype_says(dtype, named, monkeypatch):
    """Also of the gradient, which is traced later."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    dense = nn.Dense(4, use_bias=False)
    x = jnp.ones((2, 3))
    variables = dense.init(jax.random.key(0), x)

    def loss(variables):
        return InDtype(dense, dtype).apply(variables, x).sum()

    products = [
        equation.params["precision"]
        for equation in jax.make_jaxpr(jax.grad(loss))(variables).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert products == [(named, named)] * 2


def test_bfloat16_trains_and_predicts_nearly_the_same():
    """One step of a small network; parameters, optimiser and losses stay float32."""

    def train(dtype):
        config = tiny.get_config()
        config.dtype = dtype
        config = complete(config)
        dataset = build_dataset(config, "train")
        sampler = build_train_sampler(config, dataset)
        loaded = [load_episode(dataset, sampler(i), config.side) for i in range(2)]
        batch = jax.tree.map(lambda *x: np.stack(x), *loaded)
        weights = build_weights(config)
        state = build_state(config, weights, 10)
        predict = build_predictor(config, jax.tree.map(jnp.copy, state.params), weights)
        margin = predict(jax.tree.map(lambda x: x[:1], batch))
        step = build_train_step(config, 10, images=60)
        return *step(state, weights, batch, jax.random.key(0)), margin

    _, exact, margin = train("float32")
    state, rounded, about = train("bfloat16")
    for leaf in jax.tree.leaves((state.params, state.opt_state, rounded, about)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert float(exact["loss"]) != float(rounded["loss"]), "it isn't float32"
    np.testing.assert_allclose(rounded["loss"], exact["loss"], rtol=0.02)
    np.testing.assert_allclose(rounded["grad_norm"], exact["grad_norm"], rtol=0.2)
    np.testing.assert_allclose(about, margin, atol=0.1 * np.abs(margin).max())


@pytest.mark.parametrize(("ampere", "expected"), [(True, "tf32"), (False, "float32")])
def test_auto_is_tf32_where_the_device_has_it(ampere, expected, monkeypatch):
    monkeypatch.setattr(precision, "from_ampere_on", lambda: ampere)
    config = quickstart.get_config()
    assert config.dtype == "auto", "the default"
    config = complete(config)
    assert resolve_dtype(config.dtype) == expected
    both = precision.in_dtype(build_model(config), build_backbone(config), config.dtype)
    assert [both[0].dtype, both[1].module.dtype] == [expected] * 2
    predict = build_predictor(config, {}, {})
    assert predict.model.dtype == expected, "as evaluate, predict and figures"
    assert build_cosine_predictor(config, {}).backbone.module.dtype == expected
    for dtype in precision.DTYPES:
        assert precision.resolve_dtype(dtype) == dtype
    config.dtype = "float16"
    with pytest.raises(InputError, match="choose auto, float32, tf32, bfloat16"):
        complete(config)

"""A run that nobody trained, and a train step that nobody runs: made in a second."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from commands import ROOT, SHRUNK, overrides

from qpenet_jax.backbones.registry import weight_shapes
from qpenet_jax.core.types import Episode, TrainState
from qpenet_jax.runs.build import (
    build_backbone,
    build_weights,
    complete,
    is_released,
    params_like,
)
from qpenet_jax.runs.checkpoints import open_checkpoints
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.folder import WEIGHTS, claim, weights_hash
from qpenet_jax.training.train import build_state, build_train_step

STEP = 3
SIDE = SHRUNK["side"]


def small_config():
    """The quick start, shrunk: EfficientNet-Lite0 on shapes, and 16 channels."""
    fields = SHRUNK | {"model__shared_reducer": False, "recipe": "stable"}
    return complete(load_config(ROOT / "configs/quickstart.py", overrides(**fields)))


def random_params(config):
    """Parameters by NumPy of the size that initialisation gives them."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, params_like(config))


def untrained_run(workdir: Path, config=None) -> Path:
    """Write such a run, as training would leave it after three steps."""
    config = config or small_config()
    claim(workdir, config, {WEIGHTS: weights_hash(build_weights(config))})
    step, params = jnp.array(STEP, jnp.int32), random_params(config)
    with open_checkpoints(workdir) as checkpoints:
        checkpoints.save(TrainState(step, params, optax.EmptyState()))
        checkpoints.add_scores(STEP, {})
    return workdir


def traced_step(config):
    """Return the shapes of the metrics of a step of a config's training."""
    weights = weight_shapes(build_backbone(config), deep=is_released(config))
    b, k, side = config.batch_size, config.shots, config.side
    shapes = (b, side, side), (b, k, side, side)
    query, supports = (jax.ShapeDtypeStruct((*s, 3), jnp.uint8) for s in shapes)
    query_mask, masks = (jax.ShapeDtypeStruct(s, jnp.uint8) for s in shapes)
    batch = Episode(query, query_mask, supports, masks)
    state = jax.eval_shape(lambda given: build_state(config, given, 10), weights)
    step = build_train_step(config, 10, images=100)
    after, metrics = jax.eval_shape(step, state, weights, batch, jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    return metrics

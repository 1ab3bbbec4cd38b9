"""A batch that several devices share: nothing but gradients and sums moves."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import tiny_config

from qpenet_jax.core.types import Episode
from qpenet_jax.data.augmentation import Augmentation, draw
from qpenet_jax.data.device_augmentation import (
    RawEpisode,
    augment_episodes,
    device_draws,
)
from qpenet_jax.runs.build import build_weights
from qpenet_jax.training.batches import shardings
from qpenet_jax.training.train import build_state, build_train_step

GRID = 5
"""Side of the features of 33 pixels; no parameter has such a dimension."""

MOVES = (
    r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?[(]"
)
"""An operation of XLA that moves arrays between devices, and their shapes."""


def one_step(accumulate=1):
    """Return what moves between this process's devices in a step, and its metrics."""
    config = tiny_config(batch_size=4, shots=2, side=33, accumulate=accumulate)
    rng = np.random.default_rng(0)

    def drawn(values, *shape):
        return rng.integers(0, values, (4, *shape), np.uint8)

    side, shots = (33, 33), (2, 33, 33)
    batch = Episode(
        drawn(256, *side, 3), drawn(2, *side), drawn(256, *shots, 3), drawn(2, *shots)
    )
    weights = build_weights(config)
    state = build_state(config, weights, 10)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    replicated, split = shardings(4, accumulate)
    state, frozen = jax.device_put((state, weights), replicated)
    inputs = state, frozen, jax.device_put(batch, split), jax.random.key(2)
    step = build_train_step(config, 10, images=60)
    moved = [
        [kind, [int(n) for n in dims.split(",") if n]]
        for shapes, kind in re.findall(MOVES, step.lower(*inputs).compile().as_text())
        for dims in re.findall(r"[a-z0-9]+[[]([0-9,]*)[]]", shapes)
    ]
    _, metrics = step(*inputs)
    found = {"moved": moved, "parameters": parameters, "devices": split.mesh.size}
    return found | {name: float(metrics[name]) for name in ("loss", "grad_norm")}


def check_augmentation():
    """Check that devices augment what they share alone, to the same bits as one."""
    rng, size = np.random.default_rng(0), (30, 40)
    draws = [
        device_draws(draw(rng, Augmentation(), size, 25), size, 50) for _ in range(8)
    ]
    draws = jax.tree.map(lambda *x: np.stack(x).reshape(4, 2, *x[0].shape), *draws)
    images = rng.integers(0, 256, (4, 2, 64, 64, 3), np.uint8)
    raw = RawEpisode(images, rng.integers(0, 2, images.shape[:-1], np.uint8), draws)
    split = shardings(4)[1]
    placed = jax.device_put(raw, split)
    pairs = zip(*(augment_episodes(x, side=25) for x in (raw, placed)), strict=True)
    for whole, part in pairs:
        assert part.sharding.is_equivalent_to(split, part.ndim)
        np.testing.assert_array_equal(whole, part)
    text = augment_episodes.lower(placed, side=25).compile().as_text()
    assert not re.search(MOVES, text)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_only_gradients_and_sums_move_between_devices():
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    one, (four, parts) = one_step(), json.loads(done.stdout.splitlines()[-1])
    assert [found["devices"] for found in (one, four, parts)] == [1, 4, 2]
    assert one["moved"] == []
    # Neither images nor features are gathered or handed on, also not where a step goes
    # through its batch in parts ...
    for found in (four, parts):
        assert {kind for kind, _ in found["moved"]} == {"all-reduce"}
        assert not any({GRID, GRID**2} & set(shape) for _, shape in found["moved"])
    # ... but every gradient is summed over the devices, and so are losses and counts.
    elements = sum(math.prod(shape) for _, shape in four["moved"])
    parameters = one["parameters"]  # those that two equations share are moved twice
    assert parameters <= elements <= 2 * parameters + 100
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


if __name__ == "__main__":
    check_augmentation()
    print(json.dumps([one_step(), one_step(accumulate=2)]))

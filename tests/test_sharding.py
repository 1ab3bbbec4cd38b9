"""A batch that several devices share: nothing but gradients and sums moves."""

import json
import math
import os
import subprocess
import sys

import pytest

GRID = 5
"""Side of the features of 33 pixels; no parameter has such a dimension."""

PROGRAM = """
import json, re
import jax, jax.numpy as jnp, numpy as np
import flax.linen as nn
from qpenet_jax.backbones.registry import Backbone
from qpenet_jax.core.types import Episode
from qpenet_jax.models.losses import LossWeights
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.training.batches import shardings
from qpenet_jax.training.step import init_state, make_train_step


class Patches(nn.Module):
    @nn.compact
    def __call__(self, images):
        padded = jnp.pad(images, ((0, 0), (0, 7), (0, 7), (0, 0)))
        return {"patches": nn.Conv(12, (8, 8), (8, 8), padding="VALID")(padded)}


net = Backbone(Patches(), ("patches",), 12)
model = QPENet(channels=16, heads=2, ffn_features=32)
tx = Optimizer(lr=0.01, lr_factor=1.0).build(10)
side, b, k = 33, 4, 2
rng = np.random.default_rng(0)
batch = Episode(
    rng.integers(0, 256, (b, side, side, 3), np.uint8),
    rng.integers(0, 2, (b, side, side), np.uint8),
    rng.integers(0, 256, (b, k, side, side, 3), np.uint8),
    rng.integers(0, 2, (b, k, side, side), np.uint8),
)
weights = net.module.init(jax.random.key(1), jnp.zeros((1, 33, 33, 3)))["params"]
initial = init_state(model, tx, channels=net.channels, key=jax.random.key(0))
told = {"parameters": sum(p.size for p in jax.tree.leaves(initial.params))}


def one_step(batch_split, mesh, replicated, accumulate=1):
    step = make_train_step(
        model, net, tx, LossWeights(), mesh, accumulate=accumulate
    )
    fresh = jax.tree.map(jnp.copy, initial)
    state, frozen = jax.device_put((fresh, weights), replicated)
    inputs = state, frozen, jax.device_put(batch, batch_split), jax.random.key(2)
    text = step.lower(*inputs).compile().as_text()
    moved = [
        [kind, [int(n) for n in dims.split(",") if n]]
        for shapes, kind in re.findall(
            r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute|"
            r"reduce-scatter)(?:-start)?[(]",
            text,
        )
        for dims in re.findall(r"[a-z0-9]+[[]([0-9,]*)[]]", shapes)
    ]
    _, metrics = step(*inputs)
    return {"moved": moved} | {n: float(metrics[n]) for n in ("loss", "grad_norm")}


replicated, split = shardings(4)
assert split.mesh.size == 4
told["four"] = one_step(split, split.mesh, replicated)
replicated, split = shardings(4, accumulate=2)
assert split.mesh.size == 2
told["parts"] = one_step(split, split.mesh, replicated, accumulate=2)
one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
told["one"] = one_step(one, None, one)
print(json.dumps(told))
"""


@pytest.mark.slow
def test_only_gradients_and_sums_move_between_devices():
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    one, four = told["one"], told["four"]
    assert one["moved"] == []
    # Neither images nor features are gathered or handed on ...
    assert {kind for kind, _ in four["moved"]} == {"all-reduce"}
    # ... but every gradient is summed over the devices, and so are losses and counts.
    elements = sum(math.prod(shape) for _, shape in four["moved"])
    parameters = told["parameters"]  # those that two equations share are moved twice
    assert parameters <= elements <= 2 * parameters + 100
    assert not any({GRID, GRID**2} & set(shape) for _, shape in four["moved"])
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    # Nor is anything else where a step goes through its batch in parts.
    parts = told["parts"]
    assert {kind for kind, _ in parts["moved"]} == {"all-reduce"}
    assert not any({GRID, GRID**2} & set(shape) for _, shape in parts["moved"])

"""What steps will need in memory, on the paths that no machine of the tests runs."""

import re

import jax
import jax.numpy as jnp
import pytest

from qpenet_jax.benchmark import jax_side as ours
from qpenet_jax.benchmark import memory_plans as memory
from qpenet_jax.benchmark import speed
from qpenet_jax.benchmark.memory_plans import plan, planned
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.cli.main import main
from qpenet_jax.models import ops

# Of the plans that users get.
pytestmark = pytest.mark.usefixtures("optimised_code")

GIB = 2**30
NETWORK = {"channels": 16, "heads": 2, "ffn_features": 24}


@pytest.mark.parametrize(
    ("what", "shots", "batch", "limit"),
    [("eval", 5, 1, 1.5), ("train", 1, 4, 6), ("train", 5, 4, 8)],
)
def test_a_gpu_has_room_at_473_pixels(what, shots, batch, limit):
    """By XLA's CPU compiler, of the formulations that GPUs take; ResNet-50."""
    found = plan(Case(what, shots=shots, batch=batch), "cuda")
    assert found["temporaries"] <= limit * GIB


def test_attention_off_the_cpu_holds_some_of_its_scores():
    """All scores of 5 shots and 4 images take 7.7 GiB, and a gradient needs several."""
    query, keys = (
        jax.ShapeDtypeStruct((4, n, 8, 32), jnp.float32) for n in (3600, 5 * 3600)
    )
    mask = jax.ShapeDtypeStruct((4, 5 * 3600), bool)

    def gradients(query, key, value, mask):
        attend = lambda *x: ops.attention(*x, mask).sum()  # noqa: E731
        return jax.grad(attend, (0, 1, 2))(query, key, value)

    found = planned(gradients, (query, keys, keys, mask), "cuda")
    assert found["temporaries"] <= 1.5 * GIB
    assert found["inputs"] == 4 * (4 * 256 * 11 * 3600) + 4 * 5 * 3600


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_inputs_are_weights_and_batch(platform):
    case = Case("eval", shots=2, batch=3, size=33, network=NETWORK)
    found = plan(case, platform)
    weights = jax.eval_shape(lambda: ours.random_weights(case))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights))
    # Of nine images RGB, mask and padding; what no step uses is left out.
    assert 4 * parameters < found["inputs"] + 9 * 33**2 * 2
    assert found["inputs"] <= 4 * parameters + 9 * 33**2 * 5
    assert found["temporaries"] > 0


def test_every_step_has_a_plan_for_each_platform(monkeypatch):
    monkeypatch.setattr(memory, "plan", lambda case, platform: (case, platform))
    settings = Settings(("memory",), (1, 5), (4,), size=33, released=True)
    found = speed.benchmark(settings)
    assert found["cases"] == [], "nothing is run"
    names = ["eval, 1 shot", "eval, 5 shots", "train, 1 shot", "train, 5 shots"]
    expected = [f"released {name}, batch 4, float32" for name in names]
    assert [step["name"] for step in found["memory"]] == expected
    for step in found["memory"]:
        assert list(step["plans"]) == ["cpu", "cuda"]
        for platform, (case, asked) in step["plans"].items():
            assert (str(case), asked) == (step["name"], platform)


def test_the_table_of_known_plans(monkeypatch, capsys):
    def benchmark(settings, config=None):
        assert settings == Settings(("memory",), shots=(5,))
        return {"facts": facts, "cases": [], "memory": [step]}

    names = ("backbone", "size", "weights", "seed", "dropout", "device", "platform")
    names += ("cpu", "cores", "python", "date")
    facts = {name: f"[{name}]" for name in names} | {"versions": {"jax": "1"}}
    sizes = {"cpu": (1, 0.5), "cuda": (6, 0.25)}
    plans = {
        platform: {"temporaries": int(t * GIB), "inputs": int(i * GIB)}
        for platform, (t, i) in sizes.items()
    }
    step = {"name": "train, 5 shots", "plans": plans}
    monkeypatch.setattr(speed, "benchmark", benchmark)
    main(["benchmark", "memory", "--shots", "5"])
    page = re.sub(" +", " ", capsys.readouterr().out)
    assert "| train, 5 shots | 1.00 | 1.50 | 6.00 | 6.25 |" in page
    assert "NVIDIA GPU is an estimate: it is XLA's CPU compiler's" in page
    assert "seed [seed].\n" in page, "steps have dropout, as training has"
    del step["plans"]["cpu"]
    main(["benchmark", "memory", "--shots", "5"])
    page = re.sub(" +", " ", capsys.readouterr().out)
    assert "| train, 5 shots | 6.00 | 6.25 |" in page
    assert "estimate" not in page, "where a GPU is, its own compiler plans"

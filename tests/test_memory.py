"""The memory that steps will need, on the paths that no machine of the tests runs."""

import jax
import jax.numpy as jnp
import pytest
import tiny  # noqa: F401  # its backbone

from qpenet_jax.benchmark import jax_side
from qpenet_jax.benchmark.jax_side import memory_plans, plan, planned
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.models import ops

# Of plans as users get them.
OPTIMISED = pytest.mark.usefixtures("optimised_code")

GIB = 2**30
NETWORK = {"channels": 8, "heads": 2, "ffn_features": 8}


def test_every_step_has_a_plan_for_each_platform():
    sizes = {"shots": (1,), "batch": (3,), "size": 33}
    settings = Settings(backbone="tiny", network=NETWORK, **sizes)
    ((caption, rows),) = memory_plans(settings)
    assert "the plan for GPUs (cuda) is an estimate" in caption
    names = ["eval, 1 shot, batch 3, float32", "train, 1 shot, batch 3, float32"]
    assert [row["step"] for row in rows] == names
    (case,) = settings.cases(["eval"])
    weights = jax.eval_shape(lambda: jax_side.random_weights(case))
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(weights))
    for name in ("cpu", "cuda"):
        temporaries, whole = (
            GIB * rows[0][f"{name}: {kind}"] for kind in ("temporaries", "in all")
        )
        assert temporaries > 0
        # Of six images RGB, mask and padding; what no step uses is left out.
        assert parameters < whole - temporaries + 6 * 33**2 * 2
        assert whole - temporaries <= parameters + 6 * 33**2 * 5 + 1


@OPTIMISED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "shots", "batch", "limit"),
    [("eval", 5, 1, 1.5), ("train", 1, 4, 6), ("train", 5, 4, 8)],
)
def test_a_gpu_has_room_at_473_pixels(what, shots, batch, limit):
    """By XLA's CPU compiler, of the formulations that GPUs take; ResNet-50."""
    temporaries, _ = plan(Case(what, shots=shots, batch=batch), "cuda")
    assert temporaries <= limit * GIB


@OPTIMISED
def test_attention_off_the_cpu_holds_some_of_its_scores():
    """All scores of 5 shots and 4 images take 7.7 GiB, and a gradient needs several."""
    query, keys = (
        jax.ShapeDtypeStruct((4, n, 8, 32), jnp.float32) for n in (3600, 5 * 3600)
    )
    mask = jax.ShapeDtypeStruct((4, 5 * 3600), bool)

    def gradients(query, key, value, mask):
        attend = lambda *x: ops.attention(*x, mask).sum()  # noqa: E731
        return jax.grad(attend, (0, 1, 2))(query, key, value)

    temporaries, inputs = planned(gradients, (query, keys, keys, mask), "cuda")
    assert temporaries <= 1.5 * GIB
    assert inputs == 4 * (4 * 256 * 11 * 3600) + 4 * 5 * 3600

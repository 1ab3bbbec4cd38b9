"""The real steps exported for CUDA and TPU, which no machine of the tests has.

Exporting shows that every operation has a rule there and which path is taken, not that
it runs, or how fast.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from qpenet_jax.benchmark import jax_side
from qpenet_jax.benchmark.made_up import made_up_episodes
from qpenet_jax.benchmark.settings import Case
from qpenet_jax.models import ops


def exported(what, platform, dtype="float32"):
    """Return the step's text; nothing is computed, and no array is made."""
    case = Case(what, batch=4, shots=1, size=473, dtype=dtype)
    inputs = jax.eval_shape(
        lambda: jax_side.inputs_of(
            case, jax_side.random_weights(case), made_up_episodes(case)
        )
    )
    export = jax.export.export(
        jax.jit(jax_side.step_of(case)),
        platforms=(platform,),
        # Their meaning may change with JAX's version; these aren't kept.
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{name}")
            for name in ("", "Backward")
        ],
    )
    lines = export(*inputs).mlir_module().splitlines()
    # Where operations come from is no part of the step, and names this file's tests.
    return "\n".join(line for line in lines if not line.startswith("#loc"))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("what", ["eval", "train"])
def test_steps_export_and_leave_the_cpus_paths_out(what, platform):
    text = exported(what, platform)
    # 14 of the backbone aren't 1x1, in a function that evaluation calls for support and
    # for query. QPENet: 3 each in PPG, DPE and GBC, 5 in FFA; in training 3 more in
    # GBC, 1 in FFA, and of each the gradients of input and kernel.
    count = {"eval": 14 + 14, "train": 14 + 3 * 18}[what]
    assert text.count("stablehlo.convolution") == count
    assert text.count("call @__call__(") == {"eval": 2, "train": 1}[what]
    # Two layers of attention in blocks of queries, and nothing that the CPU's paths
    # would bring: images one by one, blocks of keys.
    assert text.count("stablehlo.while") == {"eval": 2, "train": 4}[what]
    on_cpu = exported(what, "cpu")
    assert "stablehlo.while" in on_cpu
    assert on_cpu.count("stablehlo.convolution") < 10


@pytest.mark.standard_promotion
def test_bfloat16_attends_through_cudnn(monkeypatch):
    monkeypatch.setattr(ops, "from_ampere_on", lambda: True)
    version = types.SimpleNamespace(cudnn_get_version=lambda: 91200)
    monkeypatch.setattr(cudnn, "cuda_versions", version)
    text = exported("train", "cuda", "bfloat16")
    assert text.count("@__cudnn$fmhaSoftmax(") == 2, "two layers of cross attention"
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 2
    assert "cudnn" not in exported("train", "cuda")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.5", False), ("8.0", True), ("12.0", True), ("gfx90a", False)],
)
def test_flash_attention_needs_ampere(capability, expected, monkeypatch):
    assert not ops.from_ampere_on(), "a CPU"
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert ops.from_ampere_on() == expected


@pytest.mark.standard_promotion
def test_cudnns_arguments_mean_the_same_as_the_mask(monkeypatch):
    """The call for cuDNN, answered by XLA's implementation."""
    plain = jax.nn.dot_product_attention

    def answered(*args, implementation=None, **options):
        found.append(implementation)
        return plain(*args, **options)

    found = []
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, n, 2, 8)), jnp.bfloat16) for n in (5, 7, 7)
    )
    mask = jnp.array([[0, 1, 0, 0, 1, 1, 0], [1] * 7], bool)
    expected = ops.library_attention(query, key, value, mask)
    monkeypatch.setattr(jax.nn, "dot_product_attention", answered)
    monkeypatch.setattr(ops, "from_ampere_on", lambda: True)
    result = ops.library_attention(query, key, value, mask)
    assert found == ["cudnn"]
    np.testing.assert_allclose(
        result.astype(np.float32), expected.astype(np.float32), atol=0.02
    )

"""The benchmark at tiny sizes: what it counts, compares, refuses, reports."""

import dataclasses
import importlib
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpenet_jax.benchmark import jax_side, prediction_speed, speed
from qpenet_jax.benchmark.jax_side import Candidate, flop
from qpenet_jax.benchmark.made_up import SHARES, made_up_episodes
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.benchmark.timing import ROUNDS, differences_between, measure
from qpenet_jax.cli.main import main
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.markdown import table

pytestmark = pytest.mark.standard_promotion

NETWORK = {"channels": 16, "heads": 2, "ffn_features": 24}
EVAL = Case("eval", size=33, network=NETWORK)
TRAIN = dataclasses.replace(EVAL, what="train", batch=2)
BACKBONE = dataclasses.replace(EVAL, what="backbone")
HALF = dataclasses.replace(EVAL, dtype="bfloat16")


# --- FLOP -------------------------------------------------------------------------

IMAGE, KERNEL = (2, 12, 10, 6), (3, 3, 6, 8)
ONE_CONV = 2 * (2 * 12 * 10 * 8) * (3 * 3 * 6)
SQUARE = [(4, 4), (4, 4)]


def conv(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=dims, **options)


def changed(**options):
    return lambda x, kernel: conv(x, kernel, **options)


def gradient(f, *arguments):
    return jax.grad(lambda x, kernel: (f(x, kernel) ** 2).sum(), arguments)


def by_platform(x, k):
    both = {"cpu": lambda x, k: x @ k @ k, "default": jnp.matmul}
    return jax.lax.platform_dependent(x, k, **both)


def either(x, k):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ k, lambda: x @ k @ k)


STRIDED = changed(window_strides=(2, 2))
GROUPED = changed(feature_group_count=6), [IMAGE, (3, 3, 1, 6)]


@pytest.mark.parametrize(
    ("f", "shapes", "expected"),
    [
        (jnp.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (jnp.matmul, [(4, 3, 5), (4, 5, 7)], 4 * 2 * 3 * 5 * 7),
        (conv, [IMAGE, KERNEL], ONE_CONV),
        (STRIDED, [IMAGE, KERNEL], ONE_CONV / 4),
        (changed(rhs_dilation=(2, 2)), [IMAGE, KERNEL], ONE_CONV),
        (*GROUPED, 2 * (2 * 12 * 10 * 6) * 9),
        (lambda x, k: jax.lax.map(lambda y: y @ k, x), [(5, 3, 4), (4, 2)], 5 * 48),
        (jax.jit(jnp.matmul), [(3, 4), (4, 2)], 48),
        (jnp.sum, [(3, 4)], 0),
        (gradient(conv, 0, 1), [IMAGE, KERNEL], 3 * ONE_CONV),
        (gradient(conv, 1), [IMAGE, KERNEL], 2 * ONE_CONV),
        # Zeros between pixels of a gradient don't count, nor what no output needs.
        (gradient(STRIDED, 0), [IMAGE, KERNEL], 2 * ONE_CONV / 4),
        (lambda x, k: jax.jit(lambda: (x @ k, x @ k @ k))()[0], SQUARE, 2 * 4**3),
        # The formulation of other platforms counts, and the dearest branch.
        (by_platform, SQUARE, 2 * 4**3),
        (either, SQUARE, 4 * 4**3),
    ],
)
def test_flop_of_known_operations(f, shapes, expected):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert flop(jax.make_jaxpr(f)(*arguments)) == expected


# --- inputs, timing, comparisons, processes ---------------------------------------


def test_made_up_episodes():
    case = Case("eval", shots=2, batch=3, size=65)
    episode = made_up_episodes(case)
    assert episode.query_image.shape == (3, 65, 65, 3)
    assert episode.support_images.shape == (3, 2, 65, 65, 3)
    assert episode.support_masks.shape == (3, 2, 65, 65)
    for found, again in zip(episode, made_up_episodes(case), strict=True):
        np.testing.assert_array_equal(found, again)
    masks = np.concatenate([episode.query_mask[:, None], episode.support_masks], 1)
    low, high = SHARES
    for mask in masks.reshape(-1, 65, 65):
        assert set(np.unique(mask)) == {0, 1, 255}
        share = (mask == 1).sum() / (mask != 255).sum()
        assert 0.7 * low < share < 1.1 * high


def test_candidates_take_turns():
    now, calls = 0.0, []

    def candidate(name, seconds):
        def call():
            nonlocal now
            calls.append(name)
            now += seconds

        return call

    both = {"JAX": candidate("A", 0.25), "other": candidate("B", 0.5)}
    rows = measure(both, clock=lambda: now)
    assert "".join(calls) == "AB" * (1 + ROUNDS)  # one round warms up
    assert rows == [
        {"variant": "JAX", "ms": [250.0] * 3, "ratio": [1.0] * 3},
        {"variant": "other", "ms": [500.0] * 3, "ratio": [0.5] * 3},
    ]
    calls.clear()
    measure({"A": candidate("A", 2.0), "B": candidate("B", 4.0)}, 60.0, lambda: now)
    assert "".join(calls) == "AB" * (1 + 10)  # 6 s each


def test_short_steps_are_repeated():
    calls, clock = [], itertools.count(0, 0.01).__next__
    (row,) = measure({"": lambda: calls.append(0)}, seconds=0.035, clock=clock)
    assert len(calls) == 1 + ROUNDS * (1 + 4), "the first of a turn isn't timed"
    np.testing.assert_allclose(row["ms"], 10 / 4)


def margins(*values):
    return {"margin": np.array(values, np.float32)}


def test_differences():
    given = margins(2.0, -1.0, 1e-4), margins(2.0002, -1.0, -1e-4)
    found = differences_between(*given, EVAL, "eager")
    assert found["margin"] == pytest.approx(1e-4, rel=1e-2)
    assert found["masks"] == 0  # the third pixel is a tie
    given = margins(2, -1), margins(2.1, -1)
    assert differences_between(*given, HALF, "eager")["masks"] == 0


@pytest.mark.parametrize(
    ("case", "found", "expected", "named"),
    [
        (EVAL, margins(2.0, -1.0), margins(2.01, -1.0), "margin"),
        (EVAL, margins(np.nan, -1.0), margins(2.0, -1.0), "margin"),
        (HALF, margins(2.0, -0.1), margins(2.0, 0.1), "masks"),
        (TRAIN, {"loss": np.array(1.001)}, {"loss": np.array(1.0)}, "loss"),
        (TRAIN, {"gradient": np.ones(4)}, {"gradient": np.zeros(4) + 1.02}, "gradient"),
    ],
)
def test_differences_that_are_refused(case, found, expected, named):
    with pytest.raises(InputError, match=f"{named} of JAX and eager differ"):
        differences_between(found, expected, case, "eager")


def test_variants_are_compared_and_a_failing_compiler_is_named():
    def failing():
        raise RuntimeError("no C++ compiler\nand much more")

    slow = Candidate(lambda: time.sleep(0.05), lambda result: margins(1.0))
    both = {"JAX": Candidate(lambda: None, slow.numbers)}
    in_jax, eager = speed.compared_steps(EVAL, both | {"eager": slow}, 0.0)
    assert (in_jax["variant"], in_jax["ratio"][1]) == ("JAX", 1)
    assert (eager["variant"], eager["margin"], eager["masks"]) == ("eager", 0, 0)
    assert eager["ms"][1] >= 50 > in_jax["ms"][1]
    broken = slow._replace(call=failing)
    with pytest.raises(InputError, match=r"compile fails .*no C.*out with --variants"):
        speed.compared_steps(EVAL, both | {"compile": broken}, 0.0)
    with pytest.raises(RuntimeError, match="no C"):
        speed.compared_steps(EVAL, both | {"eager": broken}, 0.0)
    other = slow._replace(numbers=lambda result: margins(1.1))
    with pytest.raises(InputError, match="margin of JAX and compile differ by"):
        speed.compared_steps(EVAL, both | {"compile": other}, 0.0)


@pytest.mark.slow
def test_a_case_in_processes_of_its_own():
    before = time.time()
    settings = Settings(seconds=0.0)
    for name, row in zip(
        ("JAX", "JAX, cached"), speed.process_rows(BACKBONE, settings), strict=True
    ):
        assert (row["step"], row["variant"]) == (str(BACKBONE), name)
        assert 0 < row["start, s"] < time.time() - before
        assert 20 < row["imports, MiB"] < row["MiB"] < 4000
    unknown = dataclasses.replace(BACKBONE, backbone="nowhere")
    with pytest.raises(InputError, match=r"benchmark\.jax_side failed: .*nowhere"):
        speed.process_rows(unknown, settings)


# --- the whole --------------------------------------------------------------------


def assert_quartiles(*values):
    for low, middle, high in values:
        assert 0 < low <= middle <= high


SMALL = {"shots": (1,), "batch": (1,), "size": 33, "seconds": 0.0}


def measured(**options):
    return speed.benchmark(Settings(**SMALL | options))


def test_report_of_known_numbers():
    steps = [
        {"step": "eval", "variant": "JAX", "ms": [700.0, 800.0, 900.0], "GFLOP": 200.0},
        {"step": "eval", "variant": "eager", "ms": [900.0, 1000.0, 1100.0]},
    ]
    others = [{"shots": 5, "ratio": 0.1234, "what": None}]
    tables = [
        {"caption": "Steps.", "rows": steps},
        {"caption": "More.", "rows": others},
    ]
    result = {"facts": {"cpu": "A CPU", "cores": 2}, "tables": tables}
    cells = [
        ["eval", "JAX", "800 (700-900)", "200"],
        ["eval", "eager", "1,000 (900-1,100)", "-"],
    ]
    of_steps = table(["step", "variant", "ms", "GFLOP"], cells, True)
    of_others = table(["shots", "ratio", "what"], [["5", "0.123", "-"]], True)
    parts = ["cpu: A CPU; cores: 2.", "Steps.", of_steps, "More.", of_others]
    assert speed.benchmark_report(result) == "\n\n".join(parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": ("evil",)}, "--what 'evil': choose eval, train, backbone"),
        ({"dtype": ("float64",)}, "--dtype 'float64': choose float32"),
        ({"dtype": ("tf32",)}, "--dtype tf32 needs an NVIDIA GPU: choose float32"),
        ({"shots": (0,)}, "--shots 0: give 1 or more"),
        ({"batch": (4, 0)}, "--batch 0: give 1 or more"),
        ({"episodes": -1}, "--episodes -1: give 0 or more"),
        ({"workers": (-1,)}, "--workers -1: give 0 or more"),
        ({"photos": 0}, "--photos 0: give 1 or more"),
        ({"seconds": -1.0}, "--seconds -1.0: give 0 or more"),
        ({"size": 64}, "side=64 must be 8 n"),
        ({"backbone": "vgg16"}, "unknown backbone 'vgg16'"),
        ({"against": ("tensorflow",)}, "--against 'tensorflow': choose torch"),
        ({"variants": ("jit",)}, "--variants 'jit': choose eager, channels_last"),
        ({"released": True, "against": ("torch",)}, "--released is measured by itself"),
    ],
)
def test_refused_values(options, message):
    with pytest.raises(InputError, match=message):
        measured(**options)


def test_the_command_writes_tables_and_numbers(tmp_path, capsys):
    words = "benchmark --what backbone --shots 1,2 --batch 1 --size 33 --seconds 0"
    words += f" --backbone efficientnet_lite0 --out {tmp_path / 'out'}"
    main(words.split())
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {"benchmark.md", "benchmark.json"}
    result = json.loads(files["benchmark.json"].read_text())
    facts, (steps,) = result["facts"], result["tables"]
    assert (facts["backbone"], facts["pixels"]) == ("efficientnet_lite0", "33 x 33")
    assert "jax 0." in facts["versions"]
    assert "torch" not in facts["versions"]
    names = [f"backbone, {n}, batch 1, float32" for n in ("1 shot", "2 shots")]
    assert [row["step"] for row in steps["rows"]] == names
    for row in steps["rows"]:
        assert row["variant"] == "JAX"
        assert_quartiles(row["ms"])
        assert row["GFLOP/s"] == pytest.approx(1e3 * row["GFLOP"] / row["ms"][1])
        assert row["% of peak"] > 0
    one, two = (row["GFLOP"] for row in steps["rows"])
    assert two == pytest.approx(1.5 * one)
    page = speed.benchmark_report(result) + "\n"
    assert files["benchmark.md"].read_text() == page == capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": ("torch",)}, r"needs torch, .*pip install -e .\[parity\]"),
        ({"what": ("runtimes",)}, r"docs/export.md says how to install them"),
    ],
)
def test_a_missing_package_is_named(options, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        measured(**options)


# --- against PyTorch --------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_side(one_torch_thread):
    return importlib.import_module("qpenet_jax.benchmark.torch_side")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("backbone", "what"),
    [("resnet50", ("eval", "train")), ("efficientnet_lite0", ("backbone",))],
)
def test_against_the_twin(torch_side, backbone, what):
    variants = ("eager", "channels_last")
    options = {"network": NETWORK, "against": ("torch",), "variants": variants}
    settings = Settings(what=what, backbone=backbone, **SMALL, **options)
    one = next(speed.step_tables(settings))
    assert json.loads(json.dumps(one.rows)) == one.rows
    assert [row["variant"] for row in one.rows] == len(what) * ["JAX", *variants]
    numbers = {"eval": {"margin", "masks"}, "train": {"loss", "gradient"}}
    numbers["backbone"] = {"features"}
    for row in one.rows:
        compared = numbers[row["step"].split(",")[0]]
        assert_quartiles(row["ratio"], row["ms"])
        if row["variant"] != "JAX":
            assert max(row[name] for name in compared) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["eager", "channels_last"])
def test_images_lie_in_memory_as_the_variant_asks(torch_side, variant):
    images = np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3)
    tensor = torch_side.place(images, variant, "cpu")
    np.testing.assert_array_equal(tensor, images)
    assert tensor.permute(0, 3, 1, 2).is_contiguous() == (variant == "eager")


@pytest.mark.parity
@pytest.mark.parametrize("part", ["backbone", "params"])
def test_a_changed_weight_is_refused(torch_side, part):
    weights, episodes = torch_side.random_weights(EVAL), made_up_episodes(EVAL)
    changed = jax.tree.map(lambda x: 1.2 * x, getattr(weights, part))
    weights = weights._replace(**{part: changed})
    both = {
        "JAX": jax_side.jax_candidate(EVAL, weights, episodes),
        "eager": torch_side.torch_candidate(EVAL, "eager", "cpu", episodes),
    }
    with pytest.raises(InputError, match="margin of JAX and eager differ by"):
        speed.compared_steps(EVAL, both, 0.0)


@pytest.mark.parity
def test_run_times_of_onnx_compute_the_same_and_are_timed():
    for package in ("onnxruntime", "jax2onnx"):
        pytest.importorskip(package, reason=f"no {package}: see docs/export.md")
    # OpenVINO sends statistics to its makers.
    sessions = {"onnxruntime": prediction_speed.RUNTIMES["onnxruntime"]}
    case = Case("eval", backbone="efficientnet_lite0", size=33, network=NETWORK)
    rows = prediction_speed.compare_runtimes(case, sessions, 0.0)
    found = [(row["part"], row["variant"]) for row in rows]
    both = ("JAX", "onnxruntime")
    parts = ("encode_query", "decode_1shot")
    assert found == [(part, name) for part in parts for name in both]
    assert rows[3]["difference"] < 1e-4
    for row in rows:
        assert_quartiles(row["ratio"], row["ratio of cores"])

    def other(model):
        return lambda inputs: {"margin": np.ones((1, 33, 33), np.float32)}

    with pytest.raises(InputError, match="margin of JAX and other differ by"):
        prediction_speed.compare_runtimes(case, {"other": other}, 0.0)

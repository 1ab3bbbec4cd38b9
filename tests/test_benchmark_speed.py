"""The benchmark's engine at tiny sizes: what it counts, compares, refuses, reports."""

import dataclasses
import json
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from qpenet_jax.backbones import precision
from qpenet_jax.backbones.torch_layout import to_flax
from qpenet_jax.benchmark import evaluation_speed as protocol
from qpenet_jax.benchmark import jax_side as ours
from qpenet_jax.benchmark import made_up as photos
from qpenet_jax.benchmark import runtimes, speed
from qpenet_jax.benchmark import timing as clocks
from qpenet_jax.benchmark.chart import bar_chart
from qpenet_jax.benchmark.contenders import (
    SHARES,
    differences_between,
    made_up_episodes,
)
from qpenet_jax.benchmark.flop import flop
from qpenet_jax.benchmark.processes import run_child
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.benchmark.speed_tables import benchmark_report
from qpenet_jax.cli.main import main
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.runs.build import complete, initial_params

pytestmark = pytest.mark.standard_promotion

NETWORK = {"channels": 16, "heads": 2, "ffn_features": 24}
EVAL = Case("eval", size=33, network=NETWORK)
TRAIN = dataclasses.replace(EVAL, what="train", batch=2)
BACKBONE = dataclasses.replace(EVAL, what="backbone")


@pytest.fixture(scope="module", autouse=True)
def quickly_done():
    """What is measured here runs for milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "PEAK_ROWS", {"cpu": 64})
        patch.setattr(clocks, "PAUSE", 0.0)
        patch.setattr(clocks, "TURN", 1e-9)
        yield


# --- FLOP -------------------------------------------------------------------------


def conv(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=dims, **options)


def count(f, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flop(jax.make_jaxpr(f)(*arguments))


IMAGE, KERNEL = (2, 12, 10, 6), (3, 3, 6, 8)
ONE_CONV = 2 * (2 * 12 * 10 * 8) * (3 * 3 * 6)


@pytest.mark.parametrize(
    ("f", "shapes", "expected"),
    [
        (jnp.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (jnp.matmul, [(4, 3, 5), (4, 5, 7)], 4 * 2 * 3 * 5 * 7),
        (conv, [IMAGE, KERNEL], ONE_CONV),
        (
            lambda x, k: conv(x, k, window_strides=(2, 2)),
            [IMAGE, KERNEL],
            ONE_CONV // 4,
        ),
        (lambda x, k: conv(x, k, rhs_dilation=(2, 2)), [IMAGE, KERNEL], ONE_CONV),
        (
            lambda x, k: conv(x, k, feature_group_count=6),
            [IMAGE, (3, 3, 1, 6)],
            2 * (2 * 12 * 10 * 6) * 9,
        ),
        (lambda x, k: jax.lax.map(lambda y: y @ k, x), [(5, 3, 4), (4, 2)], 5 * 48),
        (jax.jit(lambda x, k: (x @ k, conv)[0]), [(3, 4), (4, 2)], 48),
        (lambda x: x.sum(), [(3, 4)], 0),
    ],
)
def test_flop_of_known_operations(f, shapes, expected):
    assert count(f, *shapes) == expected


def test_flop_of_gradients():
    def loss(x, kernel):
        return (conv(x, kernel) ** 2).sum()

    assert count(jax.grad(loss, (0, 1)), IMAGE, KERNEL) == 3 * ONE_CONV
    assert count(jax.grad(loss, 1), IMAGE, KERNEL) == 2 * ONE_CONV


def test_flop_of_a_strided_convolutions_input_gradient_leaves_inserted_zeros_out():
    def loss(x, kernel):
        return (conv(x, kernel, window_strides=(2, 2), padding=((1, 1),) * 2)).sum()

    # input gradient alone: the forward result isn't needed for a sum
    assert count(jax.grad(loss), (1, 16, 16, 4), (3, 3, 4, 4)) == pytest.approx(
        2 * (8 * 8 * 4) * (9 * 4), rel=0.01
    )


def test_flop_leaves_out_what_no_output_needs_and_fast_formulations():
    def unused(x, k):
        inner = jax.jit(lambda x, k: (x @ k, x @ k @ k))
        return inner(x, k)[0]

    assert count(unused, (4, 4), (4, 4)) == 2 * 4**3

    def by_platform(x, k):
        both = {"cpu": lambda x, k: x @ k @ k, "default": jnp.matmul}
        return jax.lax.platform_dependent(x, k, **both)

    assert count(by_platform, (4, 4), (4, 4)) == 2 * 4**3

    def either(x, k):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ k, lambda: x @ k @ k)

    assert count(either, (4, 4), (4, 4)) == 4 * 4**3


def test_flop_of_resnet50():
    """He et al. 2016 give 3.8e9 multiplications at 224; layer4 and stride differ here.

    Summed by hand over the layers at 473 pixels.
    """

    def bottleneck(cells, wide, inside, first=0, cells_in=0):
        before = cells_in or cells
        out = 4 * inside
        products = before * wide * inside + cells * 9 * inside**2 + cells * inside * out
        return products + (cells * wide * out if first else 0)

    a, b = 119**2, 60**2
    products = 237**2 * 49 * 3 * 64
    products += bottleneck(a, 64, 64, 1) + 2 * bottleneck(a, 256, 64)
    products += bottleneck(b, 256, 128, 1, a) + 3 * bottleneck(b, 512, 128)
    products += bottleneck(b, 512, 256, 1) + 5 * bottleneck(b, 1024, 256)
    case = Case("backbone")
    drawn = ours.random_weights(case)
    found = ours.count_flop(case, drawn, made_up_episodes(case))
    assert found == 2 * (2 * products)  # two images, two operations a product


# --- inputs, clocks, comparisons, processes ---------------------------------------


def test_made_up_episodes():
    case = Case("eval", shots=2, batch=3, size=65, seed=5)
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


class Clock:
    """A clock that goes on by `tick` when it is read, and by what `wait` is told."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_contenders_take_turns(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(clocks, "perf_counter", clock)

    def contender(name, seconds):
        return lambda: (calls.append(name), clock.wait(seconds))

    both = [contender("A", 0.25), contender("B", 0.5)]
    times = clocks.interleave(both, rounds=4)
    assert "".join(calls) == "AB" * 5  # one round warms up
    np.testing.assert_array_equal(times, [[0.25] * 4, [0.5] * 4])
    times = clocks.interleave(both, seconds=7.5)
    assert [len(t) for t in times] == [10, 10]  # 0.75 s each


def test_short_steps_are_repeated(monkeypatch):
    monkeypatch.setattr(clocks, "TURN", 0.035)
    monkeypatch.setattr(clocks, "perf_counter", Clock(tick=0.01))
    calls = []
    (times,) = clocks.interleave([lambda: calls.append(0)], rounds=2)
    assert len(calls) == 1 + 2 * (1 + 4), "the first of a turn isn't timed"
    np.testing.assert_allclose(times, 0.01 / 4)


def test_rate_of_a_matrix_product(monkeypatch):
    clock, seconds = Clock(), iter([9.0, 0.5, 0.25, 0.5, 0.5, 0.5])
    monkeypatch.setattr(clocks, "perf_counter", clock)
    rate = clocks.matmul_rate(lambda: clock.wait(next(seconds)), 100)
    assert rate == 2 * 100**3 / 0.25  # the first product warms up


def margins(*values):
    return {"margin": np.array(values, np.float32)}


def test_differences():
    ours, theirs = margins(2.0, -1.0, 1e-4), margins(2.0002, -1.0, -1e-4)
    found = differences_between(ours, theirs, EVAL)
    assert found["margin"] == pytest.approx(1e-4, rel=1e-2)
    assert found["masks"] == 0  # the third pixel is a tie
    half = dataclasses.replace(EVAL, dtype="bfloat16")
    found = differences_between(margins(2.0, -1.0), margins(2.1, -1.0), half)
    assert found["masks"] == 0


@pytest.mark.parametrize(
    ("case", "found", "expected", "named"),
    [
        (EVAL, margins(2.0, -1.0), margins(2.01, -1.0), "margin"),
        (EVAL, margins(np.nan, -1.0), margins(2.0, -1.0), "margin"),
        (
            dataclasses.replace(EVAL, dtype="bfloat16"),
            margins(2.0, -0.1),
            margins(2.0, 0.1),
            "masks",
        ),
        (TRAIN, {"loss": np.array(1.001)}, {"loss": np.array(1.0)}, "loss"),
        (TRAIN, {"gradient": np.ones(4)}, {"gradient": np.zeros(4) + 1.02}, "gradient"),
    ],
)
def test_differences_that_are_refused(case, found, expected, named):
    with pytest.raises(InputError, match=f"{named} of JAX and PyTorch differ"):
        differences_between(found, expected, case)


def test_child_process(tmp_path, monkeypatch):
    (tmp_path / "a_child.py").write_text(
        "import json, sys, time\n"
        "told = json.loads(sys.argv[1])\n"
        "print('noise')\n"
        "times = {'started': told['started'], 'running': time.time()}\n"
        "print(json.dumps({'twice': 2 * told['n'], **times}))\n"
        "sys.exit(told['n'] == 3 and 'out of patience')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = time.time()
    found = run_child("a_child", n=2)
    assert found["twice"] == 4
    assert before <= found["started"] < found["running"] <= time.time()
    with pytest.raises(InputError, match=r"a_child failed .*\(out of patience\)"):
        run_child("a_child", n=3)


def test_our_child_process(tmp_path):
    told = {"case": dataclasses.asdict(BACKBONE), "cache": str(tmp_path)}
    before = time.time()
    found = run_child("qpenet_jax.benchmark.jax_side", **told)
    assert found.keys() == {"start_s", "peak_bytes", "import_bytes"}
    assert 0 < found["start_s"] < time.time() - before
    assert 2e7 < found["import_bytes"] < found["peak_bytes"] < 4e9


# --- the whole --------------------------------------------------------------------


def measured(**options):
    fixed = {"size": 33, "network": NETWORK, "seconds": 0.0, "processes": False}
    settings = Settings(**{"shots": (1,), "batch": (1,), **fixed, **options})
    return speed.benchmark(settings)


def squeezed(page):
    """Return Markdown without the spaces that align its tables."""
    return re.sub(" +", " ", page)


def test_without_opponent(tmp_path):
    result = measured(what=("backbone", "eval"))
    assert json.loads(json.dumps(result)) == result
    names = [case["name"] for case in result["cases"]]
    assert names == [
        "eval, 1 shot, batch 1, float32",
        "backbone, 1 shot, batch 1, float32",
    ]
    for case in result["cases"]:
        low, median, high = case["seconds"]
        assert 0 < low <= median <= high
        assert case["rounds"] == 5
    flops = [case["flop"] for case in result["cases"]]
    assert flops[0] > flops[1]
    assert result["peak_flops"]["float32"]["jax"] > 0
    assert result["facts"]["versions"].keys() == {"jax", "jaxlib", "flax", "numpy"}
    page = squeezed(benchmark_report(result))
    assert page.count("| - | - | - | ") == 2
    rate = flops[0] / result["cases"][0]["seconds"][1] / 1e9
    assert f"| {flops[0] / 1e9:,.1f} | {rate:,.0f} | " in page
    bar_chart(result, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.size[0] > 500


def an_invented_result():
    facts = {
        "backbone": "resnet50",
        "size": 473,
        "weights": "random",
        "seed": 0,
        "dropout": "switched off",
        "device": "cpu",
        "platform": "cpu",
        "cpu": "A CPU",
        "cores": 2,
        "python": "3.11",
        "date": "2026-01-01",
        "torch_threads": 2,
        "versions": {"jax": "1", "torch": "2"},
    }
    child = {"start_s": 12.34, "peak_bytes": 3 * 2**30, "import_bytes": 2**28}
    case = {
        "what": "eval",
        "name": "eval, 1 shot, batch 1, float32",
        "dtype": "float32",
        "flop": 200 * 10**9,
        "seconds": [0.7, 0.8, 0.9],
        "torch_seconds": [0.9, 1.0, 1.1],
        "ratio": [0.78, 0.8, 0.85],
        "variant": "channels_last",
        "variants": {"channels_last": 1.0, "compile": "not available (no compiler)"},
        "processes": {
            "cold": child,
            "cached": child,
            "torch": child,
            "memory_ratio": 1.0,
        },
    }
    peaks = {"float32": {"jax": 400e9, "torch": 500e9}}
    run = {
        "network": "resnet50, weights of a file",
        "dtype": "float32",
        "shots": 5,
        "episodes": 1000,
        "seeds": 5,
        "protocol": "ours: PASCAL-5i",
        "seconds_per_episode": 0.25,
        "step_seconds": 1.0,
        "ratio": 0.25,
    }
    return {"facts": facts, "peak_flops": peaks, "cases": [case], "protocol": [run]}


def test_markdown_of_known_numbers():
    page = squeezed(benchmark_report(an_invented_result()))
    assert (
        "| eval, 1 shot, batch 1, float32 | 800 ms | 1.00 s | eager, channels_last | "
        "0.80 (0.78-0.85) | 200.0 | 250 | 50% |"
    ) in page
    assert "torch.compile, channels_last not available (no compiler)" in page
    memory = "3,072 MiB (256)"
    assert (
        f"| 12.3 s | 12.3 s | 12.3 s | {memory} | {memory} | {memory} | 1.00 |" in page
    )
    assert "| 5 | float32 | 1000 x 5 | 250 ms | 1.00 s | 0.25 |" in page
    assert "resnet50, weights of a file; ours: PASCAL-5i" in page
    headers = [line for line in page.splitlines() if line.startswith("|")]
    for line in headers:
        assert line.count("|") in (9, 7), line


def test_chart_of_known_numbers(tmp_path):
    bar_chart(an_invented_result(), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    lengths = [
        max((pixels == colour).all(-1).sum(1))
        for colour in ((213, 94, 0), (0, 114, 178))
    ]
    assert lengths[0] / lengths[1] == pytest.approx(0.8, abs=0.02)
    with pytest.raises(ValueError, match="nothing to draw"):
        bar_chart({**an_invented_result(), "cases": []}, tmp_path / "none.png")


def test_protocol_on_made_up_photos(monkeypatch):
    monkeypatch.setattr(photos, "PHOTOS", 16)
    monkeypatch.setattr(protocol, "perf_counter", Clock(tick=1.0))
    result = measured(what=("protocol",), episodes=2)
    (run,) = result["protocol"]
    assert run["shots"] == 1
    assert run["episodes"] == 2
    assert run["seeds"] == 1
    assert run["dtype"] == "float32"
    # The clock is read before and after each of them.
    assert run["seconds_per_episode"] == 1 / 2
    assert run["step_seconds"] == 1
    assert run["ratio"] == run["seconds_per_episode"] / run["step_seconds"]
    assert "made-up photos" in run["protocol"]
    assert run["network"] == "resnet50, weights random"
    assert result["cases"] == []


def computes_in_bfloat16(workload):
    side = workload.protocol.side
    image = np.zeros((1, side, side, 3), np.uint8)
    mask = np.zeros((1, side, side), np.uint8)
    episode = Episode(image, mask, image[None], mask[None])
    return "bf16" in str(jax.make_jaxpr(workload.predictor)(episode))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_protocol_in_the_dtype_of_the_experiment(dtype, monkeypatch):
    monkeypatch.setattr(precision, "from_ampere_on", lambda: True)
    config = quickstart.get_config()
    config.dtype, config.side, config.dataset.val_images = dtype, 33, 60
    config.dataset.on_few = "drop"
    config = complete(config)
    shapes = jax.eval_shape(lambda: initial_params(config))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    monkeypatch.setattr(Experiment, "untrained", lambda self: params)
    monkeypatch.setattr(protocol, "time_workload", lambda workload: workload)
    settings = Settings(("protocol",), shots=(1, 2), episodes=3)
    for shots, workload in enumerate(protocol.protocol_runs(settings, config), start=1):
        assert workload.dtype == ("tf32" if dtype == "auto" else dtype)
        assert workload.protocol.shots == shots
        assert workload.protocol.episodes == 3
        assert computes_in_bfloat16(workload) == (dtype == "bfloat16")
    assert shots == 2


def test_protocol_in_every_dtype_of_the_settings(monkeypatch):
    monkeypatch.setattr(photos, "PHOTOS", 16)
    monkeypatch.setattr(protocol, "time_workload", lambda workload: workload)
    dtypes = ("float32", "bfloat16")
    settings = Settings(("protocol",), dtype=dtypes, size=33, network=NETWORK)
    workloads = list(protocol.protocol_runs(settings, None))
    assert [workload.dtype for workload in workloads] == [*dtypes]
    assert [*map(computes_in_bfloat16, workloads)] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": ("evil",)}, "--what 'evil': choose eval, train, backbone"),
        ({"dtype": ("float64",)}, "--dtype 'float64': choose float32"),
        ({"dtype": ("tf32",)}, "--dtype tf32 needs an NVIDIA GPU: choose float32"),
        ({"shots": (0,)}, "--shots 0: give 1 or more"),
        ({"batch": (4, 0)}, "--batch 0: give 1 or more"),
        ({"episodes": 0}, "--episodes 0: give 1 or more"),
        ({"workers": (-1,)}, "--workers -1: give 0 or more"),
        ({"seconds": -1.0}, "--seconds -1.0: give 0 or more"),
        ({"seed": -1}, "--seed -1: give 0 or more"),
        ({"variants": ()}, "--variants is empty: give one value or more"),
        ({"network": {"width": 3}}, "network .*unexpected keyword argument 'width'"),
        ({"size": 64}, "side=64 must be 8 n"),
        ({"backbone": "vgg16"}, "unknown backbone 'vgg16'"),
        ({"against": "tensorflow"}, "choose torch"),
        ({"variants": ("jit",)}, "--variants 'jit': choose eager, channels_last"),
    ],
)
def test_refused_values(options, message):
    with pytest.raises(InputError, match=message):
        measured(**options)


def test_the_command_writes_table_numbers_and_chart(tmp_path, monkeypatch, capsys):
    given = []

    def benchmark(settings, config=None):
        given.append((settings, config))
        return an_invented_result()

    monkeypatch.setattr(speed, "benchmark", benchmark)
    words = "benchmark eval --shots 1,5 --batch 2 --size 33 --workers 0 --seconds 3"
    main([*words.split(), "--out", str(tmp_path / "out")])
    expected = Settings(
        ("eval",), shots=(1, 5), batch=(2,), size=33, workers=(0,), seconds=3.0
    )
    assert given == [(expected, None)]
    page = benchmark_report(an_invented_result()) + "\n"
    assert capsys.readouterr().out == page
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {"benchmark.md", "benchmark.json", "benchmark.png"}
    assert files["benchmark.md"].read_text() == page
    assert json.loads(files["benchmark.json"].read_text()) == an_invented_result()


def test_pytorch_is_missing(monkeypatch):
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs torch, .*pip install -e .\[parity\]"):
        measured(against="torch")


# --- against PyTorch --------------------------------------------------------------


@pytest.fixture(scope="module")
def opponent():
    import torch

    from qpenet_jax.benchmark import torch_side as opponent

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting threads spin, and take the cores from XLA's
    yield opponent
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def first():
    """What JAX computes in `EVAL`, and from what."""
    inputs = made_up_episodes(EVAL), ours.random_weights(EVAL)
    return ours.contender(EVAL, inputs[1], inputs[0]).first(), inputs


@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_lite0"])
def test_backbone_weights_go_both_ways(opponent, name):
    drawn = ours.random_weights(Case("eval", name, network=NETWORK)).backbone
    state = opponent.backbone_state(name, drawn)
    net = opponent.twin.backbone(name).net
    assert state.keys() <= net.state_dict().keys()
    net.load_state_dict({**net.state_dict(), **state})
    tensors = {k: v.numpy() for k, v in net.state_dict().items()}
    returned = to_flax(name, tensors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), returned, drawn)


@pytest.mark.parity
def test_against_the_twin(opponent, monkeypatch):
    def interleave(calls, *args, **options):
        for call in calls:
            call()
        return [np.array([2.0, 3, 4, 5, 6]) * n for n in range(1, len(calls) + 1)]

    monkeypatch.setattr(speed, "interleave", interleave)
    variants = ("eager", "channels_last")
    result = measured(what=("train",), against="torch", variants=variants)
    assert json.loads(json.dumps(result)) == result
    (case,) = result["cases"]
    assert case["differences"].keys() == {"loss", "gradient"}
    assert max(case["differences"].values()) < 1e-4
    assert case["variants"].keys() == set(variants)
    assert case["variants"] == dict.fromkeys(variants, 4.0)
    assert case["seconds"] == [3, 4, 5]
    assert case["torch_seconds"] == [6, 8, 10]
    assert case["ratio"] == [0.5, 0.5, 0.5]
    assert case["rounds"] == 5
    assert result["facts"]["torch_threads"] == 1
    assert result["peak_flops"]["float32"].keys() == {"jax", "torch"}
    assert "| train, 1 shot, batch 1, float32 | " in benchmark_report(result)


@pytest.mark.parity
def test_the_fastest_variant_is_chosen(opponent, first, monkeypatch):
    found, inputs = first
    seconds = iter([3.0, 2.0])
    monkeypatch.setattr(
        speed, "interleave", lambda *a, **k: [np.array([next(seconds)])]
    )
    rival, variants = speed.Opponent(opponent, "cpu"), ("eager", "channels_last")
    _, told = speed._fastest(EVAL, rival, variants, found, inputs)
    assert told["variants"] == {"eager": 3.0, "channels_last": 2.0}
    assert told["variant"] == "channels_last"


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["eager", "channels_last"])
def test_the_twin_evaluates_the_same(opponent, first, variant):
    found, inputs = first
    twins = opponent.contender(EVAL, variant, "cpu", *inputs)
    differences = differences_between(found, twins.first(), EVAL)
    assert differences["masks"] == 0
    assert differences["margin"] < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["eager", "channels_last"])
def test_images_lie_in_memory_as_the_variant_asks(opponent, variant):
    images = np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3)
    tensor = opponent._place(images, variant, "cpu")
    np.testing.assert_array_equal(tensor, images)
    assert tensor.permute(0, 3, 1, 2).is_contiguous() == (variant == "eager")


@pytest.mark.parity
@pytest.mark.parametrize("part", ["backbone", "network"])
def test_a_changed_weight_of_the_twin_is_refused(opponent, first, monkeypatch, part):
    found, inputs = first
    if part == "backbone":
        make, name = opponent.backbone_state, "layer2.1.conv2.weight"
        monkeypatch.setattr(opponent, "backbone_state", lambda *a: one_more(make(*a)))
    else:
        make, name = opponent.twin.from_flax, "final.2.0.weight"
        monkeypatch.setattr(opponent.twin, "from_flax", lambda p: one_more(make(p)))

    def one_more(state):
        state[name][0] += 1
        return state

    twins = opponent.contender(EVAL, "eager", "cpu", *inputs)
    with pytest.raises(InputError, match="margin of JAX and PyTorch differ by"):
        differences_between(found, twins.first(), EVAL)


@pytest.mark.parity
def test_a_failing_compiler_is_told(opponent, first, monkeypatch):
    def fail(self):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(opponent.torch.nn.Module, "compile", fail)
    found, inputs = first
    rival = speed.Opponent(opponent, "cpu")
    _, told = speed._fastest(EVAL, rival, ("eager", "compile"), found, inputs)
    assert told["variant"] == "eager"
    assert told["variants"]["compile"] == "not available (no C++ compiler)"
    assert math.isfinite(told["variants"]["eager"])
    with pytest.raises(InputError, match="PyTorch runs none of compile"):
        speed._fastest(EVAL, rival, ("compile",), found, inputs)


@pytest.mark.parity
def test_run_times_of_onnx_compute_the_same_and_are_timed(monkeypatch):
    for package in ("onnxruntime", "jax2onnx"):
        pytest.importorskip(package, reason=f"no {package}: see docs/export.md")
    monkeypatch.delitem(runtimes.RUNTIMES, "openvino")  # it forks to tell its makers
    result = measured(what=("runtimes",), backbone="efficientnet_lite0")
    (found,) = result["runtimes"]
    assert list(found["parts"]) == ["encode_query", "decode_1shot"]
    assert "onnxruntime" in found["differences"]
    assert max(found["differences"].values()) < 1e-4
    for times in found["parts"].values():
        low, middle, high = times["seconds_ratio"]["onnxruntime"]
        assert 0 < low <= middle <= high
    report = benchmark_report(result)
    for text in ("decode_1shot", "JAX / onnxruntime", "of cores' time"):
        assert text in report
    monkeypatch.setattr(runtimes, "EQUAL", 0.0)
    with pytest.raises(InputError, match="onnxruntime differ from ours by"):
        measured(what=("runtimes",), backbone="efficientnet_lite0")


def test_runtimes_need_a_run_time(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"docs/export.md tells how to install them"):
        measured(what=("runtimes",))

"""Batch norm that drifts: against PyTorch and NumPy, and in runs from start to end."""

import contextlib
import copy
import dataclasses
import importlib
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from make_backbone_goldens import _deepen, random_tensor
from qpenet_jax.runs.saved_config import merged
from qpenet_jax.runs.trainer import Trainer
from qpenet_jax.training.drift import drifting_features, drifts
from test_train import ROOT

from qpenet_jax.backbones import convert, registry, torch_layout
from qpenet_jax.backbones.batch_norm import Norm, refolded, statistics_of
from qpenet_jax.backbones.convert import load_weights
from qpenet_jax.backbones.convolutions import Conv
from qpenet_jax.backbones.registry import DEEP, Backbone
from qpenet_jax.backbones.resnet import Layer4, ResNet
from qpenet_jax.backbones.torch_layout import no_statistics, to_flax
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import BATCH_STATISTICS, Episode
from qpenet_jax.runs import config as module
from qpenet_jax.runs import loop
from qpenet_jax.runs.build import build_predictor, complete
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.evaluator import Evaluator
from qpenet_jax.runs.folder import open_run
from qpenet_jax.segmenter import load
from qpenet_jax.training.stopping import Interrupted

pytestmark = [
    pytest.mark.standard_promotion,
    pytest.mark.usefixtures("tiny"),
]

NET = Backbone(
    ResNet((1, 1, 1), deep_stem=True), ("layer3", "layer2"), 1536, deep=Layer4(1)
)
"""One block a stage, with the deep stem and a last stage of one block."""

SIDE = 25
"""Small enough for plain convolutions, which compile in less time than Winograd's."""


@pytest.fixture(scope="module")
def tiny():
    """Let NET be known as the backbone "tiny"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BACKBONES, "tiny", NET)
        yield


@pytest.fixture(scope="module")
def tensors(tiny):
    """A state_dict of NET, by PyTorch's names."""
    names, found = torch_layout.ORIGINALS[ResNet].names, {}
    for path, shape in torch_layout.shapes_of("tiny", True).items():
        layer, _, leaf = path.rpartition("/")
        if leaf == "kernel":
            conv, norm = names(layer)
            found[f"{conv}.weight"] = torch_layout.torch_shape(shape)
            found |= {f"{norm}.{f}": shape[-1:] for f in torch_layout.NORM_FIELDS}
    return {name: random_tensor(name, shape) for name, shape in found.items()}


@pytest.fixture(scope="module")
def weights(tensors):
    params = to_flax("tiny", tensors, deep=True, norms=True)
    return jax.tree.map(jnp.asarray, params)


def as_pytorch(tensors, statistics):
    """Return the state_dict with other statistics."""
    changed = dict(tensors)
    for path, value in flatten_dict(statistics, sep="/").items():
        layer, _, field = path.rpartition("/")
        _, norm = torch_layout.ORIGINALS[ResNet].names(layer)
        changed[f"{norm}.running_{field}"] = np.asarray(value)
    return changed


def largest_difference(ours, theirs):
    """Return it over two trees, relative where values are above 1."""

    def one(a, b):
        return np.max(np.abs(np.asarray(a) - b) / np.maximum(1, np.abs(b)))

    return max(jax.tree.leaves(jax.tree.map(one, ours, theirs)))


# --- One layer, and which steps ------------------------------------------------------


def test_a_layer_against_batch_norm_written_out():
    """Two 1x1 convolutions, three batches: values and running statistics."""
    rng = np.random.default_rng(0)
    shapes = {"first": (5, 7), "second": (7, 4)}
    raw, norms, params, moving = {}, {}, {}, {}
    for name, (inputs, outputs) in shapes.items():
        raw[name] = rng.normal(size=(inputs, outputs))
        gamma, beta, mean = rng.normal(size=(3, outputs))
        var = rng.uniform(0.1, 3, outputs)
        scale = gamma / np.sqrt(var + 1e-5)
        norms[name] = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
        folded = {"kernel": raw[name] * scale, "bias": beta - mean * scale}
        single = {k: np.float32(v) for k, v in (folded | norms[name]).items()}
        params[name] = single
        moving[name] = {k: single[k] for k in ("mean", "var")}

    def layer(name, x, variables):
        conv = Conv(shapes[name][1])
        y, moved = conv.apply(variables, x, mutable=[BATCH_STATISTICS])
        return y, moved[BATCH_STATISTICS]

    for _ in range(3):
        x = rng.normal(size=(2, 3, 4, 5))
        ours, theirs = np.float32(x), x
        for name in shapes:
            variables = {"params": params[name], BATCH_STATISTICS: moving[name]}
            ours, moving[name] = layer(name, np.maximum(ours, 0), variables)

            norm, y = norms[name], np.maximum(theirs, 0) @ raw[name]
            mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
            theirs = (y - mean) / np.sqrt(var + 1e-5) * norm["gamma"] + norm["beta"]
            norm["mean"] = 0.9 * norm["mean"] + 0.1 * mean
            norm["var"] = 0.9 * norm["var"] + 0.1 * var * 24 / 23  # of 2 x 3 x 4 cells
            assert largest_difference(ours, theirs) < 1e-5
    now = {n: {k: norms[n][k] for k in ("mean", "var")} for n in shapes}
    assert largest_difference(moving, now) < 1e-5


def test_a_channel_without_weight_gives_its_shift():
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    params = {"kernel": zero[None], "bias": 3 * one}
    params |= {"gamma": zero, "beta": 3 * one, "mean": one, "var": one}
    variables = {"params": params, BATCH_STATISTICS: {"mean": one, "var": one}}
    x = np.ones((1, 2, 2, 1), np.float32)
    y, _ = Conv(1).apply(variables, x, mutable=[BATCH_STATISTICS])
    np.testing.assert_array_equal(y, np.full_like(x, 3))


def test_it_drifts_from_the_middle_of_an_epoch_on_but_in_the_first():
    def steps(epoch, epochs):
        return [bool(drifts(jnp.array(t), epoch)) for t in range(epoch * epochs)]

    assert steps(4, 3) == [False] * 4 + [False, False, True, True] * 2
    assert steps(5, 2) == [False] * 5 + [False, False, True, True, True]


# --- The train step ------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    safetensors.numpy.save_file(tensors, folder / "original.safetensors")
    return convert.convert("tiny", folder / "original.safetensors", out_dir=folder)


STEPS = 9


def config(converted, **changes):
    fields = {
        "steps": STEPS,
        "dataset.kind": "shapes",
        "dataset.name": "Shapes",
        "dataset.side": 33,
        "dataset.train_images": 20,
        "dataset.val_images": 40,
        "dataset.min_pixels": 64,
        "dataset.on_few": "drop",
        "backbone.name": "tiny",
        "backbone.weights": converted,
        "backbone.drift": True,
        "model.channels": 16,
        "side": SIDE,
        "batch_size": 2,
        "workers": 0,
        "log_every": 1,
        "eval.episodes": 4,
        "eval.seeds": "(0,)",
        "select_on": "novel",
    }
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    return load_config(ROOT / "configs" / "released_pascal.py", words)


@pytest.fixture(scope="module")
def trainer(converted):
    """What a run trains with: compiled once for its steps and for those of the tests.

    Its epochs have five steps: of the second, 5 to 9, the last three drift.
    """
    made = Trainer(complete(config(converted)))
    assert len(made.sampler) // made.config.batch_size == 5
    return made


@pytest.fixture(scope="module")
def initial(trainer):
    return trainer.initial_state()


SETTLED, DRIFTING = 5, 7
"""First steps of two and of three that do not drift, and that do."""


def train(trainer, initial, batches, start, statistics, weights=None):
    """Return the state after a step on every batch, and what each measured."""
    state = dataclasses.replace(initial, step=jnp.int32(start), statistics=statistics)
    state = jax.tree.map(jnp.array, state)  # a copy: the step uses it up
    ours = copy.copy(trainer)
    ours.weights = trainer.placed(weights or trainer.weights)
    state, measured = trainer.placed(state), []
    for batch in batches:
        state, metrics = ours.step(state, batch)
        measured.append({name: float(value) for name, value in metrics.items()})
    return state, measured


@pytest.fixture(scope="module")
def batches():
    """Three batches of two 1-shot episodes."""
    rng = np.random.default_rng(0)

    def batch():
        images = rng.integers(0, 256, (2, 2, SIDE, SIDE, 3), np.uint8)
        masks = np.zeros((2, 2, SIDE, SIDE), np.uint8)
        masks[0, :, 3:20, 7:22], masks[1, :, 9:, :15] = 1, 1
        padding = np.zeros((2, 2, SIDE, SIDE), bool)
        query, support = (
            (x[:, 0] for x in (images, masks)),
            (images[:, 1:], masks[:, 1:]),
        )
        return Episode(*query, *support, padding[:, 0], padding[:, 1:])

    return [batch() for _ in range(3)]


@pytest.fixture(scope="module")
def pytorchs(tensors, batches):
    """The maps of the first batch, and the state_dict after three batches.

    PyTorch's network in training mode, called in the order of the authors' code.
    """
    torch = pytest.importorskip("torch")
    from torchvision.models.resnet import Bottleneck
    from torchvision.models.resnet import ResNet as TorchResNet

    net = TorchResNet(Bottleneck, [1, 1, 1, 1])
    net.fc = torch.nn.Identity()
    _deepen(net)
    for (block,), dilation in ((net.layer3, 2), (net.layer4, 4)):
        block.conv2.stride = block.downsample[0].stride = (1, 1)
        block.conv2.dilation = block.conv2.padding = (dilation, dilation)
    state = {name: torch.from_numpy(x) for name, x in tensors.items()}
    _, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    net.train()
    maps = []

    def layer3(images):
        pixels = np.array(registry.normalize(images))
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        for i in (1, 2, 3):
            x = net.relu(getattr(net, f"bn{i}")(getattr(net, f"conv{i}")(x)))
        layer2 = net.layer2(net.layer1(net.maxpool(x)))
        found = net.layer3(layer2)
        maps.append(torch.cat([found, layer2], 1).permute(0, 2, 3, 1).numpy())
        return found

    with torch.no_grad():
        for batch in batches:
            query = layer3(batch.query_image)
            support = layer3(batch.support_images[:, 0])
            mask = torch.from_numpy(batch.support_masks[:, :, ::8, ::8] == 1)
            for x in (query, support, support * mask):
                net.layer4(x)
    return maps[:2], {name: x.numpy() for name, x in net.state_dict().items()}


@pytest.mark.parity
def test_three_steps_move_the_statistics_as_in_pytorch(
    trainer, initial, tensors, batches, pytorchs
):
    start = statistics_of(trainer.weights)
    state, _ = train(trainer, initial, batches, DRIFTING, start)
    _, theirs = pytorchs
    counts = (theirs[f"{x}.num_batches_tracked"] for x in ("bn1", "layer4.0.bn1"))
    assert [int(count) for count in counts] == [6, 9]
    after = tensors | {name: theirs[name] for name in tensors}
    expected = statistics_of(to_flax("tiny", after, deep=True, norms=True))
    assert largest_difference(state.statistics, expected) < 1e-5
    assert largest_difference(start, expected) > 0.1
    # What evaluates the run is folded with them, as a converted checkpoint would be.
    folded = to_flax("tiny", after, deep=True)
    ours = refolded(trainer.weights, state.statistics)
    assert jax.tree.structure(ours) == jax.tree.structure(folded)
    assert largest_difference(ours, folded) < 1e-5


@pytest.mark.parity
def test_features_are_normalised_by_the_batch_as_in_pytorch(trainer, batches, pytorchs):
    see = jax.jit(drifting_features, static_argnums=0)
    start = statistics_of(trainer.weights)
    (support, query), _ = see(NET, trainer.weights, start, batches[0])
    for ours, theirs in zip((query, support[:, 0]), pytorchs[0], strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_steps_that_do_not_drift_use_the_statistics_as_they_are(
    trainer, initial, tensors, batches
):
    start = statistics_of(trainer.weights)
    moved = jax.tree.map(lambda x: 3 * x + 0.5, start)
    folded = to_flax("tiny", as_pytorch(tensors, moved), deep=True, norms=True)
    deep = {**start, DEEP: moved[DEEP]}

    def measured(statistics, weights=None):
        after, (found,) = train(
            trainer, initial, batches[:1], SETTLED, statistics, weights
        )
        jax.tree.map(np.testing.assert_array_equal, after.statistics, statistics)
        return found

    before, now, last = map(measured, (start, moved, deep))
    theirs = measured(moved, folded)
    # No hard decision comes before these, which a rounding could turn over.
    for name in ("rms_F_q", "rms_F_s", "loss_pre", "loss_bg_q", "loss_bg_s"):
        np.testing.assert_allclose(now[name], theirs[name], rtol=1e-5)
        assert abs(now[name] / before[name] - 1) > 1e-4
        assert last[name] == before[name]
    assert last["loss_aux"] != before["loss_aux"], "the prior is made of layer4"


def test_drifting_steps_see_the_batch_alone(trainer, initial, batches):
    start = statistics_of(trainer.weights)
    other = jax.tree.map(lambda x: 2 * x, start)
    one, two = (
        train(trainer, initial, batches[:2], DRIFTING, s) for s in (start, other)
    )
    assert one[1] == two[1]
    jax.tree.map(np.testing.assert_array_equal, one[0].params, two[0].params)
    _, settled = train(trainer, initial, batches[:1], SETTLED, start)
    assert abs(one[1][0]["rms_F_q"] / settled[0]["rms_F_q"] - 1) > 1e-3


# --- Converted files -----------------------------------------------------------------


def test_a_converted_file_holds_the_norms_for_those_who_ask(
    converted, tensors, weights
):
    plain = load_weights("tiny", converted, deep=True)
    jax.tree.map(
        np.testing.assert_array_equal, plain, to_flax("tiny", tensors, deep=True)
    )
    with_norms = load_weights("tiny", converted, deep=True, norms=True)
    jax.tree.map(np.testing.assert_array_equal, with_norms, weights)
    last = with_norms[DEEP]["layer4_0"]["conv2"]
    assert set(last) == {"kernel", "bias", *Norm._fields}
    name = "layer4.0.bn2.running_var"
    np.testing.assert_array_equal(last["var"], tensors[name])
    like = no_statistics("tiny")
    assert jax.tree.map(np.shape, like) == jax.tree.map(
        np.shape, statistics_of(with_norms)
    )


def test_a_file_of_an_earlier_version_serves_all_but_drift(
    converted, tensors, tmp_path
):
    old = tmp_path / "old.safetensors"
    params = to_flax("tiny", tensors, deep=True)
    convert.save_weights(old, "tiny", params, converted)
    plain = load_weights("tiny", old, deep=True)
    jax.tree.map(np.testing.assert_array_equal, plain, params)
    told = "without batch norm, which config.backbone.drift needs: run `qpenet convert"
    with pytest.raises(InputError, match=rf"old.safetensors was converted {told}"):
        load_weights("tiny", old, deep=True, norms=True)
    flat = safetensors.numpy.load_file(converted)
    flat["conv2/var"] = -flat["conv2/var"]
    del flat["conv1/gamma"]
    metadata = {"format": convert.FORMAT, "backbone": "tiny"}
    safetensors.numpy.save_file(flat, old, metadata)
    with pytest.raises(InputError, match=r"missing: conv1/gamma; .*variance: conv2/v"):
        load_weights("tiny", old, deep=True, norms=True)


# --- Configs and runs ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({"variant": "full"}, "config.variant='released'"),
        ({"backbone__name": "efficientnet_lite0"}, "a ResNet as config.backbone.name"),
        ({"shots": 5}, "config.shots=1"),
        ({"dtype": "bfloat16"}, "config.dtype='float32' or 'tf32'"),
    ],
)
def test_drift_is_refused_where_it_repeats_nothing(converted, changes, needs):
    with pytest.raises(InputError, match=r"drift=True repeats .* and needs") as caught:
        complete(config(converted, **changes))
    assert needs in str(caught.value)


@pytest.mark.parametrize("name", ["released_pascal", "quickstart"])
def test_by_default_nothing_drifts(name, monkeypatch):
    made = importlib.import_module(f"configs.{name}").get_config()
    assert made.backbone.drift is False
    saved = json.loads(made.to_json())
    del saved["backbone"]["drift"]  # a run of before
    assert merged(saved, "config.json").backbone.drift is False
    ours = complete(made)
    tx = ours.optimizer.build(10)
    state = jax.eval_shape(lambda: ours.init(tx))
    assert state.statistics == {}
    assert state.learned is state.params
    assert BATCH_STATISTICS not in ours.learned_like()
    given = []
    monkeypatch.setattr(
        module, "make_train_step", lambda *inputs, **_: given.append(inputs)
    )
    ours.train_step(tx, 7)
    assert given[0][-1] is None


@pytest.fixture(scope="module")
def finished(converted, tmp_path_factory):
    """A run of two short epochs, stopped and resumed among steps that drift.

    Its folder, and what was to be scored: for the selection and as the result.
    """
    workdir, made = tmp_path_factory.mktemp("drift") / "run", config(converted)
    tell, scored = loop.Progress.tell, []

    def killed(self, step, saved):
        if step == STEPS - 2:
            os.kill(os.getpid(), signal.SIGTERM)
        tell(self, step, saved)

    def miou(self, params):
        scored.append(jax.tree.map(np.asarray, params))
        return 50.0

    def result(self, params, tell, **facts):
        miou(self, params)
        return {"miou": 0.5, "fb_iou": 0.5}, np.zeros((4, 4, 3), np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "miou", miou)
        patch.setattr(Evaluator, "__call__", result)
        patch.setattr(Evaluator, "report", lambda self: "")
        with patch.context() as stopping:
            stopping.setattr(loop.Progress, "tell", killed)
            with pytest.raises(Interrupted, match=f"step {STEPS - 1} is saved"):
                loop.train(made, workdir)
        loop.train(made, workdir)
    return workdir, scored


def test_a_stopped_run_goes_on_to_the_same_bits(finished, trainer, initial):
    state = trainer.placed(jax.tree.map(jnp.array, initial))
    with contextlib.closing(trainer.batches()) as batches:
        for _ in range(STEPS):
            state, _ = trainer.step(state, next(batches))
    workdir, scored = finished
    run = open_run(workdir)
    assert run.step == STEPS
    assert set(run.params) == {*state.params, BATCH_STATISTICS}
    assert len(scored) == 2
    for params in (run.params, *scored):
        jax.tree.map(np.testing.assert_array_equal, params, state.learned)


def test_a_run_predicts_with_the_statistics_of_its_checkpoint(
    finished, converted, tensors
):
    run, segmenter = open_run(finished[0]), load(finished[0])
    moved = run.params[BATCH_STATISTICS]
    assert largest_difference(moved, statistics_of(run.weights)) > 0.01
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    params = {n: x for n, x in run.params.items() if n != BATCH_STATISTICS}

    def encoded(predict):
        beside = np.zeros((1, SIDE, SIDE), bool)
        found = predict.encode(image[None], ("query",), beside)
        return {name: found[name] for name in ("F_q", "deep")}

    ours = encoded(segmenter.predict)
    folded = to_flax("tiny", as_pytorch(tensors, moved), deep=True)
    assert (
        largest_difference(ours, encoded(build_predictor(run.config, params, folded)))
        < 1e-4
    )
    start = load_weights("tiny", converted, deep=True)
    before = encoded(build_predictor(run.config, params, start))
    for name in ours:
        assert largest_difference(ours[name], before[name]) > 1e-2
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[7:20, 7:20] = 1
    assert segmenter(image, image, mask).shape == mask.shape

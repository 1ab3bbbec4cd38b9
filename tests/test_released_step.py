"""Batch norm that drifts: against PyTorch and NumPy, and in runs from start to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from commands import ROOT, SHRUNK, overrides
from conftest import stopped_after
from flax.traverse_util import flatten_dict
from make_backbone_goldens import deepen, random_tensor

from qpenet_jax.backbones import convert, registry, torch_layout
from qpenet_jax.backbones.convert import load_weights
from qpenet_jax.backbones.convolutions import Conv, Norm, refold, statistics_of
from qpenet_jax.backbones.registry import DEEP, Backbone
from qpenet_jax.backbones.resnet import Layer4, ResNet
from qpenet_jax.backbones.torch_layout import to_flax
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import BATCH_STATISTICS, Episode
from qpenet_jax.runs.build import (
    build_predictor,
    build_weights,
    complete,
)
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.datasets import build_dataset, build_train_sampler
from qpenet_jax.runs.folder import open_run
from qpenet_jax.segmenter import load
from qpenet_jax.training.batches import shardings
from qpenet_jax.training.released_step import drifting_features, drifts
from qpenet_jax.training.step import TrainState
from qpenet_jax.training.train import build_state, build_train_step, train

pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("tiny")]

NET = Backbone(
    ResNet((1, 1, 1), deep_stem=True), ("layer3", "layer2"), 1536, deep=Layer4(1)
)
"""One block a stage, with the deep stem and a last stage of one block."""

SIDE = 25
"""Small enough for plain convolutions, which compile in less time than Winograd's."""


@pytest.fixture(scope="module")
def tiny():
    """Let NET be known as the backbone "one_block"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BACKBONES, "one_block", NET)
        yield


@pytest.fixture(scope="module")
def tensors(tiny):
    """A state_dict of NET, by PyTorch's names."""
    names, found = torch_layout.ORIGINALS[ResNet].names, {}
    for path, shape in torch_layout.shapes_of("one_block", True).items():
        layer, _, leaf = path.rpartition("/")
        if leaf == "kernel":
            conv, norm = names(layer)
            found[f"{conv}.weight"] = torch_layout.torch_shape(shape)
            found |= {f"{norm}.{f}": shape[-1:] for f in torch_layout.NORM_FIELDS}
    return {name: random_tensor(name, shape) for name, shape in found.items()}


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
    return convert.convert("one_block", folder / "original.safetensors", out_dir=folder)


STEPS = 9


def config(converted, **changes):
    fields = SHRUNK | {
        "steps": STEPS,
        "dataset__kind": "shapes",
        "dataset__name": "Shapes",
        "dataset__side": 33,
        "dataset__train_images": 20,
        "backbone__name": "one_block",
        "backbone__weights": converted,
        "backbone__drift": True,
        "side": SIDE,
        "eval__episodes": 4,
        "eval__seeds": "(0,)",
        "select_on": "last",
    }
    file = ROOT / "configs" / "released_pascal.py"
    return load_config(file, overrides(**fields | changes))


@pytest.fixture(scope="module")
def made(converted):
    """A config, complete. Its epochs have five steps: the last three of the second
    drift.
    """
    made = complete(config(converted))
    sampler = build_train_sampler(made, build_dataset(made, "train"))
    assert len(sampler) // made.batch_size == 5
    return made


@pytest.fixture(scope="module")
def frozen(made):
    """The backbone's weights."""
    return build_weights(made)


FROZEN, DRIFTING = 5, 7
"""First steps of two and of three that do not drift, and that do."""


@pytest.fixture(scope="module")
def steps(made, frozen):
    """Return a function that takes a step on every batch, the first as step `start`.

    It returns the parameters after them and the metrics of each.
    """
    step = build_train_step(made, STEPS, images=10)

    def run(batches, start, statistics, weights=frozen):
        state = build_state(made, weights, STEPS)
        params = {**state.params, BATCH_STATISTICS: jax.tree.map(jnp.array, statistics)}
        state = TrainState(jnp.int32(start), params, state.opt_state)
        replicated, _ = shardings(made.batch_size)
        state, weights = jax.device_put((state, weights), replicated)
        measured, key = [], jax.random.key(made.seed + 1)
        for batch in batches:
            state, metrics = step(state, weights, batch, key)
            measured.append({name: float(value) for name, value in metrics.items()})
        return state.params, measured

    return run


@pytest.fixture(scope="module")
def batches():
    """Three batches of two 1-shot episodes."""
    images = np.random.default_rng(0).integers(
        0, 256, (3, 2, 2, SIDE, SIDE, 3), np.uint8
    )
    masks = np.zeros((2, 2, SIDE, SIDE), np.uint8)
    masks[0, :, 3:20, 7:22], masks[1, :, 9:, :15] = 1, 1
    padding = np.zeros((2, 2, SIDE, SIDE), bool)
    return [
        Episode(
            *(batch[:, 0], masks[:, 0], batch[:, 1:], masks[:, 1:]),
            *(padding[:, 0], padding[:, 1:]),
        )
        for batch in images
    ]


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
    deepen(net)
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
def test_features_and_statistics_are_pytorchs(
    steps, frozen, tensors, batches, pytorchs
):
    """Of the first batch, and after three steps."""
    start, (maps, theirs) = statistics_of(frozen), pytorchs
    see = jax.jit(drifting_features, static_argnums=0)
    (support, query), _ = see(NET, frozen, start, batches[0])
    for ours, expected in zip((query, support[:, 0]), maps, strict=True):
        assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
    moved = steps(batches, DRIFTING, start)[0][BATCH_STATISTICS]
    counts = (theirs[f"{x}.num_batches_tracked"] for x in ("bn1", "layer4.0.bn1"))
    assert [int(count) for count in counts] == [6, 9]
    after = tensors | {name: theirs[name] for name in tensors}
    expected = statistics_of(to_flax("one_block", after, deep=True, norms=True))
    assert largest_difference(moved, expected) < 1e-5
    assert largest_difference(start, expected) > 0.1
    # What evaluates the run is folded with them, as a converted checkpoint would be.
    folded = to_flax("one_block", after, deep=True)
    ours = refold(frozen, moved)
    assert jax.tree.structure(ours) == jax.tree.structure(folded)
    assert largest_difference(ours, folded) < 1e-5


def test_steps_that_do_not_drift_use_the_statistics_as_they_are(
    steps, frozen, tensors, batches
):
    start = statistics_of(frozen)
    moved = jax.tree.map(lambda x: 3 * x + 0.5, start)
    folded = to_flax("one_block", as_pytorch(tensors, moved), deep=True, norms=True)
    deep = {**start, DEEP: moved[DEEP]}

    def measured(statistics, weights=frozen):
        after, (found,) = steps(batches[:1], FROZEN, statistics, weights)
        kept = after[BATCH_STATISTICS]
        jax.tree.map(np.testing.assert_array_equal, kept, statistics)
        return found

    before, now, last = map(measured, (start, moved, deep))
    theirs = measured(moved, folded)
    # No hard decision comes before these, which a rounding could turn over.
    for name in ("rms_F_q", "rms_F_s", "loss_pre", "loss_bg_q", "loss_bg_s"):
        np.testing.assert_allclose(now[name], theirs[name], rtol=1e-5)
        assert abs(now[name] / before[name] - 1) > 1e-4
        assert last[name] == before[name]
    assert last["loss_aux"] != before["loss_aux"], "the prior is made of layer4"


def test_drifting_steps_see_the_batch_alone(steps, frozen, batches):
    start = statistics_of(frozen)
    other = jax.tree.map(lambda x: 2 * x, start)
    one, two = (steps(batches[:2], DRIFTING, s) for s in (start, other))
    assert one[1] == two[1]
    learned = [{k: x[k] for k in x if k != BATCH_STATISTICS} for x, _ in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, *learned)
    _, still = steps(batches[:1], FROZEN, start)
    assert abs(one[1][0]["rms_F_q"] / still[0]["rms_F_q"] - 1) > 1e-3


# --- Converted files -----------------------------------------------------------------


def test_a_converted_file_holds_the_norms_for_those_who_ask(
    converted, tensors, tmp_path
):
    with_norms = load_weights("one_block", converted, deep=True, norms=True)
    given = to_flax("one_block", tensors, deep=True, norms=True)
    jax.tree.map(np.testing.assert_array_equal, with_norms, given)
    last = with_norms[DEEP]["layer4_0"]["conv2"]
    assert set(last) == {"kernel", "bias", *Norm._fields}
    np.testing.assert_array_equal(last["var"], tensors["layer4.0.bn2.running_var"])

    # A file without norms serves all but drift.
    old, plain = tmp_path / "old.safetensors", to_flax("one_block", tensors, deep=True)
    convert.save_weights(old, "one_block", plain, converted)
    for path in (converted, old):
        found = load_weights("one_block", path, deep=True)
        jax.tree.map(np.testing.assert_array_equal, found, plain)
    remedy = r"old\.safetensors: .*run `qpenet convert --backbone one_block` again"
    with pytest.raises(InputError, match=rf"{remedy}.* missing: conv1/gamma, .* more$"):
        load_weights("one_block", old, deep=True, norms=True)
    flat = safetensors.numpy.load_file(converted)
    flat["conv2/var"] = -flat["conv2/var"]
    del flat["conv1/gamma"]
    metadata = {"format": convert.FORMAT, "backbone": "one_block"}
    safetensors.numpy.save_file(flat, old, metadata)
    with pytest.raises(InputError, match=r"missing: conv1/gamma; .*variance: conv2/v"):
        load_weights("one_block", old, deep=True, norms=True)


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


@pytest.fixture(scope="module")
def finished(converted, tmp_path_factory):
    """The folder of two short epochs, stopped and resumed among steps that drift."""
    workdir = tmp_path_factory.mktemp("drift") / "run"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        stopped = f"step {STEPS - 1} is saved"
        with stopped_after(STEPS - 2), pytest.raises(KeyboardInterrupt, match=stopped):
            train(config(converted), workdir)
        train(config(converted), workdir)
    return workdir


def test_a_stopped_run_goes_on_to_the_same_bits(finished, converted, tmp_path):
    train(config(converted), tmp_path)
    whole, run = open_run(tmp_path), open_run(finished)
    assert run.step == whole.step == STEPS
    assert BATCH_STATISTICS in run.params
    jax.tree.map(np.testing.assert_array_equal, run.params, whole.params)


def test_a_run_predicts_with_the_statistics_of_its_checkpoint(
    finished, converted, tensors
):
    run, segmenter = open_run(finished), load(finished)
    moved = run.params[BATCH_STATISTICS]
    assert largest_difference(moved, statistics_of(run.weights)) > 0.01
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    params = {n: x for n, x in run.params.items() if n != BATCH_STATISTICS}

    def encoded(predict):
        beside = np.zeros((1, SIDE, SIDE), bool)
        found = predict.encode(image[None], ("query",), beside)
        return {name: found[name] for name in ("F_q", "deep")}

    ours = encoded(segmenter.predict)
    folded = to_flax("one_block", as_pytorch(tensors, moved), deep=True)
    refolded = encoded(build_predictor(run.config, params, folded))
    assert largest_difference(ours, refolded) < 1e-4
    start = load_weights("one_block", converted, deep=True)
    before = encoded(build_predictor(run.config, params, start))
    for name in ours:
        assert largest_difference(ours[name], before[name]) > 1e-2
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[7:20, 7:20] = 1
    assert segmenter(image, image, mask).shape == mask.shape

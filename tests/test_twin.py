"""Parity of the Flax network with its independent PyTorch twin (extra `[parity]`)."""

import collections
import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from qpenet_jax.backbones import convert as weights
from qpenet_jax.backbones import registry as backbone
from qpenet_jax.benchmark.jax_side import NO_DROPOUT
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.data.folds import PASCAL_CLASSES, pascal_fold
from qpenet_jax.data.loader import load_episode
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.models import ops, prototypes
from qpenet_jax.models.ffa import CrossAttention
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.training.step import TrainState, make_train_step

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
twin = pytest.importorskip("qpenet_jax.benchmark.twin")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.usefixtures("optimised_code", "one_torch_thread"),
]

FEATURES, GRID = 48, 7
SIDE = 8 * GRID - 7
SMALL = {"width": 64, "heads": 4, "ffn": 96}  # for the many cases on random features
LOSSES = LossWeights(alpha=0.7, beta=0.3)
NET = QPENet(channels=64, heads=4, ffn_features=96, **NO_DROPOUT)
FULL_NET = QPENet(**NO_DROPOUT)

# --- what both sides share --------------------------------------------------------


def draw_twin(channels, seed=0, **sizes):
    """Build the twin without dropout; larger weights than PyTorch's mix the masks."""
    torch.manual_seed(seed)
    model = twin.TorchQPENet(channels, **sizes)
    for name, p in model.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 4
        p.data.normal_(1.0 if "norm" in name else 0.0, 1.4 / fan_in**0.5)
    if model.reduce_query:  # near the support's, else one image's mask is empty
        query, support = model.reduce_query[0].weight, model.reduce_support[0].weight
        query.data = 0.9 * support + 0.4 * query
    return twin.without_dropout(model)


def draw_backbone(name):
    """Build a frozen backbone; return it and the same weights for ours."""
    torch.manual_seed(0)
    net = twin.backbone(name)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.3, 0.8)
            module.bias.data.normal_(0.0, 0.1)
    state = {k: v.numpy() for k, v in net.net.state_dict().items()}
    return net, weights.to_flax(name, state)


def balance(model, *episode):
    """Shift biases until both classes win in y_pre and y_bg_q, away from ties."""
    with torch.no_grad():
        out = model(*episode)[1]
    heads = {"y_pre": model.segment_foreground, "y_bg_q": model.segment_background}
    for name, convs in heads.items():
        margins = (out[name][:, 1] - out[name][:, 0]).flatten().sort().values
        middle = margins[int(0.4 * len(margins)) : int(0.6 * len(margins)) + 2]
        widest = middle.diff().argmax()
        convs[2][-1].bias.data[1] -= middle[widest : widest + 2].mean()
    return model


def to_torch(x):
    """Features or images, channels last, to NCHW."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, -3).copy())


def numpy_out(out):
    """The twin's intermediates in Flax's layout."""
    arrays = {k: v.detach().numpy() for k, v in out.items()}
    maps = {k: np.moveaxis(v, -3, -1) for k, v in arrays.items() if k[0] in "Fy"}
    return arrays | maps


def error(value, reference, floor=0.0):
    """Largest deviation relative to the largest entry (or to `floor`)."""
    value, reference = (np.asarray(x, np.float64) for x in (value, reference))
    assert value.shape == reference.shape
    largest = max(np.abs(reference).max(), floor)
    deviation = np.abs(value - reference).max()
    return deviation / largest if largest else deviation


MARKED = {
    "full": [(np.s_[:], 1)],
    "ignore": [(np.s_[:], 255)],
    "one pixel": [(np.s_[..., 16, 24], 1)],
    "one pixel between cells": [(np.s_[..., 17, 27], 1)],
    "border": [(np.s_[..., :9, :], 1), (np.s_[..., -1], 1)],
    "padded": [(np.s_[..., SIDE // 2 :], 255)],
}
KINDS = ("ordinary", "empty", *MARKED, "mixed")


def draw_masks(kind, batch, shots, rng):
    """Query masks [b, H, W] and support masks [b, k, H, W]; all alike but `mixed`."""
    if kind == "mixed":
        kinds = ("ordinary", "empty", "ignore")[:batch]
        rows = [draw_masks(one, 1, shots, rng) for one in kinds]
        return tuple(map(np.concatenate, zip(*rows, strict=True)))
    masks = np.zeros((batch, shots + 1, SIDE, SIDE), np.uint8)
    if kind in ("ordinary", "padded"):
        coarse = rng.choice([0, 0, 1, 1, 255], (batch, shots + 1, GRID, GRID))
        masks[:] = np.kron(coarse, np.ones((8, 8)))[..., :SIDE, :SIDE]
    for region, label in MARKED.get(kind, ()):
        masks[region] = label
    return masks[:, 0], masks[:, 1:]


def draw_episode(kind="ordinary", batch=1, shots=1, seed=0, channels=FEATURES):
    """Return (support features, support masks, query features, query masks)."""
    rng = np.random.default_rng(seed)
    shape = GRID, GRID, channels
    support = rng.normal(size=(batch, shots, *shape)).astype(np.float32)
    query = rng.normal(size=(batch, *shape)).astype(np.float32)
    if kind == "padded":
        query[..., GRID // 2 :, :] = query[..., -1:, :]  # what padding looks like
    query_masks, support_masks = draw_masks(kind, batch, shots, rng)
    return support, support_masks.astype(np.int32), query, query_masks.astype(np.int32)


def flax_loss(params, support, support_masks, query, query_masks):
    """Return (loss, (terms, logits, out)) in training, without dropout."""
    episode = support, support_masks, query
    logits, out = NET.apply({"params": params}, *episode, train=True)
    loss, terms = total_loss(out, query_masks, support_masks, LOSSES)
    return loss, (terms, logits, out)


# What is compiled for many shapes and runs for milliseconds is little optimised.
LITTLE_EFFORT = {"xla_backend_optimization_level": 0}
flax_step = jax.jit(
    jax.value_and_grad(flax_loss, has_aux=True), compiler_options=LITTLE_EFFORT
)


def twin_step(model, support, support_masks, query, query_masks):
    """Return what `flax_step` returns, of the twin."""
    model.zero_grad()
    masks, truth = torch.from_numpy(support_masks), torch.from_numpy(query_masks)
    logits, out = model(to_torch(support), masks, to_torch(query))
    loss, terms = twin.total_loss(out, truth, masks, LOSSES.alpha, LOSSES.beta)
    loss.backward()
    terms = {k: v.item() for k, v in terms.items()}
    logits = np.moveaxis(logits.detach().numpy(), 1, -1)
    gradients = twin.to_flax({k: p.grad for k, p in model.named_parameters()})
    return (loss.item(), (terms, logits, numpy_out(out))), gradients


@pytest.fixture(scope="module")
def model():
    support, masks, query, _ = draw_episode("ordinary", 3, 2)
    episode = to_torch(support), torch.from_numpy(masks), to_torch(query)
    return balance(draw_twin(FEATURES, **SMALL), *episode)


@pytest.fixture(scope="module")
def params(model):
    return twin.to_flax(model.state_dict())


# --- values and gradients ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "shots"), [(1, 1), (3, 2), (1, 5)])
def test_intermediates_losses_and_gradients(model, params, batch, shots, kind):
    worst = {}
    # A ReLU whose input is within rounding of 0 may pass the gradient in one of the
    # networks only: that is luck, and another draw has it elsewhere. A mistake stays.
    for seed in range(3):
        episode = draw_episode(kind, batch, shots, seed + 10 * KINDS.index(kind))
        (loss, rest), gradients = flax_step(params, *episode)
        (loss_t, rest_t), gradients_t = twin_step(model, *episode)
        assert_same_values((loss, *rest), (loss_t, *rest_t))
        if kind == "ordinary":
            assert_mixed_regions(rest[-1], gradients)
        worst = gradient_errors(gradients, gradients_t)
        if max(worst.values()) < 1e-3:
            return
    pytest.fail(f"gradients differ: { {k: v for k, v in worst.items() if v > 1e-3} }")


def assert_same_values(found, expected):
    loss, terms, logits, out = found
    loss_t, terms_t, logits_t, out_t = expected
    assert error(logits, logits_t) < 1e-4
    assert out.keys() == out_t.keys()
    assert_same_maps(out, out_t)
    assert terms.keys() == terms_t.keys()
    for name, value in terms_t.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert float(loss) == pytest.approx(loss_t, rel=1e-5, abs=1e-7)


def assert_same_maps(out, expected):
    for name, value in expected.items():
        assert error(out[name], value) < 1e-4, name
        if name[0] == "y":
            assert_same_mask(out[name], value)


def assert_same_mask(logits, expected):
    """Hard masks are equal where the logits are apart by more than rounding."""
    margin = expected[..., 1] - expected[..., 0]
    clear = np.abs(margin) > 1e-5 * np.abs(margin).max()
    found = np.asarray(logits).argmax(-1)
    np.testing.assert_array_equal(found[clear], (margin > 0)[clear])
    assert clear.mean() > 0.98


def gradient_errors(found, expected):
    found, expected = (flatten_dict(g, sep="/") for g in (found, expected))
    assert found.keys() == expected.keys()
    # what should be exactly 0 (query and key, with one key to attend to) is rounding
    floor = 1e-4 * max(np.abs(g).max() for g in expected.values())
    return {name: error(found[name], g, floor) for name, g in expected.items()}


def assert_mixed_regions(out, gradients):
    """The comparison sees both classes in every region, and every gradient."""
    for name in ("y_pre", "y_rev", "y_bg_q"):
        share = np.asarray(out[name]).argmax(-1).mean((-2, -1))
        assert ((share > 0.02) & (share < 0.98)).all(), (name, share)
    for name in ("P_main", "P_aux", "P_psd"):
        assert (np.abs(out[name]).max(-1) > 0).all(), name
    for name, gradient in flatten_dict(gradients, sep="/").items():
        assert np.abs(gradient).max() > 0, name


@pytest.mark.standard_promotion
def test_float32_is_close_to_float64(model, params):
    support, support_masks, query, query_masks = draw_episode("ordinary", 3, 2)
    double = copy.deepcopy(model).double()
    episode = support.astype(float), support_masks, query.astype(float), query_masks
    (loss64, (_, logits64, out64)), gradients64 = twin_step(double, *episode)
    (loss, (_, logits, out)), _ = flax_step(
        params, support, support_masks, query, query_masks
    )
    assert logits64.dtype == np.float64
    assert error(logits, logits64) < 1e-5
    for name, value in out64.items():
        assert error(out[name], value) < 1e-5, name
    assert float(loss) == pytest.approx(loss64, rel=1e-6)

    with jax.enable_x64(True):
        params64 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        (loss, (_, logits, _)), gradients = flax_step(params64, *episode)
    assert loss.dtype == logits.dtype == np.float64
    assert float(loss) == pytest.approx(loss64, rel=1e-8)
    assert error(logits, logits64) < 1e-6
    assert max(gradient_errors(gradients, gradients64).values()) < 1e-5


# --- whole networks, from pixels --------------------------------------------------


def draw_images(side, shots, seed=0):
    """Return a batch of one episode: coloured tiles, the query padded."""
    rng = np.random.default_rng(seed)
    tiles = -(-side // 24)
    shape = shots + 1, tiles, tiles
    images = rng.integers(0, 256, (*shape, 3), np.uint8)
    masks = rng.choice(np.array([0, 1, 1, 255], np.uint8), shape)
    for axis in (1, 2):
        images, masks = (x.repeat(24, axis) for x in (images, masks))
    images, masks = images[:, :side, :side], masks[:, :side, :side]
    images[0, -side // 5 :], masks[0, -side // 5 :] = 0, 255
    return Episode(images[:1], masks[:1], images[None, 1:], masks[None, 1:])


def assert_same_evaluation(net, episode, evaluate, features):
    """Compare features, logits, intermediates and masks of a full-size network."""
    supports, masks = map(torch.from_numpy, episode[2:4])
    query = torch.from_numpy(episode.query_image)
    maps = twin.features(net, supports), twin.features(net, query)
    model = draw_twin(net.channels).eval()
    balance(model, maps[0], masks, maps[1])
    with torch.no_grad():
        logits_t, out_t = model(maps[0], masks, maps[1])
    found = [features(episode.support_images[0])[None], features(episode.query_image)]
    for value, expected in zip(found, maps, strict=True):
        assert error(value, np.moveaxis(expected.numpy(), -3, -1)) < 1e-4

    params = twin.to_flax(model.state_dict())
    masks = episode.support_masks.astype(np.int32)
    logits, out = evaluate({"params": params}, found[0], masks, found[1])
    assert error(logits, np.moveaxis(logits_t.numpy(), 1, -1)) < 1e-4
    expected = numpy_out(out_t)
    assert out.keys() - expected.keys() <= {"y_aux"}  # jit drops it in evaluation
    assert_same_maps(out, expected)
    for name in ("y_pre", "y_rev", "y_bg_q"):
        assert np.unique(expected[name].argmax(-1)).size == 2, name


@pytest.mark.parametrize("name", ["resnet101", "efficientnet_lite0"])
def test_evaluation_at_97_pixels(name):
    net, frozen = draw_backbone(name)
    features = jax.jit(lambda images: backbone.features(name, frozen, images))
    assert_same_evaluation(net, draw_images(97, 1), jax.jit(FULL_NET.apply), features)


def test_evaluation_at_473_pixels(monkeypatch):
    # layer by layer: compiling the network as one takes longer than running it
    compiled = jax.jit(ops.conv3x3, static_argnames="dilation")
    monkeypatch.setattr(ops, "conv3x3", compiled)
    net, frozen = draw_backbone("resnet50")

    def features(images):
        return backbone.features("resnet50", frozen, jnp.asarray(images))

    assert_same_evaluation(net, draw_images(473, 1), FULL_NET.apply, features)


# --- real episodes ----------------------------------------------------------------


@pytest.fixture(scope="module")
def real_episodes(shared_voc):
    """A function `(side, start, stop) -> batch` of 1-shot episodes of fold 2."""
    root, ids = shared_voc / "VOCdevkit/VOC2012", shared_voc / "lists/subset_val.txt"
    dataset = VOCLayout(root, ids, PASCAL_CLASSES)
    classes = pascal_fold(2).novel
    sampler = EpisodeSampler(dataset.counts, classes, 1, seed=0, on_few="drop")

    def load(side, start, stop):
        episodes = [load_episode(dataset, sampler(i), side) for i in range(start, stop)]
        return Episode(*map(np.stack, zip(*episodes, strict=True)))

    return load


def test_twenty_steps_of_sgd_on_real_episodes(real_episodes):
    net, frozen = draw_backbone("efficientnet_lite0")
    batches = [real_episodes(65, 2 * t, 2 * t + 2) for t in range(STEPS)]
    optimizer = Optimizer(lr=RATE, lr_factor=1.0).build(STEPS)
    network = backbone.BACKBONES["efficientnet_lite0"]
    train_step = make_train_step(FULL_NET, network, optimizer, LossWeights())

    def flat(model):
        return flatten_dict(jax.tree.map(np.array, twin.to_flax(model.state_dict())))

    worst = {}
    for seed in (1, 2, 3):  # luck with ReLUs again: another start decides
        torch.manual_seed(seed)
        model = twin.without_dropout(twin.TorchQPENet(net.channels))
        query, _, supports, masks = map(torch.from_numpy, batches[0][:4])
        balance(model, twin.features(net, supports), masks, twin.features(net, query))
        start = flat(model)
        optimizer_t = twin.build_optimizer(model.parameters(), STEPS, RATE)
        params = unflatten_dict({k: jnp.asarray(v) for k, v in start.items()})
        state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
        for batch in batches:
            losses_t = twin.train_step(model, net, optimizer_t, batch)
            state, losses = train_step(state, frozen, batch, jax.random.key(0))
            for name, value in losses_t.items():
                assert float(losses[name]) == pytest.approx(value.item(), rel=1e-3)

        end, end_t = flatten_dict(state.params), flat(model)
        assert np.median([error(end_t[k], v) for k, v in start.items()]) > 5e-3
        ways = [error(end[k] - v, end_t[k] - v) for k, v in start.items()]
        worst = {k: error(end[k], v) for k, v in end_t.items()}
        if max(worst.values()) < 1e-3 and np.median(ways) < 1e-3:
            return
    pytest.fail(
        f"after {STEPS} steps: { {k: v for k, v in worst.items() if v > 1e-3} }"
    )


# The paper's rate. At ten times as much, PyTorch's own float32 is 2 % off its float64
# after these steps: ReLUs near 0 open and close, and masks flip.
STEPS, RATE = 20, 0.0025


@pytest.mark.standard_promotion
def test_bfloat16_keeps_99_percent_of_the_pixels(real_episodes):
    batch = real_episodes(129, 0, 10)
    frozen = weights.load_weights("efficientnet_lite0")
    features = jax.jit(lambda x: backbone.features("efficientnet_lite0", frozen, x))
    maps = features(batch.support_images[:, 0])[:, None], features(batch.query_image)
    params = twin.to_flax(draw_twin(344).state_dict())
    evaluate = jax.jit(FULL_NET.apply)

    def run(dtype):
        cast, support, query = jax.tree.map(
            lambda x: jnp.asarray(x, dtype), (params, *maps)
        )
        masks = jnp.asarray(batch.support_masks, jnp.int32)
        logits, out = evaluate({"params": cast}, support, masks, query)
        assert out["y_final"].dtype == dtype
        found = {k: v for k, v in out.items() if k in ("y_pre", "y_rev", "y_bg_q")}
        return {k: np.asarray(v).argmax(-1) for k, v in {**found, "y": logits}.items()}

    full, half = run(jnp.float32), run(jnp.bfloat16)
    for name, mask in full.items():
        assert 0.05 < mask.mean() < 0.95, name
        assert (half[name] == mask).mean() >= 0.99, name


# --- primitives -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((7, 5), (49, 33)),
        ((60, 60), (473, 473)),
        ((473, 97), (60, 13)),
        ((13, 9), (8, 20)),
        ((1, 1), (9, 17)),
        ((9, 17), (1, 1)),
        ((1, 6), (6, 1)),
    ],
)
def test_resize_is_interpolate_with_align_corners(source, target):
    x = np.random.default_rng(0).normal(size=(2, *source, 3)).astype(np.float32)
    reference = torch.nn.functional.interpolate(
        to_torch(x), target, mode="bilinear", align_corners=True
    )
    found = ops.resize_align_corners(x, target)
    # PyTorch's positions are float32: 1e-4 of a cell off at 473
    np.testing.assert_allclose(found, reference.permute(0, 2, 3, 1), atol=2e-4)


def pooling(model, params, rng):
    """Masked average pooling: a mask of half the cells, none, all, nearly none."""
    features = rng.normal(size=(4, 5, 6, 8)).astype(np.float32)
    masks = rng.random((4, 5, 6)) < np.array([0.5, 0.0, 1.0, 0.03])[:, None, None]

    def pool_t(x):
        return twin.masked_average_pooling(x.movedim(-1, -3), torch.from_numpy(masks))

    return lambda x: prototypes.masked_average_pool(x, masks), pool_t, [features]


def cosine(model, params, rng):
    """Activation maps, also of zero vectors and of the zero prototype."""
    features = rng.normal(size=(3, 4, 4, 8)).astype(np.float32)
    vectors = rng.normal(size=(3, 8)).astype(np.float32)
    features[0, 1] = features[2] = vectors[1] = vectors[2] = 0

    def cosine_t(x, p):
        return torch.nn.functional.cosine_similarity(x, p[:, None, None], dim=-1)

    return prototypes.activation_map, cosine_t, [features, vectors]


def attention(model, params, rng):
    """A layer of cross attention; in two of three episodes every key is masked."""
    x = rng.normal(size=(3, 4, 4, 64)).astype(np.float32)
    keys = rng.normal(size=(3, 2, 4, 4, 64)).astype(np.float32)
    masks = rng.random((3, 2, 4, 4)) < np.array([0.5, 0.0, 0.0])[:, None, None, None]
    cross = CrossAttention(heads=4, ffn_features=96, dropout=0.0)
    variables = {"params": params["ffa"]["cross1"]}

    def attend_t(x, keys):
        flat = x.flatten(1, 2), keys.flatten(1, 3), torch.from_numpy(masks).flatten(1)
        return model.cross1(*flat).unflatten(1, (4, 4))

    return (
        lambda *x: cross.apply(variables, *x, masks, train=False),
        attend_t,
        [x, keys],
    )


@pytest.mark.parametrize(
    ("pair", "power", "limits", "gradient_limits"),
    [
        (pooling, 2, {"rtol": 1e-5, "atol": 1e-6}, {"rtol": 1e-5, "atol": 1e-7}),
        # as steep at 0 as PyTorch's, 1 / 1e-8
        (cosine, 1, {"rtol": 1e-7, "atol": 1e-6}, {"rtol": 1e-4, "atol": 1e-4}),
        (attention, 3, {"largest": 1e-5}, {"largest": 1e-4}),
    ],
)
def test_primitives_and_their_gradients(
    model, params, pair, power, limits, gradient_limits
):
    f, f_t, arrays = pair(model, params, np.random.default_rng(0))

    def total(*x):
        y = f(*x)
        return (y**power).sum(), y

    gradient = jax.jit(jax.grad(total, tuple(range(len(arrays))), has_aux=True))
    gradients, y = gradient(*arrays)
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    y_t = f_t(*tensors)
    (y_t**power).sum().backward()
    assert_close(y, y_t.detach(), **limits)
    for found, tensor in zip(gradients, tensors, strict=True):
        assert np.isfinite(found).all()
        assert_close(found, tensor.grad, **gradient_limits)


def assert_close(found, expected, largest=None, **limits):
    if largest is None:
        np.testing.assert_allclose(found, expected, **limits)
    else:
        assert error(found, expected) < largest


# --- dropout ----------------------------------------------------------------------


def test_dropout_rates_and_granularity():
    """What drops whole channels, single elements, or elements of one vector."""
    found = collections.Counter(flax_dropouts())
    assert found == {
        (0.5, "channel"): 6,  # two reducers; Convs of eqs 2, 4, 9 and 10
        (0.1, "channel"): 6,  # the heads of these, of eq 16, and the auxiliary one
        (0.1, "element"): 6,  # three in each Cross
        (0.5, "vector"): 1,  # the gate's
    }
    assert collections.Counter(twin_dropouts()) == found


def flax_dropouts():
    """Return the rate and kind of every dropout that a training step calls."""
    seen = []

    def watch(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout):
            kinds = {((1, 2), 4): "channel", ((), 2): "vector"}
            kind = kinds.get((tuple(module.broadcast_dims), args[0].ndim), "element")
            seen.append((module.rate, kind))
        return call(*args, **kwargs)

    net = QPENet(channels=64, heads=4, ffn_features=96)
    keys = dict.fromkeys(("params", "dropout"), jax.random.key(0))
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: net.init(keys, *draw_episode()[:3], train=True))
    return seen


def twin_dropouts():
    """Return the same of the twin."""
    seen = []

    def watch(module, args, y):
        plain = "vector" if y.ndim == 2 else "element"
        is_2d = isinstance(module, torch.nn.Dropout2d)
        seen.append((module.p, "channel" if is_2d and y.ndim == 4 else plain))

    model = twin.TorchQPENet(FEATURES, **SMALL).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d) and module.p:
            module.register_forward_hook(watch)
    support, masks, query, _ = draw_episode()
    model(to_torch(support), torch.from_numpy(masks), to_torch(query))
    return seen


# --- the twin itself --------------------------------------------------------------


@pytest.mark.parametrize("shared_reducer", [False, True])
def test_the_map_of_weights_covers_everything(shared_reducer):
    model = draw_twin(FEATURES, **SMALL, shared_reducer=shared_reducer)
    net = QPENet(channels=64, heads=4, ffn_features=96, shared_reducer=shared_reducer)
    support, masks, query, _ = draw_episode()
    shapes = jax.eval_shape(net.init, jax.random.key(0), support, masks, query)
    shapes = jax.tree.map(lambda leaf: leaf.shape, shapes["params"])
    assert jax.tree.map(np.shape, twin.to_flax(model.state_dict())) == shapes


def test_unknown_backbone():
    with pytest.raises(InputError, match="no backbone 'vgg16': resnet50, resnet101"):
        twin.backbone("vgg16")


def test_full_size():
    with torch.device("meta"):
        model = twin.TorchQPENet(1536)
    assert sum(p.numel() for p in model.parameters()) == 9_901_320

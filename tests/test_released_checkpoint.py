"""Checkpoints of QPENet's authors as runs: names, layouts, refusals, and what runs."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from commands import assert_refused, overrides, passed, qpenet
from flax.traverse_util import flatten_dict
from make_backbone_goldens import GOLDENS, random_tensor

from qpenet_jax.core.errors import InputError
from qpenet_jax.models.released import state_dict
from qpenet_jax.runs.folder import open_run
from qpenet_jax.runs.released_checkpoint import import_checkpoint
from qpenet_jax.segmenter import load


def checkpoint(layer3):
    """Returns a random checkpoint, by its names, with so many blocks in layer3.

    Names and shapes of the ResNet-50 are read off a file of the authors.
    """
    text = (GOLDENS / "released_r50_shapes.json").read_text()
    shapes = {name: tuple(shape) for name, shape in json.loads(text).items()}
    last = {k: v for k, v in shapes.items() if k.startswith("layer3.5.")}
    for block in range(6, layer3):
        shapes |= {k.replace("3.5", f"3.{block}", 1): v for k, v in last.items()}
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tensors():
    return checkpoint(layer3=6)


@pytest.fixture(scope="module")
def run(tensors, tmp_path_factory):
    """A run made of a file of those tensors, by the command."""
    folder = tmp_path_factory.mktemp("checkpoint")
    file = save(folder / "train_epoch_37.5_0.6712", tensors)
    words = ["convert", file, "--as-run", folder / "run", "--fold", "2"]
    fields = {"dataset__kind": "shapes", "dataset__name": "Shapes", "workers": 0}
    fields |= {"dataset__val_images": 200, "dataset__side": 161, "side": 97}
    passed(*words, *overrides(**fields))
    return folder / "run"


def save(path, tensors):
    """Writes a checkpoint as its authors did, where PyTorch is; else its tensors."""
    try:
        import torch
    except ImportError:
        safetensors.numpy.save_file(tensors, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    state = {f"module.{k}": torch.tensor(v) for k, v in tensors.items()}
    momentum = {i: {"momentum_buffer": torch.zeros(2)} for i in range(3)}
    group = {"lr": 0.025, "momentum": 0.9, "nesterov": False, "params": [0, 1, 2]}
    optimizer = {"state": momentum, "param_groups": [group]}
    saved = {"epoch": 37.5, "state_dict": state, "optimizer": optimizer}
    torch.save(saved, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def test_a_run_holds_the_checkpoints_own_numbers(run, tensors):
    opened = open_run(run)
    params = flatten_dict(opened.params, sep="/")
    for name, path in state_dict.names().items():
        expected = state_dict.layout(name, tensors[name])
        np.testing.assert_array_equal(params[path], expected)
    # Batch norm is folded with the statistics of this file, layer4's too.
    last = opened.weights["layer4"]["layer4_2"]["conv2"]
    for layer, conv, norm in (
        (opened.weights["conv1"], "layer0.0", "layer0.1"),
        (last, "layer4.2.conv2", "layer4.2.bn2"),
    ):
        scale = tensors[f"{norm}.weight"] / np.sqrt(
            tensors[f"{norm}.running_var"] + 1e-5
        )
        kernel = tensors[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale
        np.testing.assert_allclose(layer["kernel"], kernel, rtol=1e-5, atol=1e-6)
    config = opened.config
    assert (config.variant, config.behaviour) == ("released", "auto")
    assert (config.dataset.fold, config.epochs) == (2, 100)
    assert config.backbone.name == "resnet50_deepstem"


def test_it_is_evaluated_in_both_behaviours(run):
    words = ["evaluate", "--workdir", run, "--episodes=2", "--seeds=0", "--side=97"]
    for behaviour in ("released", "fixed"):
        done = passed(*words, f"--config.behaviour={behaviour}")
        assert f"{behaviour} QPENet" in done.stdout
    assert len(list((run / "evaluate").iterdir())) == 2


def test_it_segments_away_from_where_it_was_made(run, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 90, 3), np.uint8)
    mask = np.zeros((60, 90), np.uint8)
    mask[10:40, 20:70] = 1
    expected = load(run)(image, image, mask)
    moved = tmp_path / "elsewhere"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("evaluate"))
    np.testing.assert_array_equal(load(moved)(image, image, mask), expected)


def test_resnet101(tmp_path):
    tensors = checkpoint(layer3=23)
    assert len(tensors) == 717  # as in the released file
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, file)
    run = open_run(import_checkpoint(file, tmp_path / "run", fold=3, dataset="coco"))
    config = run.config
    assert (config.backbone.name, config.epochs) == ("resnet101_deepstem", 50)
    assert config.dataset.split == "coco_fwb"
    assert "layer3_22" in run.weights


def test_what_is_no_such_checkpoint_leaves_nothing(tmp_path, tensors):
    file, empty = tmp_path / "x.safetensors", tmp_path / "x.pth"
    empty.touch()
    missing = {k: v for k, v in tensors.items() if k != "cls_meta.3.bias"}
    three, nan = np.zeros(3, np.float32), np.full(512, np.nan, np.float32)
    for bad, words in (
        (missing, "missing: cls_meta.3.bias"),
        (tensors | {"gam.gate.0.bias": three}, r"0.bias \(3,\) instead of \(256,\)"),
        (tensors | {"fgx.weight": three}, "not known: fgx.weight"),
        (tensors | {"layer4.0.bn1.weight": nan}, "not real: layer4.0.bn1.weight"),
    ):
        safetensors.numpy.save_file(bad, file)
        with pytest.raises(InputError, match=words):
            import_checkpoint(file, tmp_path / "run", fold=0)
    with pytest.raises(InputError, match=r"x\.pth: truncated"):
        import_checkpoint(empty, tmp_path / "run", fold=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    with pytest.raises(InputError, match="exists and isn't empty"):
        import_checkpoint(file, tmp_path / "full", fold=0)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"x.safetensors", "x.pth", "full"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--as-run", "r"], "--as-run needs the checkpoint's file and its --fold"),
        (["x.pth", "--fold", "1"], "--fold belongs to --as-run"),
        (["x.pth"], "give the --backbone"),
        (
            ["x.pth", "--as-run", "r", "--fold", "1", "--backbone", "resnet50"],
            "--backbone can't be given with --as-run",
        ),
    ],
)
def test_the_command_says_what_it_needs(words, message):
    assert_refused(qpenet("convert", *words), message)

"""Checkpoints of QPENet's authors as runs: names, layouts, refusals, and what runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from qpenet_jax.cli.main import main
from qpenet_jax.core.errors import InputError
from qpenet_jax.models.released import state_dict
from qpenet_jax.runs.folder import open_run
from qpenet_jax.runs.released_checkpoint import import_checkpoint
from qpenet_jax.segmenter import load

ORACLE = Path(__file__).resolve().parents[2] / "shared" / "oracle"

C = 256
HEAD = {
    "bg_prototype": (1, C, 1, 1),
    **{f"down_{n}.0.weight": (C, 1536, 1, 1) for n in ("query", "supp")},
    **{f"down_{n}.0.weight": (C, 512, 1, 1) for n in ("cyc", "bg")},
    "init_merge1.0.weight": (C, 514, 1, 1),
    "init_merge2.0.weight": (C, 772, 1, 1),
    "merge_multi_lvl_reduce.0.weight": (C, C, 1, 1),
    "Dynamic_conv.weight": (4, C, C, 3, 3),
    "Dynamic_conv.attention.fc1.weight": (65, C, 1, 1),
    "Dynamic_conv.attention.fc2.weight": (4, 65, 1, 1),
    "Dynamic_conv.attention.fc2.bias": (4,),
    "transformer.level_embed": (1, C),
    **{f"gam.gate.{i}.weight": (C, C, 1, 1) for i in (0, 2)},
    **{f"gam.gate.{i}.bias": (C,) for i in (0, 2)},
}


def checkpoint_shapes(layer3):
    """Return names and shapes of a checkpoint, written out from its description."""
    shapes = dict(HEAD)
    for block in ("cyc_res1", "bg_res1", "fg_res", "merge_multi_lvl_sum"):
        shapes |= {f"{block}.{i}.weight": (C, C, 3, 3) for i in (0, 2)}
    for head in ("cyc_cls", "bg_cls", "fg_cls", "cls_meta"):
        shapes[f"{head}.0.weight"] = (C, C, 3, 3)
        shapes |= {f"{head}.3.weight": (2, C, 1, 1), f"{head}.3.bias": (2,)}
    for i in range(2):
        deform = f"transformer.qry_self_layers.{i}"
        for name, rows in (("sampling_offsets", 144), ("attention_weights", 72)):
            shapes[f"{deform}.{name}.weight"] = (rows, C)
            shapes[f"{deform}.{name}.bias"] = (rows,)
        for name in ("value_proj", "output_proj"):
            shapes[f"{deform}.{name}.weight"] = (C, C)
        for name in ("q_fc", "k_fc", "v_fc", "proj"):
            shapes[f"transformer.cross_layers.{i}.{name}.weight"] = (C, C)
    for i in range(4):
        shapes[f"transformer.ffns.{i}.layers.0.0.weight"] = (768, C)
        shapes[f"transformer.ffns.{i}.layers.1.weight"] = (C, 768)
    for i in range(8):
        shapes |= {f"transformer.layer_norms.{i}.{x}": (C,) for x in ("weight", "bias")}
    for i, (before, width) in enumerate(((3, 64), (64, 64), (64, 128))):
        shapes |= conv(f"layer0.{3 * i}", f"layer0.{3 * i + 1}", width, before, 3)
    before = 128
    for stage, (width, blocks) in enumerate(
        ((64, 3), (128, 4), (256, layer3), (512, 3)), start=1
    ):
        for j in range(blocks):
            at = f"layer{stage}.{j}"
            shapes |= conv(f"{at}.conv1", f"{at}.bn1", width, before, 1)
            shapes |= conv(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            shapes |= conv(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if j == 0:
                down = f"{at}.downsample"
                shapes |= conv(f"{down}.0", f"{down}.1", 4 * width, before, 1)
            before = 4 * width
    return shapes


def conv(name, norm, outputs, inputs, size):
    fields = ("weight", "bias", "running_mean", "running_var")
    shapes = {f"{norm}.{field}": (outputs,) for field in fields}
    shapes[f"{name}.weight"] = (outputs, inputs, size, size)
    return shapes | {f"{norm}.num_batches_tracked": ()}


def random_tensors(shapes, seed=0):
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(1000)
        elif name.endswith("running_var"):
            tensors[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            scale = (2 / max(np.prod(shape[1:]), 1)) ** 0.5 if len(shape) > 1 else 0.1
            tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(scale)
    return tensors


@pytest.fixture(scope="module")
def shapes():
    return checkpoint_shapes(layer3=6)


@pytest.fixture(scope="module")
def tensors(shapes):
    return random_tensors(shapes)


@pytest.fixture(scope="module")
def run(tensors, tmp_path_factory):
    """A run made of a file of those tensors, by the command."""
    folder = tmp_path_factory.mktemp("checkpoint")
    file = save(folder / "train_epoch_37.5_0.6712", tensors)
    words = ["convert", str(file), "--as-run", str(folder / "run"), "--fold", "2"]
    shapes = ("--config.dataset.kind=shapes", "--config.dataset.name=Shapes")
    sizes = ("--config.dataset.val_images=200", "--config.dataset.side=161")
    main([*words, *shapes, *sizes, "--config.side=97", "--config.workers=0"])
    return folder / "run"


def save(path, tensors):
    """Write a checkpoint as its authors did, where PyTorch is; else its tensors."""
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


def test_names_and_shapes_are_those_of_the_released_files():
    for name, layer3, count in (("r50", 6, 411), ("r101", 23, 717)):
        shapes = checkpoint_shapes(layer3)
        assert len(shapes) == count
        if not ORACLE.is_dir():
            continue
        theirs = json.loads((ORACLE / f"state_dict_{name}.json").read_text())
        assert {key: tuple(shape) for key, (shape, _) in theirs.items()} == shapes


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
    assert (config.variant, config.behaviour, config.dataset.fold) == (
        "released",
        "auto",
        2,
    )
    assert config.epochs == 100
    assert config.backbone.name == "resnet50_deepstem"


def test_it_is_evaluated_in_both_behaviours(run, capsys):
    for behaviour in ("released", "fixed"):
        words = ["evaluate", "--workdir", str(run), "--episodes", "2", "--seeds", "0"]
        main([*words, "--side", "97", f"--config.behaviour={behaviour}"])
    printed = capsys.readouterr().out
    assert "released QPENet" in printed
    assert "fixed QPENet" in printed
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
    tensors = random_tensors(checkpoint_shapes(layer3=23))
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
    wrong = tensors | {"gam.gate.0.bias": np.zeros(3, np.float32)}
    other = tensors | {"fgx.weight": np.zeros(3, np.float32)}
    broken = tensors | {"layer4.0.bn1.weight": np.full(512, np.nan, np.float32)}
    for bad, words in (
        (missing, "missing: cls_meta.3.bias"),
        (wrong, r"gam.gate.0.bias \(3,\) instead of \(256,\)"),
        (other, "not known: fgx.weight"),
        (broken, "not finite or not real: layer4.0.bn1.weight"),
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
def test_the_command_says_what_it_needs(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

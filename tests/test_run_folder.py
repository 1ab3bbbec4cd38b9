"""Runs that are opened later, elsewhere or without data: what is kept and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qpenet_jax.runs.saved_config import merged
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qpenet_jax import InputError, load
from qpenet_jax.backbones import precision
from qpenet_jax.backbones.convert import convert
from qpenet_jax.config import VERSION, default_config
from qpenet_jax.core.fields import flat
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.evaluation.metrics import load_scores
from qpenet_jax.recipes import resolved
from qpenet_jax.runs.datasets import build_dataset
from qpenet_jax.runs.evaluator import Evaluator
from qpenet_jax.runs.folder import claim, inputs_of, open_run

OLD = Path(__file__).parent / "goldens" / "run_dbf7d53"
"""The quick start of commit dbf7d53, before configs had a version: 3 steps of a network
of 8 channels at 65 pixels, scored on 10 episodes; without the optimiser's state."""


@pytest.fixture
def old(tmp_path):
    """A copy of the old run, which may be changed."""
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def edit(folder, **fields):
    """Change top-level fields of a run's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_of_an_earlier_version_evaluates_to_the_same_scores(old, tmp_path):
    run = open_run(old)
    val = build_dataset(run.config, "val")
    evaluator = Evaluator(run.config, run.weights, tmp_path / "out", val)
    (tmp_path / "out").mkdir()
    told = []

    def tell(results, figure):
        """TensorBoard's part; the results say that all is done, so it comes before."""
        with Image.open(figure) as picture:
            shape = np.asarray(picture).shape
        told.append((results["miou"], len(shape), results_file.exists()))

    results_file = tmp_path / "out" / "results.json"
    evaluator(run.params, tell, step=run.step)
    results = json.loads(results_file.read_text())
    assert told == [(pytest.approx(results["miou"]), 3, False)]
    before = json.loads((OLD / "results.json").read_text())
    assert results["protocol"] == before["protocol"]
    assert (results["dtype"], results["device"]) == ("float32", "cpu")
    assert "Computed in float32 on cpu" in (tmp_path / "out/results.md").read_text()
    assert results["miou"] == pytest.approx(before["miou"], abs=0.05)
    ours = load_scores(tmp_path / "out" / "episodes_qpenet.csv").rows
    theirs = load_scores(OLD / "episodes_qpenet.csv").rows
    np.testing.assert_array_equal(ours[:, :4], theirs[:, :4])
    # Another machine may round a pixel to the other side.
    np.testing.assert_allclose(ours, theirs, atol=3)


def test_later_fields_have_the_value_that_the_run_was_made_with(old):
    config = open_run(old).config
    assert config.version == VERSION
    assert config.recipe == "paper"
    assert config.dtype == "float32"
    assert not config.model.normalize
    assert config.model.background_scale == 1
    assert config.loss.pre == 1
    assert config.optimizer.lr == 5e-4


def test_an_earlier_run_may_be_resumed_by_the_same_config(old):
    run = open_run(old)
    data = build_dataset(run.config, "train"), build_dataset(run.config, "val")
    claim(old, run.config, inputs_of(*data, run.weights))


def test_other_images_under_the_same_names_are_refused(old, tmp_path, write_voc):
    """Of a run that knows of them: an earlier version's has no hash of the files."""
    run, root = open_run(old), write_voc(tmp_path / "voc", images=3, classes=2)

    def inputs():
        data = VOCLayout(root, root / "ids.txt", ("one", "two"))
        return inputs_of(data, data, run.weights)

    (old / "inputs.json").unlink()
    claim(old, run.config, inputs())
    claim(old, run.config, inputs())
    image = root / "JPEGImages/im_001.jpg"
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(InputError) as refused:
        claim(old, run.config, inputs())
    assert "(training files, validation files differ" in str(refused.value)


def test_what_is_shared_is_read_back(old):
    assert open_run(old).shared == {}
    path = old / "inputs.json"
    found = {"scored images that were trained on": "1 of 9, such as a = b"}
    path.write_text(json.dumps(json.loads(path.read_text()) | found))
    assert open_run(old).shared == found


def test_a_run_goes_on_only_where_auto_means_the_same(tmp_path, monkeypatch):
    def on(ampere):
        monkeypatch.setattr(precision, "from_ampere_on", lambda: ampere)

    def go_on(folder, dtype):
        config = default_config()
        config.dtype = dtype
        claim(folder, resolved(config), {"weights": "0"})

    new, early = tmp_path / "new", tmp_path / "early"
    on(True)
    go_on(new, "auto")
    assert json.loads((new / "inputs.json").read_text())["dtype"] == "tf32"
    go_on(new, "tf32")
    with pytest.raises(InputError, match=r"another config \(dtype differ\)"):
        go_on(new, "float32")
    on(False)
    with pytest.raises(InputError, match=r"other inputs \(dtype differ .*same dtype"):
        go_on(new, "auto")
    # Begun before there was "auto", and before inputs.json told the dtype.
    go_on(early, "float32")
    (early / "inputs.json").write_text('{"weights": "0"}')
    go_on(early, "auto")
    on(True)
    with pytest.raises(InputError, match=r"another config \(dtype differ\)"):
        go_on(early, "auto")


def test_a_run_without_a_dtype_was_made_in_float32(old):
    path = old / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    assert merged(config, "a file").dtype == "float32"
    assert merged({"version": VERSION}, "a file").dtype == "auto"


def test_an_unknown_field_is_one_clear_line(old):
    edit(old, sead=3)
    with pytest.raises(InputError) as refused:
        open_run(old)
    assert str(refused.value) == (
        f"{old / 'config.json'} has an unknown field sead: is it seed?"
    )


def test_a_later_version_is_refused(old):
    edit(old, version=VERSION + 1)
    with pytest.raises(InputError, match=f"of version {VERSION + 1}.*knows 1 to"):
        open_run(old)


def test_a_value_of_another_type_is_refused(old):
    edit(old, dataset=3)
    with pytest.raises(InputError, match="dataset must hold fields"):
        open_run(old)
    edit(old, dataset={}, side="large")
    with pytest.raises(InputError, match="side='large' is not of the type of 473"):
        open_run(old)


def test_what_is_saved_is_what_is_read():
    config = default_config()
    config.dataset.novel = ("ant", "bee")
    config.eval.seeds = (1, 2)
    again = merged(json.loads(config.to_json()), "config.json")
    assert flat(again.to_dict()) == flat(config.to_dict())


def test_paths_can_be_overridden_and_nothing_else(old):
    words = ["--config.dataset.root=/elsewhere", "--config.workers=0"]
    config = open_run(old, words).config
    assert (config.dataset.root, config.workers) == ("/elsewhere", 0)
    with pytest.raises(InputError, match=r"side=97: a finished run settles this"):
        open_run(old, ["--config.side=97"])
    with pytest.raises(InputError, match="a whole number of loading processes"):
        open_run(old, ["--config.workers=many"])


def test_other_weights_than_those_of_the_training_are_refused(old, tmp_path):
    right = Path(convert("efficientnet_lite0", None, out_dir=tmp_path))
    load(old, [f"--config.backbone.weights={right}"])
    weights = load_file(right)
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    wrong = tmp_path / "wrong.safetensors"
    with safe_open(right, "numpy") as file:
        save_file(weights, wrong, metadata=file.metadata())
    with pytest.raises(InputError, match=r"wrong.safetensors: not the weights that"):
        load(old, [f"--config.backbone.weights={wrong}"])


@pytest.mark.parametrize("split", ["blocks", "strided", "named", "coco_fwb"])
def test_predicting_needs_no_data_set(old, split):
    saved = json.loads((old / "config.json").read_text())["dataset"]
    here = {"kind": "prepared", "root": "/nowhere", "split": split, "novel": ["ant"]}
    edit(old, dataset=saved | here)
    segmenter = load(old)
    image = np.zeros((40, 50, 3), np.uint8)
    mask = np.ones((40, 50), np.uint8)
    assert segmenter(image, image, mask).shape == (40, 50)

"""Runs that are opened later, elsewhere or without data: what is kept and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qpenet_jax import InputError, load
from qpenet_jax.backbones import precision
from qpenet_jax.config import VERSION, default_config
from qpenet_jax.data.episode_lists import EpisodeList, FrozenEpisodes
from qpenet_jax.data.episodes import EpisodeIds
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.recipes import resolved
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_fold,
    build_protocol,
    class_names,
)
from qpenet_jax.runs.evaluator import Evaluator, folder_name, scored_episodes
from qpenet_jax.runs.folder import claim, inputs_of, open_run

pytestmark = pytest.mark.standard_promotion


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, which may be changed."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def config(finished):
    return open_run(finished[0]).config


def edit(folder, **fields):
    """Change top-level fields of a run's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- What belongs to a run ---


def test_other_images_under_the_same_names_are_refused(run, tmp_path, write_voc):
    opened, root = open_run(run), write_voc(tmp_path / "voc", images=3, classes=2)

    def inputs():
        data = VOCLayout(root, root / "ids.txt", ("one", "two"))
        return inputs_of(data, data, opened.weights)

    assert opened.shared == {}
    (run / "inputs.json").unlink()
    # What scored images share with those that are trained on is kept for the results.
    found = {"scored images that were trained on": "1 of 9, such as a = b"}
    claim(run, opened.config, inputs() | found)
    claim(run, opened.config, inputs() | found)
    assert open_run(run).shared == found
    image = root / "JPEGImages/im_001.jpg"
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(InputError) as refused:
        claim(run, opened.config, inputs())
    assert "(training files, validation files differ" in str(refused.value)


def test_a_run_goes_on_only_where_auto_means_the_same(tmp_path, monkeypatch):
    def go_on(dtype, ampere):
        monkeypatch.setattr(precision, "from_ampere_on", lambda: ampere)
        config = default_config()
        config.dtype = dtype
        claim(tmp_path / "run", resolved(config), {"weights": "0"})

    go_on("auto", ampere=True)
    kept = json.loads((tmp_path / "run/inputs.json").read_text())
    assert kept["dtype"] == "tf32"
    go_on("tf32", ampere=True)
    with pytest.raises(InputError, match=r"another config \(dtype differ\)"):
        go_on("float32", ampere=True)
    with pytest.raises(InputError, match=r"other inputs \(dtype differ\).*same dtype"):
        go_on("auto", ampere=False)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"sead": 3}, "run/config.json: no such config field: sead: did you mean seed"),
        ({"version": VERSION + 1}, f"of version {VERSION + 1}.*knows {VERSION}"),
        ({"dataset": 3}, "no such config field: dataset"),
        ({"side": "large"}, "side='large' is not of the type of 473"),
    ],
)
def test_configs_that_no_run_has_are_one_clear_line(run, fields, refused):
    edit(run, **fields)
    with pytest.raises(InputError, match=refused):
        open_run(run)


def test_paths_can_be_overridden_and_nothing_else(run):
    words = ["--config.dataset.root=/elsewhere", "--config.workers=0"]
    config = open_run(run, words).config
    assert (config.dataset.root, config.workers) == ("/elsewhere", 0)
    with pytest.raises(InputError, match=r"side=97: a finished run decides this"):
        open_run(run, ["--config.side=97"])
    with pytest.raises(InputError, match=r"config\.workers.*many"):
        open_run(run, ["--config.workers=many"])


def test_other_weights_than_those_of_the_training_are_refused(run, tmp_path):
    right = open_run(run).config.backbone.weights
    moved = shutil.copy(right, tmp_path / "moved.safetensors")
    load(run, [f"--config.backbone.weights={moved}"])
    weights, wrong = load_file(right), tmp_path / "wrong.safetensors"
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    with safe_open(right, "numpy") as file:
        save_file(weights, wrong, metadata=file.metadata())
    with pytest.raises(InputError, match=r"wrong.safetensors: not the weights that"):
        load(run, [f"--config.backbone.weights={wrong}"])


@pytest.mark.parametrize("split", ["blocks", "strided", "named", "coco_fwb"])
def test_predicting_needs_no_data_set(run, split):
    saved = json.loads((run / "config.json").read_text())["dataset"]
    here = {"kind": "prepared", "root": "/nowhere", "split": split, "novel": ["ant"]}
    edit(run, dataset=saved | here)
    image = np.zeros((40, 50, 3), np.uint8)
    mask = np.ones((40, 50), np.uint8)
    assert load(run)(image, image, mask).shape == (40, 50)


# --- What is scored, and the folder for it ---


def frozen(*class_ids):
    """One episode of every class, with two supports."""
    rows = [EpisodeIds(i, 5, c, (6, 7)) for i, c in enumerate(class_ids)]
    return EpisodeList([FrozenEpisodes(0, tuple(rows))], "ab" * 32)


def test_every_protocol_has_a_folder_of_its_own(config):
    """It is named for what is scored, so before the evaluator is made."""
    own = {"side": 473, "min_pixels": 2048, "exclude_novel": False}
    pfenet = build_protocol(config, "pfenet", **own)
    assert folder_name(pfenet) == "pfenet_1shot"
    changes = own | {"shots": 5, "seeds": (1, 2), "scoring": "exact"}
    five = build_protocol(config, "pfenet", **changes)
    assert folder_name(five) == "pfenet_seeds=1,2_scoring=exact_5shot"
    episodes = frozen(*build_fold(config).novel)
    listed = folder_name(pfenet, episodes)
    assert "episode_list=abababababab" in listed
    assert listed.endswith("_2shot")
    val, protocol = build_dataset(config, "val"), build_protocol(config)
    for given in (None, episodes):
        scored = scored_episodes(config, val, protocol, given).protocol
        assert folder_name(scored) == folder_name(protocol, given)


def test_classes_that_no_episode_can_show_are_left_out(config):
    val, protocol = build_dataset(config, "val"), build_protocol(config)
    whole = scored_episodes(config, val, protocol)
    assert (whole.class_ids, whole.left_out) == (build_fold(config).novel, [])
    counts = val.counts[:, [c - 1 for c in whole.class_ids]]
    most = int((counts >= 64).sum(axis=0).max())
    few = scored_episodes(config, val, build_protocol(config, shots=most - 1))
    names = tuple(class_names(config)[c - 1] for c in few.class_ids)
    assert 0 < len(few.left_out) < len(protocol.classes)
    assert set(names) == set(protocol.classes) - set(few.left_out)
    assert few.protocol.classes == names
    trained = frozen(build_fold(config).base[0])
    with pytest.raises(InputError, match="isn't novel"):
        scored_episodes(config, val, protocol, trained)


def test_results_say_last_that_all_is_done(run, config, tmp_path):
    """To make an evaluator and to score write no results yet."""
    folder, opened = tmp_path / "new", open_run(run)
    evaluator = Evaluator(config, opened.weights, folder, build_dataset(config, "val"))
    assert evaluator.describe().startswith("protocol: default, but episodes=6")
    assert evaluator.step() is None
    assert not folder.exists()
    results = evaluator.score(opened.params, step=opened.step)
    assert (folder / "episodes.png").exists()
    assert evaluator.step() is None
    evaluator.write(results)
    assert evaluator.step() == opened.step
    before = json.loads((run / "results.json").read_text())
    for name in ("miou", "protocol", "dtype", "device"):
        assert results[name] == before[name]
    assert "Computed in float32 on cpu" in (folder / "results.md").read_text()
    (folder / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json is not valid JSON"):
        evaluator.step()

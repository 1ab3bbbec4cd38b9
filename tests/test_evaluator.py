"""What an evaluator draws, and the folder it writes into; test_train.py runs it."""

from pathlib import Path

import pytest
from qpenet_jax.runs.drawn import draw, folder_name

from configs import quickstart
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.episode_lists import EpisodeList, FrozenEpisodes
from qpenet_jax.data.episodes import EpisodeIds
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_fold,
    build_protocol,
    class_names,
)
from qpenet_jax.runs.evaluator import Evaluator


@pytest.fixture(scope="module")
def config():
    config = quickstart.get_config()
    config.side = config.dataset.side = 65
    config.dataset.val_images = 60
    config.dataset.min_pixels = 64
    config.dataset.on_few = "drop"
    config.eval.episodes = 6
    return complete(config)


def frozen(*class_ids):
    """One episode of every class, with two supports."""
    rows = [EpisodeIds(i, 5, c, (6, 7)) for i, c in enumerate(class_ids)]
    return EpisodeList([FrozenEpisodes(0, tuple(rows))], "ab" * 32)


def test_every_protocol_has_a_folder_of_its_own(config):
    own = {"side": 473, "min_pixels": 2048, "exclude_novel": False}
    protocol = build_protocol(config, "pfenet", **own)
    assert folder_name(protocol) == "pfenet_1shot"
    five = build_protocol(
        config, "pfenet", **own, shots=5, seeds=(1, 2), scoring="exact"
    )
    assert folder_name(five) == "pfenet_seeds=1,2_scoring=exact_5shot"
    listed = folder_name(protocol, frozen(*build_fold(config).novel))
    assert listed != folder_name(protocol)
    assert "episode_list=abababababab" in listed
    assert listed.endswith("_2shot")


def test_the_name_is_that_of_what_is_scored(config):
    """So a folder may be named before the evaluator is made."""
    val, protocol = build_dataset(config, "val"), build_protocol(config)
    for episodes in (None, frozen(*build_fold(config).novel)):
        scored = draw(config, val, protocol, episodes).protocol
        assert folder_name(scored) == folder_name(protocol, episodes)


def test_classes_that_no_episode_can_show_are_left_out(config):
    val = build_dataset(config, "val")
    protocol = build_protocol(config)
    whole = draw(config, val, protocol)
    assert (whole.class_ids, whole.left_out) == (build_fold(config).novel, [])
    counts = val.counts[:, [c - 1 for c in whole.class_ids]]
    most = int((counts >= 64).sum(axis=0).max())
    few = draw(config, val, build_protocol(config, shots=most - 1))
    names = {class_names(config)[c - 1] for c in few.class_ids}
    assert 0 < len(few.left_out) < len(protocol.classes)
    assert names == set(protocol.classes) - set(few.left_out)
    assert few.protocol.classes == tuple(
        class_names(config)[c - 1] for c in few.class_ids
    )


def test_a_list_of_training_classes_is_refused(config):
    episodes = frozen(build_fold(config).base[0])
    with pytest.raises(InputError, match="isn't novel"):
        draw(config, build_dataset(config, "val"), build_protocol(config), episodes)


def test_to_make_an_evaluator_writes_nothing(config, tmp_path: Path):
    folder = tmp_path / "new"
    evaluator = Evaluator(config, {}, folder, build_dataset(config, "val"))
    assert evaluator.folder == folder
    assert evaluator.describe().startswith("protocol: ours, but episodes=6")
    assert evaluator.step() is None
    assert not folder.exists()

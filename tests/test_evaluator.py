"""What an evaluator draws, and the folder it writes into; test_train.py runs it."""

from pathlib import Path

import pytest

from configs import quickstart
from qpenet_jax.core.errors import InputError
from qpenet_jax.data.episode_lists import EpisodeList, FrozenEpisodes
from qpenet_jax.data.episodes import EpisodeIds
from qpenet_jax.runs.drawn import draw, folder_name
from qpenet_jax.runs.evaluator import Evaluator
from qpenet_jax.runs.experiment import Experiment


@pytest.fixture(scope="module")
def experiment():
    config = quickstart.get_config()
    config.side = config.dataset.side = 65
    config.dataset.val_images = 60
    config.dataset.min_pixels = 64
    config.dataset.on_few = "drop"
    config.eval.episodes = 6
    return Experiment(config)


def frozen(*class_ids):
    """One episode of every class, with two supports."""
    rows = [EpisodeIds(i, 5, c, (6, 7)) for i, c in enumerate(class_ids)]
    return EpisodeList([FrozenEpisodes(0, tuple(rows))], "ab" * 32)


def test_every_protocol_has_a_folder_of_its_own(experiment):
    own = {"side": 473, "min_pixels": 2048, "exclude_novel": False}
    protocol = experiment.protocol("pfenet", **own)
    assert folder_name(protocol) == "pfenet_1shot"
    five = experiment.protocol("pfenet", **own, shots=5, seeds=(1, 2), scoring="exact")
    assert folder_name(five) == "pfenet_seeds=1,2_scoring=exact_5shot"
    listed = folder_name(protocol, frozen(*experiment.fold.novel))
    assert listed != folder_name(protocol)
    assert "episode_list=abababababab" in listed
    assert listed.endswith("_2shot")


def test_the_name_is_that_of_what_is_scored(experiment):
    """So a folder may be named before the evaluator is made."""
    val, protocol = experiment.dataset("val"), experiment.protocol()
    for episodes in (None, frozen(*experiment.fold.novel)):
        scored = draw(experiment, val, protocol, episodes).protocol
        assert folder_name(scored) == folder_name(protocol, episodes)


def test_classes_that_no_episode_can_show_are_left_out(experiment):
    val = experiment.dataset("val")
    protocol = experiment.protocol()
    whole = draw(experiment, val, protocol)
    assert (whole.class_ids, whole.left_out) == (experiment.fold.novel, [])
    counts = val.counts[:, [c - 1 for c in whole.class_ids]]
    most = int((counts >= 64).sum(axis=0).max())
    few = draw(experiment, val, experiment.protocol(shots=most - 1))
    names = {experiment.class_names[c - 1] for c in few.class_ids}
    assert 0 < len(few.left_out) < len(protocol.classes)
    assert names == set(protocol.classes) - set(few.left_out)
    assert few.protocol.classes == tuple(
        experiment.class_names[c - 1] for c in few.class_ids
    )


def test_a_list_of_training_classes_is_refused(experiment):
    episodes = frozen(experiment.fold.base[0])
    with pytest.raises(InputError, match="isn't novel"):
        draw(experiment, experiment.dataset("val"), experiment.protocol(), episodes)


def test_to_make_an_evaluator_writes_nothing(experiment, tmp_path: Path):
    folder = tmp_path / "new"
    evaluator = Evaluator(experiment, {}, folder, experiment.dataset("val"))
    assert evaluator.folder == folder
    assert evaluator.describe().startswith("protocol: ours, but episodes=6")
    assert evaluator.step() is None
    assert not folder.exists()
